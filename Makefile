# Everything runs in .venv, which the first target that needs it makes from nothing. Stamp files inside it remember what is
# done, so a second call starts at once; a change of a source file rebuilds the package, one of pyproject.toml the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

# A fresh rustup may not be on this shell's PATH yet.
export PATH := $(CURDIR)/.venv/bin:$(PATH):$(HOME)/.cargo/bin
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
# Cargo and Ninja have jobs of their own, whatever --jobs is given to make.
unexport MAKEFLAGS MFLAGS

PIP := .venv/bin/python -m pip --disable-pip-version-check
TOOLS := .venv/.tools
BUILT := .venv/.built
READY := .venv/.ready
MODEL := .cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SOURCES := $(shell find rust/src cuda CMakeLists.txt Cargo.toml Cargo.lock python/_build -type f -not -name '*.pyc' 2>/dev/null)

say = @printf '==> %s\n'

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'
	@printf '\nARGS is passed on: make test-python ARGS="-k pool", make run ARGS="--json result.json".\n'

# Set-up --------------------------------------------------------------------------------------------------------------

# The build tools come first and the compilation second: what is missing on the machine shows before torch is downloaded.
$(TOOLS): pyproject.toml
	@.ci/find-python > /dev/null
	$(say) "set-up 1/3: .venv and the build tools"
	@[ -x .venv/bin/python ] || "$$(.ci/find-python)" -m venv .venv
	@$(PIP) install --quiet --upgrade 'pip>=25.1'
	@$(PIP) install --quiet --group build
	@.venv/bin/python python/_build/pagedcore_build.py
	@touch $@

$(BUILT): $(TOOLS) $(SOURCES)
	$(say) "set-up 2/3: compile pagedcore (a minute or two the first time)"
	@$(PIP) install --verbose --no-build-isolation --no-deps -e .
	@touch $@

# --no-compile: byte-compiling all of torch would take twice as long as installing it.
$(READY): pyproject.toml | $(BUILT)
	$(say) "set-up 3/3: torch, transformers and the test tools (about 3 GB to download the first time)"
	@$(PIP) install --no-compile --no-build-isolation -e '.[engine,dev]'
	@touch $@

$(MODEL): | $(TOOLS)
	$(say) "fetch SmolLM2-135M-Instruct (93 MB)"
	@.venv/bin/python bench/fetch_model.py

.PHONY: setup
setup: $(READY) ## Make .venv with the build tools, torch and the package, nothing else

.PHONY: build
build: $(BUILT) ## Compile the package into .venv without torch

# Jobs ----------------------------------------------------------------------------------------------------------------

.PHONY: run
run: $(READY) $(MODEL) ## The main job: answer 64 prompts with SmolLM2-135M out of paged memory
	$(say) "load torch and the model (some seconds), then answer 64 prompts"
	@.venv/bin/python docs/examples/answer_prompts.py --model $(MODEL) $(ARGS)

.PHONY: test
test: test-rust cuda-gates test-python ## All tests but the slow ones

.PHONY: test-rust
test-rust: rust-tests ## The tests of the Rust core (no Python needed)
	$(say) "cargo test"
	@cargo test --locked $(if $(findstring test-rust,$(MAKECMDGOALS)),$(ARGS))

.PHONY: rust-tests
rust-tests: # compiled, for test-rust to run
	@command -v cargo > /dev/null || { echo "there is no Rust toolchain: install Rust from https://rustup.rs and try again" >&2; exit 1; }
	@cargo test --locked --no-run

# All of them in two processes, which share the files in their order (tests/conftest.py); what ARGS picks, in one.
IN_TWO := --numprocesses=2 --dist=loadscope --no-loadscope-reorder

.PHONY: test-python
test-python: $(READY) $(MODEL) ## The Python tests but the slow ones
	$(say) "pytest"
	@.venv/bin/python -m pytest -m "not slow" $(or $(ARGS),$(IN_TWO))

.PHONY: test-slow
test-slow: $(READY) $(MODEL) ## Only the slow Python tests
	$(say) "pytest, slow tests"
	@.venv/bin/python -m pytest -m slow $(ARGS)

.PHONY: test-shim
test-shim: $(READY) ## The GPU kernels under the host shim (part of `make test`; no GPU needed; 6 minutes on two idle cores)
	$(say) "pytest, shim"
	@.venv/bin/python -m pytest -m "not slow" $(if $(findstring tests/,$(ARGS)),,tests/shim) $(or $(ARGS),$(IN_TWO))

.PHONY: shim-mutants
shim-mutants: $(READY) ## Plant faults in the GPU kernels one at a time: the shim's tests must catch each (10 minutes on two idle cores)
	@.venv/bin/python tests/shim/mutants.py

.PHONY: cuda-gates
cuda-gates: $(BUILT) ## Build the GPU kernels into the package with nvcc; no spills, registers within budget (minutes the first time)
	$(say) "the GPU kernels, by nvcc for every image"
	@.venv/bin/python .ci/cuda-gates

# The gpu-checks need no .venv: they run with the python3 of a machine that has a GPU, and with what is there.
.PHONY: gpu-check-core
gpu-check-core: ## On a machine with a GPU: the device tests (8 minutes); ARGS=--rehearse without one
	@python3 bench/gpu_check.py core $(ARGS)

.PHONY: gpu-check-bench
gpu-check-bench: ## On a machine with a GPU: attention beside a copy and other libraries (8 minutes); ARGS=--rehearse without one
	@python3 bench/gpu_check.py bench $(ARGS)

.PHONY: gpu-check-sanitizer
gpu-check-sanitizer: ## On a machine with a GPU: compute-sanitizer's four tools on small shapes (5 minutes)
	@python3 bench/gpu_check.py sanitizer $(ARGS)

.PHONY: gpu-wheels
gpu-wheels: $(TOOLS) ## Gather what a GPU machine without a network needs to compare with other libraries, into .gpu-wheels
	@.venv/bin/python bench/gpu_wheels.py

.PHONY: bench
bench: $(READY) ## The microbenchmarks
	@.venv/bin/python -m pagedcore.bench $(ARGS)

.PHONY: lint
lint: rust-components $(READY) ## Formatters in check mode, clippy, ruff, mypy, stubtest
	@.ci/lint

.PHONY: rust-components
rust-components: # before a long set-up, as these come with Rust and not with pip
	@.ci/lint rust-components

.PHONY: format
format: $(READY) ## Format all sources in place
	@cargo fmt
	@.venv/bin/ruff check --quiet --fix-only .
	@.venv/bin/ruff format --quiet .
	@git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r .venv/bin/clang-format -i

.PHONY: wheel
wheel: $(TOOLS) ## Build the sdist, and the wheel from the sdist, into dist/
	@$(PIP) install --quiet build
	@CUDACXX="$$(.venv/bin/python python/_build/nvcc.py)" .venv/bin/python -m build # out of the tree, where .cuda is not seen

.PHONY: clean
clean: ## Remove what was compiled; .venv and .cache stay
	@rm -rf build dist target python/pagedcore/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(BUILT)
	@find python tests bench docs -name __pycache__ -prune -exec rm -rf {} + 2> /dev/null || true

.PHONY: distclean
distclean: clean ## Remove .venv, nvcc and the downloaded model as well
	@rm -rf .venv .cuda .cache

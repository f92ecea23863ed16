"""Settings that hold for every test, and the model that end-to-end tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from locks import locked

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

# No test uses the network. Set before anything imports a Hugging Face library, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# NumPy's products are the oracle's, and small: a second thread of its own would mostly spin. Read when it is imported.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

# Two processes of tests share the cores: threads that have nothing to do leave theirs to the other. Read once too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

# CI runs the same examples each time and prints what replays a failure; elsewhere every run looks at new ones.
COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, **COMMON)
settings.register_profile("dev", **COMMON)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """The settings in pyproject.toml are no errors on a machine that has pytest and not the plugin they are for."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds a test may take: pytest-timeout, which is not here, would stop it")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which is not here")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, which `make test` fetches before it starts pytest."""
    if not SMOLLM2.is_file():
        pytest.fail(f"{SMOLLM2.relative_to(ROOT)} is missing: python bench/fetch_model.py fetches it (93 MB)")
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M-Instruct as a model directory: converted from the GGUF file the first time, kept beside it.

    PAGEDCORE_TEST_MODEL names another copy, as a directory or a GGUF file.
    """
    from pagedcore import environment
    from pagedcore.models import convert_gguf

    model = Path(environment.TEST_MODEL.read() or request.getfixturevalue("smollm2_gguf"))
    if model.is_dir():
        return model
    with locked(model.with_suffix(".lock")):
        return convert_gguf(model)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run in several processes: those of a file in one, and all that share the wheel."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/packaging" if file.startswith("tests/packaging/") else file

    return ByFile(config, log)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of models so small that they only lose by a second thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def runnable_isas() -> list[str]:
    """The CPU instruction sets that this machine runs.

    The BF16 kernels with their one instruction emulated too: few machines have it, all with AVX-512 can run the rest.
    """
    from pagedcore import _kernels

    names = _kernels.cpu_isas()
    return [*names, "avx512_bf16_emulated"] if "avx512" in names else names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", runnable_isas(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs, one after another."""
    from pagedcore import _kernels

    before = _kernels.cpu_isa()
    _kernels.select_cpu_isa(request.param)
    yield request.param
    _kernels.select_cpu_isa(before)

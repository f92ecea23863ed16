"""The GPU part of the build: where nvcc is found, what `make cuda-gates` left in the package, and builds without it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = runpy.run_path(str(ROOT / "python" / "_build" / "nvcc.py"))
# What a GPU library's array shows of itself.
CUDA_ARRAY = """
class Array:
    __cuda_array_interface__ = {"shape": (2, 4), "typestr": "<f4", "data": (4096, False), "version": 3}
    device = type("Device", (), {"id": 0})
"""


@pytest.fixture(scope="session")
def nvcc() -> Path:
    found = NVCC["find"]()
    if found is None:
        pytest.fail("there is no nvcc: `make cuda-gates`, which `make test` runs first, installs it into .cuda")
    return found


@pytest.fixture
def search(monkeypatch, tmp_path):
    """An empty PATH, no CUDACXX, and a function that makes an nvcc which says that it is of a version."""
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def make(path: Path, version: str = "13.0") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
        path.chmod(0o755)
        return path

    return make


def test_order_of_the_search(search, monkeypatch, tmp_path):
    environment = tmp_path / ".cuda"
    wheel = search(environment / "lib" / "python3.11" / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc")
    on_path = search(tmp_path / "bin" / "nvcc")
    named = search(tmp_path / "named")
    monkeypatch.setenv("CUDACXX", str(named))
    assert NVCC["find"](environment) == named
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nothing"))
    assert NVCC["find"](environment) == on_path
    on_path.write_text("#!/bin/sh\nexit 1\n")  # a compiler that does not run
    system = Path("/usr/local/cuda/bin/nvcc")
    if not system.exists():
        assert NVCC["find"](environment) == wheel
        search(wheel, "11.8")
        assert NVCC["find"](environment) is None


def test_toolkit_headers_fit_the_compiler(nvcc, tmp_path):
    """Those of another version in the same folder fail here, and nowhere earlier."""
    source = tmp_path / "probe.cu"
    source.write_text(
        "#include <cooperative_groups.h>\n__global__ void probe() { cooperative_groups::this_grid().sync(); }\n"
    )
    subprocess.run([nvcc, "-c", source, "-o", tmp_path / "probe.o"], check=True)


def test_module_in_the_tree_has_the_gpu_kernels(nvcc):
    from pagedcore import _kernels

    facts = _kernels.gpu_facts()
    assert facts["images"] == "80 89-real 90a-real"
    assert len(facts["devices"]) > 0 or facts["problem"]
    data = Path(_kernels.__file__).read_bytes()
    assert b"libcudart.so" not in data  # the runtime is linked statically


def test_import_costs_little_without_a_driver():
    code = "import pagedcore, time; t = time.perf_counter(); import pagedcore._kernels; print(time.perf_counter() - t)"
    shown = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(5)]
    assert min(float(run.stdout) for run in shown) < 0.02


def test_wheel_without_gpu_kernels_says_so(wheel, clean_venv):
    clean_venv.install(wheel)
    code = f"""
{CUDA_ARRAY}
import numpy as np
from pagedcore import _kernels, ops
from pagedcore.errors import UnsupportedError
assert _kernels.gpu_facts() == {{"images": None}}
for call in (lambda: ops.zero_blocks(Array(), np.zeros(1, np.int32)), lambda: ops.warmup("cuda"),
             lambda: ops.device_errors(1), lambda: ops.attention_workspace_size(1, 1, 1, 1, 64)):
    try:
        call()
    except UnsupportedError as error:
        print(error)
"""
    said = clean_venv.run(code).splitlines()
    assert (
        said[0] == "kv: expected a tensor on the CPU, as this build of pagedcore has no GPU kernels, got one on cuda:0"
    )
    assert said[1:] == [
        f"device: expected the CPU, as this build of pagedcore has no GPU kernels, got cuda:{device}"
        for device in (0, 1, 0)
    ]


@pytest.mark.parametrize(("value", "message"), [("SOMETIMES", "use AUTO, ON or OFF"), ("ON", "no nvcc of CUDA")])
def test_a_build_that_cannot_be(source_tree, tmp_path, value, message):
    """What CMake reads before it compiles anything, and a search that takes no nvcc for new enough."""
    for name in ("CMakeLists.txt", "cuda/gpu.cmake", "python/_build/nvcc.py"):
        to = tmp_path / "source" / name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text((source_tree / name).read_text())
    search, count = re.subn(r"(?m)^MINIMUM = .*$", "MINIMUM = (999, 0)", to.read_text())
    assert count == 1
    to.write_text(search)
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
    )
    tools = Path(sys.executable).parent
    command = [tools / "cmake", "-S", tmp_path / "source", "-B", tmp_path / "build", f"-DPAGEDCORE_CUDA={value}"]
    command += [f"-Dpybind11_DIR={pybind11.stdout.strip()}", f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())

"""Builds the GPU kernels under the host shim: once plain, once with the race check.

PAGEDCORE_TEST_KERNELS names another directory to take the kernels from: mutants.py plants faults in a copy.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path(os.environ.get("PAGEDCORE_TEST_KERNELS") or ROOT / "cuda" / "gpu").resolve()


def build(check: str) -> ModuleType:
    """Compiles cuda/shim with CMake into build/shim-<check>, or nothing if nothing changed, and loads the module."""
    directory = ROOT / "build" / f"shim-{check}"
    if KERNELS != ROOT / "cuda" / "gpu":
        directory = KERNELS.parent / f"shim-{check}"
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
    ).stdout.strip()
    configure = [
        *("cmake", "-S", str(ROOT / "cuda" / "shim"), "-B", str(directory), "-G", "Ninja"),
        *(f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}", f"-DPAGEDCORE_SHIM_CHECK={check}"),
        f"-DPAGEDCORE_GPU_DIR={KERNELS}",
    ]
    # CMake and Ninja come with the interpreter's environment, which need not be activated.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (configure, ["cmake", "--build", str(directory)]):
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if result.returncode != 0:
            pytest.fail(f"{' '.join(command)}:\n{result.stdout}{result.stderr}", pytrace=False)
    (library,) = directory.glob("_shim*.so")
    spec = importlib.util.spec_from_file_location(library.name.partition(".")[0], library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def plain_shim() -> Any:
    return build("none")


@pytest.fixture(scope="session")
def race_shim() -> Any:
    return build("races")


@pytest.fixture(params=["plain", "races"])
def shim(request: pytest.FixtureRequest) -> Any:
    """The shim's module, in each of its builds."""
    return request.getfixturevalue("plain_shim" if request.param == "plain" else "race_shim")

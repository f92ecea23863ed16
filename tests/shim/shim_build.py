"""Builds the GPU kernels under the host shim (plain, with the race check, under ASan and UBSan), and loads that."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from locks import locked

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "cuda" / "gpu"
# Head sizes of the tiled kernels, and those that the builds have which are slow to compile and to run.
TILED_HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
CHECKED_HEAD_DIMS = (64, 80, 128)


class BuildError(RuntimeError):
    """A build command failed; the message is the command and what it printed."""


def run_command(command: list[str], cwd: Path | None = None) -> str:
    """Standard output of a build command. CMake and Ninja come with this interpreter, activated or not."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(check: str, *, kernels: Path = GPU, directory: Path | None = None, head_dims: tuple[int, ...] = ()) -> Path:
    """Compiles cuda/shim for "none", "races" or "address", or nothing if nothing changed; gives the module's file."""
    head_dims = head_dims or (TILED_HEAD_DIMS if check == "none" else CHECKED_HEAD_DIMS)
    directory = directory or ROOT / "build" / f"shim-{check}"
    pybind11 = run_command([sys.executable, "-m", "pybind11", "--cmakedir"]).strip()
    configure = [
        *("cmake", "-S", str(ROOT / "cuda" / "shim"), "-B", str(directory), "-G", "Ninja"),
        *(f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}", f"-DPAGEDCORE_SHIM_CHECK={check}"),
        *(f"-DPAGEDCORE_GPU_DIR={kernels}", f"-DPAGEDCORE_SHIM_HEAD_DIMS={','.join(map(str, head_dims))}"),
    ]
    with locked(directory.with_suffix(".lock")):
        run_command(configure)
        run_command(["cmake", "--build", str(directory)])
    (library,) = directory.glob("_shim*.so")
    return library


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(library.name.partition(".")[0], library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def address_environment() -> dict[str, str]:
    """What a Python process needs to load the address build.

    The sanitizer has to be the first library of a process, and Python is not linked with it; its hook on exceptions
    looks for the C++ library when it starts. What Python keeps to its end is no leak of ours.
    """
    compiler = os.environ.get("CXX", "c++")
    libraries = [run_command([compiler, f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so")]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(str(Path(library).resolve()) for library in libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }

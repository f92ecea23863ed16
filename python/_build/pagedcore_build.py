"""PEP 517 and PEP 660 build backend: maturin, with one CMake run before it.

The wheel holds two extension modules. maturin builds `pagedcore._core` (Rust) and packs the wheel; before that the
`build_wheel` and `build_editable` hooks here run CMake for `pagedcore._kernels` (C++) and put the result where maturin
finds it (`[tool.maturin] include`). Only these two hooks compile anything.

`_core` is built against the stable ABI, so maturin tags the wheel for every later Python, while `_kernels` fits one
Python only: the wheel is retagged for the Python that built it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import maturin
from maturin import build_sdist, get_requires_for_build_sdist

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings: TypeAlias = "Mapping[str, Any] | None"

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "pagedcore"
CMAKE_REQUIREMENT = "cmake>=3.26"
CMAKE_MINIMUM = (3, 26)


# The hooks ------------------------------------------------------------------------------------------------------------


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Compile both extensions and write the wheel; returns its file name."""
    prepare_build()
    # The metadata prepared earlier carries maturin's tag, so it is not reused.
    return retag(Path(wheel_directory) / maturin.build_wheel(wheel_directory, config_settings))


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Compile both extensions into `python/pagedcore` and write a wheel that points there; returns its file name."""
    prepare_build()
    return retag(Path(wheel_directory) / maturin.build_editable(wheel_directory, config_settings))


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What the isolated build environment needs on this machine beyond `[build-system] requires`."""
    requirements = maturin.get_requires_for_build_wheel(config_settings)
    if find_cmake() is None:
        requirements += [CMAKE_REQUIREMENT, "ninja"]
    return requirements


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    """Write the metadata without compiling anything; returns the name of the .dist-info folder."""
    prepare_rust()
    return maturin.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


# What they do ---------------------------------------------------------------------------------------------------------


def prepare_build() -> None:
    """Check the tools, then leave an up-to-date `_kernels` in the package, ready to be packed."""
    prepare_rust()
    check_cpp()
    install_kernels(build_kernels())


def build_kernels() -> Path:
    """Run CMake, incrementally where the last run used the same tools. Returns the extension module it made."""
    cmake = find_cmake()
    if cmake is None:
        fail(f"CMake {'.'.join(map(str, CMAKE_MINIMUM))} or newer was not found. Install it: pip install cmake ninja")
    pybind11 = importlib.import_module("pybind11")
    build = ROOT / "build" / f"kernels-{sys.implementation.cache_tag}"
    output = build / "out"
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "PAGEDCORE_OUTPUT_DIR": str(output),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    configure = [cmake, "-S", str(ROOT), "-B", str(build), *(f"-D{name}={value}" for name, value in settings.items())]
    ninja = find_ninja()
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))

    # A CMake cache remembers paths into the isolated environment that made it, which is gone by the next build, and an
    # nvcc that may be another by then. One that has come or gone changes nothing for what is compiled without it.
    gpu = os.environ.get("PAGEDCORE_CUDA") or "AUTO"
    nvcc = None if gpu.upper() == "OFF" else runpy.run_path(str(Path(__file__).with_name("nvcc.py")))["find"]()
    stamps = {build / "configured-with.txt": "\n".join(configure)}
    if nvcc:
        stamps[build / "compiled-with-nvcc.txt"] = str(nvcc)
    if any(stamp.is_file() and stamp.read_text() != text for stamp, text in stamps.items()):
        shutil.rmtree(build, ignore_errors=True)
    run([*configure, f"-DPAGEDCORE_CUDA={gpu}"], "configure the kernels")
    for stamp, text in stamps.items():
        stamp.write_text(text)
    run([cmake, "--build", str(build), "--parallel"], "compile the kernels")

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    module = output / f"_kernels{suffix}"
    if not module.is_file():
        fail(f"CMake left no {module.name} in {output}")
    return module


def install_kernels(module: Path) -> None:
    """Put the module into the package and remove every other `_kernels*.so`, which would be packed as well."""
    target = PACKAGE / module.name
    for stale in PACKAGE.glob("_kernels*.so"):
        if stale != target:
            stale.unlink()
    if target.is_file() and target.read_bytes() == module.read_bytes():
        return
    # Replaced, not written into: a running process may have the old file mapped.
    staged = target.with_suffix(".new")
    shutil.copy2(module, staged)
    staged.replace(target)


def retag(wheel: Path) -> str:
    """Tag the wheel for the running Python instead of the stable ABI. Returns its new name."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    abi = python + ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else "")
    command = [sys.executable, "-m", "wheel", "tags", "--remove", "--python-tag", python, "--abi-tag", abi, str(wheel)]
    printed = run(command, "retag the wheel", capture=True)
    return Path(printed.strip().splitlines()[-1]).name


# The tools ------------------------------------------------------------------------------------------------------------


def find_cmake() -> str | None:
    """Path of a CMake that runs and is new enough, or None."""
    return find_tool("cmake", "CMAKE_BIN_DIR", CMAKE_MINIMUM)


def find_ninja() -> str | None:
    """Path of a ninja that runs, or None: CMake then falls back to make."""
    return find_tool("ninja", "BIN_DIR", (1, 0))


def find_tool(name: str, bin_dir: str, minimum: tuple[int, int]) -> str | None:
    """Look in the PyPI package of that name, then on PATH, and run what is there.

    A script on PATH may belong to another Python's package and die in an isolated environment: finding it proves
    nothing.
    """
    candidates = []
    with contextlib.suppress(ImportError, AttributeError):
        candidates.append(str(Path(getattr(importlib.import_module(name), bin_dir)) / name))
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        found = shutil.which(name, path=folder) if folder else None
        if found:
            candidates.append(found)
    return next((path for path in candidates if version_of(path) >= minimum), None)


def version_of(tool: str) -> tuple[int, ...]:
    """The first version number that `tool --version` prints; (0,) if it cannot be run or prints none."""
    try:
        shown = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return (0,)
    for word in shown.split():
        digits = word.split("-")[0].split(".")
        if len(digits) > 1 and all(part.isdigit() for part in digits[:2]):
            return int(digits[0]), int(digits[1])
    return (0,)


def prepare_rust() -> None:
    """Make `cargo` and `maturin` callable by name, or say in one sentence what to install."""
    # pip may be called by path, with nothing activated; rustup may be installed but not yet in this shell's PATH.
    extra = [sysconfig.get_path("scripts"), str(Path.home() / ".cargo" / "bin")]
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([extra[0], *path, extra[1]])

    needed = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["rust-version"]
    cargo = shutil.which("cargo")
    if cargo is None:
        fetch_rust(needed)
        return
    version = version_of(cargo)
    if version < tuple(map(int, needed.split("."))):
        found = f"is {'.'.join(map(str, version))}" if version > (0,) else "does not run"
        fail(f"Rust {needed} or newer is needed and {cargo} {found}. Install it from https://rustup.rs")


def fetch_rust(needed: str) -> None:
    """Fetch a private toolchain where `puccinialin` is there (maturin asks for it in isolated builds)."""
    sentence = f"there is no Rust toolchain. Install Rust {needed} or newer from https://rustup.rs and try again"
    try:
        setup_rust = importlib.import_module("puccinialin").setup_rust
    except ImportError:
        fail(sentence)
    print("pagedcore: no Rust toolchain found, fetching one into the user's cache", flush=True)
    try:
        os.environ.update(setup_rust())
    except Exception as error:  # noqa: BLE001  (whatever stops the download, the advice is the same)
        fail(f"{sentence} (fetching one failed: {error})")


def check_cpp() -> None:
    """Say in one sentence what to install where there is no C++ compiler or no Python header."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(shlex.split(name)[0]) for name in compilers):
        fail(f"there is no C++ compiler ({', '.join(compilers)}). Install one, on Debian and Ubuntu: apt install g++")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        fail(f"{sys.executable} has no C headers. Install them, on Debian and Ubuntu: apt install {python}-dev")


def run(command: list[str], purpose: str, *, capture: bool = False) -> str:
    """Run a tool with its output passed on, or returned; fails with one sentence where it fails."""
    result = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE if capture else None)
    if result.returncode != 0:
        fail(f"could not {purpose} (exit status {result.returncode}; its own message is above): {shlex.join(command)}")
    return result.stdout or ""


def fail(sentence: str) -> NoReturn:
    """End the build with a message and no traceback."""
    sys.stdout.flush()
    sys.exit(f"pagedcore: {sentence}.")


if __name__ == "__main__":
    # Before a long set-up: is there everything that the compilation will need?
    prepare_rust()
    check_cpp()

"""The build backend: which hooks there are, which of them compile, and what it says when a tool is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKEND = ROOT / "python" / "_build" / "pagedcore_build.py"


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """The backend as a fresh module that takes an empty folder for the repository."""
    spec = importlib.util.spec_from_file_location("pagedcore_build", BACKEND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "python" / "pagedcore")
    monkeypatch.setenv("PATH", os.environ["PATH"])  # prepare_rust changes it
    module.PACKAGE.mkdir(parents=True)
    shutil.copy(ROOT / "Cargo.toml", tmp_path)
    return module


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """An empty folder that is all of PATH, and a function that puts a script into it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    def add(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return add


def without_packages(monkeypatch, module, *names: str) -> None:
    """Make importing these packages fail inside the backend, as in an isolated environment that lacks them."""
    real = importlib.import_module

    def import_module(name: str):
        if name in names:
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(module.importlib, "import_module", import_module)


def test_every_hook_is_exported(backend):
    for kind in ("wheel", "sdist", "editable"):
        assert callable(getattr(backend, f"build_{kind}"))
        assert callable(getattr(backend, f"get_requires_for_build_{kind}"))
    assert callable(backend.prepare_metadata_for_build_wheel)
    assert callable(backend.prepare_metadata_for_build_editable)


@pytest.mark.parametrize(
    "hook", ["prepare_metadata_for_build_wheel", "prepare_metadata_for_build_editable", "build_sdist"]
)
def test_hooks_that_do_not_build_a_wheel_compile_nothing(source_tree, tmp_path, hook):
    code = f"import sys; sys.path.insert(0, 'python/_build'); import pagedcore_build as b; b.{hook}({str(tmp_path)!r})"
    target = tmp_path / "target"
    environment = {**os.environ, "CARGO_TARGET_DIR": str(target), "CXX": "/bin/false"}
    subprocess.run([sys.executable, "-c", code], cwd=source_tree, env=environment, check=True, capture_output=True)
    assert not (source_tree / "build").exists()
    assert not list(source_tree.rglob("*.so"))
    assert not list(target.rglob("*.rlib"))
    assert list(tmp_path.iterdir())


def test_asking_for_requirements_compiles_nothing(backend, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    backend.get_requires_for_build_wheel()
    backend.get_requires_for_build_editable()
    backend.get_requires_for_build_sdist()
    assert sorted(tmp_path.rglob("*")) == before


def test_stale_kernels_are_removed(backend, tmp_path):
    module = tmp_path / "out" / "_kernels.cpython-311-x86_64-linux-gnu.so"
    module.parent.mkdir()
    module.write_bytes(b"new")
    for name in ("_kernels.cpython-310-x86_64-linux-gnu.so", "_kernels.so", module.name):
        (backend.PACKAGE / name).write_bytes(b"old")
    (backend.PACKAGE / "_core.abi3.so").write_bytes(b"core")
    backend.install_kernels(module)
    assert sorted(path.name for path in backend.PACKAGE.iterdir()) == ["_core.abi3.so", module.name]
    assert (backend.PACKAGE / module.name).read_bytes() == b"new"


def test_a_loaded_module_is_replaced_and_not_written_into(backend, tmp_path):
    module = tmp_path / "_kernels.so"
    module.write_bytes(b"new")
    target = backend.PACKAGE / module.name
    target.write_bytes(b"old")
    with target.open("rb") as mapped:
        backend.install_kernels(module)
        assert mapped.read() == b"old"
    assert target.read_bytes() == b"new"


def test_a_broken_cmake_shim_is_not_taken(backend, tools, monkeypatch):
    without_packages(monkeypatch, backend, "cmake", "ninja")
    tools("cmake", "echo \"ModuleNotFoundError: No module named 'cmake'\" >&2; exit 1")
    assert backend.find_cmake() is None
    assert {"cmake>=3.26", "ninja"} <= set(backend.get_requires_for_build_wheel())
    assert {"cmake>=3.26", "ninja"} <= set(backend.get_requires_for_build_editable())


def test_an_old_cmake_is_not_taken(backend, tools, monkeypatch):
    without_packages(monkeypatch, backend, "cmake", "ninja")
    tools("cmake", "echo cmake version 3.18.4")
    assert backend.find_cmake() is None


def test_a_cmake_that_works_is_taken(backend, tools, monkeypatch):
    without_packages(monkeypatch, backend, "cmake", "ninja")
    path = tools("cmake", "echo cmake version 3.31.2-dirty")
    assert backend.find_cmake() == str(path)
    assert "ninja" not in backend.get_requires_for_build_wheel()


def one_sentence(caught: pytest.ExceptionInfo[SystemExit]) -> str:
    message = str(caught.value)
    assert message.startswith("pagedcore: ")
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_missing_rust_is_one_sentence(backend, tools, monkeypatch):
    without_packages(monkeypatch, backend, "puccinialin")
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(SystemExit) as caught:
        backend.prepare_rust()
    assert "https://rustup.rs" in one_sentence(caught)


def test_rust_that_cannot_be_fetched_is_one_sentence(backend, tools, monkeypatch):
    class Puccinialin:
        @staticmethod
        def setup_rust() -> dict[str, str]:
            raise OSError("no network")

    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: "/nowhere")
    monkeypatch.setattr(backend.importlib, "import_module", lambda name: Puccinialin)
    with pytest.raises(SystemExit) as caught:
        backend.prepare_rust()
    assert "https://rustup.rs" in one_sentence(caught)
    assert "no network" in str(caught.value)


@pytest.mark.parametrize(("script", "found"), [("echo cargo 1.63.0", "is 1.63"), ("exit 1", "does not run")])
def test_unfit_rust_is_one_sentence(backend, tools, script, found):
    tools("cargo", script)
    with pytest.raises(SystemExit) as caught:
        backend.prepare_rust()
    assert found in one_sentence(caught)
    assert "https://rustup.rs" in str(caught.value)


def test_missing_compiler_is_one_sentence(backend, tools):
    with pytest.raises(SystemExit) as caught:
        backend.check_cpp()
    assert "apt install g++" in one_sentence(caught)


def test_missing_python_headers_are_one_sentence(backend, tools, monkeypatch):
    tools("g++", "exit 0")
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(SystemExit) as caught:
        backend.check_cpp()
    assert "-dev" in one_sentence(caught)


def test_missing_cmake_is_one_sentence(backend, tools, monkeypatch):
    without_packages(monkeypatch, backend, "cmake", "ninja")
    with pytest.raises(SystemExit) as caught:
        backend.build_kernels()
    assert "pip install cmake ninja" in one_sentence(caught)


def test_failing_tool_is_one_sentence(backend, tools):
    with pytest.raises(SystemExit) as caught:
        backend.run([sys.executable, "-c", "raise SystemExit(3)"], "do it")
    assert "could not do it (exit status 3" in one_sentence(caught)

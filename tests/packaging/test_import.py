"""`import pagedcore` is quick and brings in nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import time

HEAVY = ("torch", "transformers", "cupy", "tokenizers", "gguf", "safetensors")
RUNS = 5


def seconds(code: str) -> float:
    """Best of several runs of a fresh interpreter: the noise of a shared machine only ever adds."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_import_pulls_in_no_heavy_package():
    code = f"import pagedcore, sys; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"


def test_import_takes_less_than_three_tenths_of_a_second():
    assert seconds("import pagedcore") - seconds("pass") < 0.3

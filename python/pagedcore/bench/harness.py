"""What every suite needs: interleaved timing, the environment, results as a table and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pagedcore
from pagedcore import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    p10: float
    p90: float
    rounds: int


@dataclass(frozen=True)
class Result:
    """One figure. ``ratio`` is value over baseline_value; ``roofline`` the share of what the machine can do."""

    suite: str
    case: str
    metric: str
    value: float
    unit: str
    p10: float | None = None
    p90: float | None = None
    baseline: str | None = None
    baseline_value: float | None = None
    ratio: float | None = None
    roofline: float | None = None


def interleave(calls: Mapping[str, Callable[[], object]], *, seconds: float, rounds: int = 5) -> dict[str, Timing]:
    """Times the calls in turn, round after round, so that drift of the machine meets all of them alike.

    At least `rounds` rounds after one that warms up, then more until `seconds` have passed.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    begin = time.perf_counter()
    while min(len(times) for times in samples.values()) < rounds or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: _summary(times) for name, times in samples.items()}


def _summary(times: list[float]) -> Timing:
    times = sorted(times)

    def quantile(q: float) -> float:
        return times[min(len(times) - 1, int(q * len(times)))]

    return Timing(quantile(0.5), quantile(0.1), quantile(0.9), len(times))


def describe() -> dict[str, Any]:
    """Versions and machine: what a figure means nothing without."""
    machine = environment.describe()
    facts: dict[str, Any] = {
        "pagedcore": pagedcore.__version__,
        "commit": _commit(),
        "python": machine["python"],
        "platform": machine["platform"],
        "cpu": machine["cpu"]["model"],
        "cpus": machine["cpu"]["cores"],
        **machine["kernels"],
        **machine["environment"],
    }
    if "torch" in sys.modules:
        facts["torch"] = machine["versions"]["torch"]
    return facts


def _commit() -> str | None:
    """The commit of the source tree that the package runs from, if it does."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


class Session:
    """One run of one suite: collects results, prints them as they come."""

    def __init__(self, *, quick: bool, command: str) -> None:
        self.quick = quick
        self.command = command
        self.results: list[Result] = []

    def print_environment(self) -> None:
        """The header of the table."""
        self.note("  ".join(f"{name} {value}" for name, value in describe().items() if value is not None))

    def note(self, text: str) -> None:
        """A line between results."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def add(self, result: Result) -> None:
        """Records a figure and prints it."""
        self.results.append(result)
        spread = f" [{result.p10:.3g} – {result.p90:.3g}]" if result.p10 is not None and result.p90 is not None else ""
        line = f"{result.case:44} {result.metric:24} {result.value:9.3g} {result.unit}{spread}"
        if result.roofline is not None:
            line += f"  {result.roofline:.0%} of plain read"
        if result.ratio is not None:
            line += f"  {result.ratio:.2f}x {result.baseline}"
        self.note(line)

    def write_json(self, path: Path) -> None:
        """Schema 1: environment, command and results."""
        document = {
            "schema": 1,
            "environment": describe(),
            "command": self.command,
            "results": [asdict(result) for result in self.results],
        }
        path.write_text(json.dumps(document, indent=1) + "\n")

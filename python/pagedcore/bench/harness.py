"""What every suite needs: interleaved timing, the environment, results as a table and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pagedcore
from pagedcore import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: What a share of the roofline is a share of, where a result does not say it.
PLAIN_READ = "plain read"
#: Of the environment: what could not be recorded, so that its figure has the host's launches in it.
LAUNCHED = "launched_by_the_host"
_FASTER_IS_LESS = ("us", "ms", "s")


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    p10: float
    p90: float
    rounds: int

    def scaled(self, factor: float) -> Timing:
        """Of samples that are this many times as long."""
        return replace(self, median=self.median * factor, p10=self.p10 * factor, p90=self.p90 * factor)


@dataclass(frozen=True)
class Result:
    """One figure. ``ratio`` is how many times faster than the baseline it is (of a pair in turn: how many times as long
    as the two alone); ``roofline`` the share of what the machine can do, as it was measured in the same process.
    """

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


@dataclass(frozen=True)
class NotRun:
    """What was not measured, and why. ``case`` is empty where it holds for all of them."""

    case: str
    metric: str
    reason: str


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds that one call takes the host."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class CallFailed(Exception):  # noqa: N818
    """One of the calls that are timed in turn raised, which is this exception's cause."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    rounds: int = 5,
    clock: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[str, Timing]:
    """Times the calls in turn, round after round, so that drift of the machine meets all of them alike.

    At least `rounds` rounds after one that warms up, then more until `seconds` have passed. `clock` says how long one
    call took, and waits for it. Raises CallFailed for a call that raises.
    """

    def timed(name: str) -> float:
        try:
            return clock(calls[name])
        except Exception as error:
            raise CallFailed(name) from error

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name in calls:
        timed(name)
    begin = time.perf_counter()
    while min(len(times) for times in samples.values()) < rounds or time.perf_counter() - begin < seconds:
        for name, times in samples.items():
            times.append(timed(name))
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

    def __init__(
        self,
        *,
        quick: bool,
        command: str,
        device: str = "cpu",
        rehearse: bool = False,
        seconds: float | None = None,
        without: Sequence[str] = (),
        json_path: Path | None = None,
    ) -> None:
        self.quick = quick
        self.command = command
        #: What is measured: "cpu" or "cuda".
        self.device = device
        #: The suite of a GPU, on the CPU with tiny cases: whether it runs, not how fast.
        self.rehearse = rehearse
        #: Peers that must not be called.
        self.without = frozenset(without)
        #: More of the environment, as a suite finds it out.
        self.facts: dict[str, Any] = {}
        self.results: list[Result] = []
        self.not_run: list[NotRun] = []
        #: Cases that need not be run again.
        self.done: list[str] = []
        #: What gave a wrong result. The run goes on, and its exit status tells.
        self.failures: list[str] = []
        #: What made the device unusable for this process, which ended the run.
        self.broken: str | None = None
        self._json_path = json_path
        self._machine: dict[str, Any] | None = None
        self._end = None if seconds is None else time.monotonic() + seconds

    def time_left(self) -> float:
        """Seconds until no case may be begun any more; infinite without a limit."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def print_environment(self) -> None:
        """The header of the table."""
        self.note("  ".join(f"{name} {value}" for name, value in self._environment().items() if value is not None))

    def note(self, text: str) -> None:
        """A line between results."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def add(self, result: Result, *, of: str = PLAIN_READ) -> None:
        """Records a figure and prints it; `of` is what its share of the roofline is a share of."""
        self.results.append(result)
        spread = f" [{result.p10:.3g} – {result.p90:.3g}]" if result.p10 is not None and result.p90 is not None else ""
        line = f"{result.case:44} {result.metric:24} {result.value:9.3g} {result.unit}{spread}"
        if result.roofline is not None:
            line += f"  {result.roofline:.0%} of {of}"
        if result.ratio is not None:
            line += f"  {result.ratio:.2f}x {result.baseline}"
        self.note(line)

    def skip(self, case: str, metric: str, reason: str) -> None:
        """Records that something is not measured, and prints it."""
        self.not_run.append(NotRun(case, metric, reason))
        self.note(f"{case or 'all cases':44} {metric:24} not run: {reason}")

    def fail(self, case: str, metric: str, reason: str) -> None:
        """Records a wrong result of ours."""
        self.failures.append(f"{case}: {metric}: {reason}")
        self.skip(case, metric, reason)

    def finish(self, case: str) -> None:
        """A case is through: what was found until now is on disk, whatever happens next."""
        if case not in self.done:
            self.done.append(case)
        self.write_json()

    def resume(self, path: Path) -> None:
        """Goes on from what an earlier run of the same command wrote."""
        document = json.loads(path.read_text())
        self.results += [Result(**fields) for fields in document["results"]]
        self.not_run += [NotRun(**fields) for fields in document["not_run"]]
        self.done += document["done"]
        self.failures += document["failures"]
        if launched := document["environment"].get(LAUNCHED):
            self.facts[LAUNCHED] = launched

    def write_json(self) -> None:
        """Schema 1: environment, command and results; where there is a file to write it to."""
        if self._json_path is None:
            return
        document = {
            "schema": 1,
            "environment": self._environment(),
            "command": self.command,
            "results": [asdict(result) for result in self.results],
            "not_run": [asdict(entry) for entry in self.not_run],
            "done": self.done,
            "failures": self.failures,
            "broken": self.broken,
        }
        self._json_path.write_text(json.dumps(document, indent=1) + "\n")

    def _environment(self) -> dict[str, Any]:
        if self._machine is None:
            self._machine = describe()
        return {**self._machine, "device": self.device, **self.facts}


def table(results: Sequence[Result], not_run: Sequence[NotRun], most: int | None = None) -> list[str]:
    """A line for each case, `most` of them at most: the figure that stands first in it, and how many times faster it is
    than the others. Then what did not run, a line for each reason.
    """
    cases: dict[str, list[Result]] = {}
    for result in results:
        cases.setdefault(result.case, []).append(result)
    lines = []
    for case, (first, *others) in cases.items():
        share = "" if first.roofline is None else f"{first.roofline:5.0%}"
        line = f"{case:46} {first.value:9.4g} {first.unit:7} {share:5}"
        ratios = (f" {other.metric} {speed_ratio(first, other):.2f}x" for other in others)
        lines.append(" ".join([line, *ratios]).rstrip())
    if most is not None and len(lines) > most:
        lines[most:] = [f"and {len(lines) - most} cases more, in the JSON"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in not_run:
        reasons.setdefault((entry.metric, entry.reason), []).append(entry.case)
    for (metric, reason), where in reasons.items():
        count = f" ({len(where)} cases)" if len(where) > 1 else f" ({where[0]})" if where[0] else ""
        lines.append(f"not run: {metric}: {reason}{count}")
    return lines


def speed_ratio(ours: Result, theirs: Result) -> float:
    """How many times faster the first is, of two figures in one unit."""
    return theirs.value / ours.value if ours.unit in _FASTER_IS_LESS else ours.value / theirs.value

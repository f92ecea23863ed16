"""What is measured on, and one comparison: contenders that are checked, then timed in turn."""

from __future__ import annotations

import importlib.metadata
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pagedcore.bench.harness import LAUNCHED, CallFailed, Result, Timing
from pagedcore.bench.peers import CannotRun, brief
from pagedcore.bench.timing import Clock, DeviceClock, HostClock, Sample, time_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pagedcore.bench.harness import Session

SUITE = "attention"
COPY, PRODUCT = "copy", "product"
_UNITS = {"GB/s": (1e9, COPY), "TFLOP/s": (1e12, PRODUCT)}  # units of a rate in bytes or operations, and its yardstick
_LEAST_SECONDS = 5.0  # that must be left for a case to be begun
_LEAST_CALL = 1e-6  # seconds that a launch takes, however little it does
_VERSIONS_TOLD = ("flashinfer-python", "fa3-fwd", "triton")


class ContextBroken(Exception):  # noqa: N818
    """A call left the device unusable for this process: everything after it would fail."""


@dataclass
class Machine:
    """What is measured on, and its yardsticks: bytes a second read and written, and floating-point operations."""

    device: torch.device
    clock: Clock
    memory: int  # bytes that were free at first
    l2: int  # bytes of its cache
    copy_rate: float = 1e9
    product_rate: float = 1e9

    @property
    def on_gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return bool(self.device.type == "cuda")

    @property
    def reserve(self) -> int:
        """Bytes to be left for workspaces, graphs and the oracle."""
        return min(8 << 30, self.memory // 8)

    def room(self) -> int:
        """Bytes for the tensors of a case: others, that compile, take some too."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.on_gpu else self.memory
        return int(free) - self.reserve

    def settle(self) -> None:
        """Waits for the device, and gives it back what memory is not used. Raises what went wrong there."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def find_machine(session: Session) -> Machine:
    """The current GPU, which becomes part of the results' environment; in a rehearsal the CPU, with little memory."""
    session.facts["rehearsal"] = session.rehearse
    if session.rehearse:
        session.note("a rehearsal on the CPU: that it runs is what counts, its figures mean nothing")
        return Machine(torch.device("cpu"), HostClock(), 64 << 20, 32 << 10)
    device = torch.device("cuda", torch.cuda.current_device())
    facts = torch.cuda.get_device_properties(device)
    session.facts |= {
        "gpu": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "l2_bytes": facts.L2_cache_size,
        "memory_bytes": facts.total_memory,
        "cuda": torch.version.cuda,
    }
    for name in _VERSIONS_TOLD:
        with suppress(importlib.metadata.PackageNotFoundError):
            session.facts[name] = importlib.metadata.version(name)
    return Machine(device, DeviceClock(device), torch.cuda.mem_get_info(device)[0], facts.L2_cache_size)


@dataclass(frozen=True)
class Contender:
    """One of those that do the same work.

    ``prepare`` returns what is timed, a call on buffer i, after it was found right; raises CannotRun where it cannot
    be. ``work`` is bytes, or floating-point operations for TFLOP/s, of one call. ``own``: a failure is one of the run.
    """

    prepare: Callable[[], Callable[[int], object]]
    work: float
    buffers: int = 1
    own: bool = False


class Bench:
    """Runs comparisons on a machine for a session."""

    def __init__(self, session: Session, machine: Machine) -> None:
        self.session = session
        self.machine = machine

    def may_begin(self, case: str) -> bool:
        """Whether a case is new and there is time for it."""
        if case in self.session.done:
            return False
        if self.session.time_left() < _LEAST_SECONDS:
            self.session.skip(case, "all", "the time was up")
            return False
        return True

    def guarded(self, case: str, metric: str, work: Callable[[], Any], *, own: bool = False) -> Any:
        """What `work` returns; None where it fails, which is then recorded.

        Raises ContextBroken where the device cannot be used any more.
        """
        result = None
        try:
            result = work()
            if self.machine.on_gpu:
                torch.cuda.synchronize()  # what went wrong on the device is raised here
        except ContextBroken:  # a comparison within has told whose fault it is
            self.session.finish(case)
            raise
        except Exception as error:  # noqa: BLE001  # another library's, or the device's
            self._blame(case, metric, error, own=own)
            result = None
        self._settle(case, metric)
        return result

    def _blame(self, case: str, metric: str, error: BaseException, *, own: bool) -> None:
        """Records why a metric of a case has no figure."""
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            self.session.skip(case, metric, "out of memory")
        else:
            reason = str(error) if isinstance(error, CannotRun) else brief(error)
            (self.session.fail if own else self.session.skip)(case, metric, reason)

    def _settle(self, case: str, metric: str) -> None:
        """After a metric's turn: raises ContextBroken, saying whose fault it is, if the device can be used no more."""
        try:
            self.machine.settle()
        except RuntimeError as error:
            self.session.broken = metric
            self.session.finish(case)
            raise ContextBroken(f"{metric} in {case}: {brief(error)}") from error

    def compare(
        self, case: str, contenders: Mapping[str, Contender], unit: str, rivals: Mapping[str, Sequence[str]]
    ) -> None:
        """Prepares all, times those that could be, in turn, and records a figure of each.

        The first is the subject: without it the others are not timed. A metric's baseline is the fastest of its
        `rivals` that ran.
        """
        samples: dict[str, Sample] = {}
        for metric, contender in contenders.items():
            sample = self.guarded(case, metric, partial(self._sample, contender, unit), own=contender.own)
            if sample is None and not samples:
                return
            if sample is not None:
                samples[metric] = sample
                if self.machine.on_gpu and not sample.recorded:
                    self.session.note(f"{case:44} {metric:24} cannot be recorded: the host launches it")
                    self.session.facts.setdefault(LAUNCHED, []).append(f"{case}: {metric}")
        times = self._time(case, contenders, samples)
        for metric, timing in times.items():
            others = [name for name in rivals.get(metric, ()) if name in times and name != metric]
            best = min(others, key=lambda name: times[name].median, default=None)
            baseline = None if best is None else (best, times[best], contenders[best].work)
            self.add(case, metric, timing, contenders[metric].work, unit, baseline)

    def _time(self, case: str, contenders: Mapping[str, Contender], samples: dict[str, Sample]) -> Mapping[str, Timing]:
        """Times of all samples, taken in turn. One that fails meanwhile is named with its reason, and the others are
        timed anew without it; without the subject none.
        """
        subject = next(iter(contenders))
        while subject in samples:
            seconds = 0.1 * len(samples) if self.machine.on_gpu else 0.0
            try:
                return time_samples(self.machine.clock, samples, seconds=seconds)
            except CallFailed as failed:
                del samples[failed.name]
                self._blame(case, failed.name, failed.__cause__ or failed, own=contenders[failed.name].own)
                self._settle(case, failed.name)
        return {}

    def _sample(self, contender: Contender, unit: str) -> Sample:
        rate = self.machine.product_rate if unit == "TFLOP/s" else self.machine.copy_rate
        estimate = max(contender.work / rate, _LEAST_CALL)
        return self.machine.clock.sample(contender.prepare(), contender.buffers, estimate)

    def add(
        self,
        case: str,
        metric: str,
        timing: Timing,
        work: float,
        unit: str,
        baseline: tuple[str, Timing, float] | None = None,
    ) -> None:
        """Records a figure: microseconds, or a rate, with its share of the yardstick. Baseline: name, times, work."""
        if unit == "us":
            value, p10, p90 = (seconds * 1e6 for seconds in (timing.median, timing.p10, timing.p90))
            share, of = work / timing.median / self.machine.copy_rate or None, COPY
        else:
            size, of = _UNITS[unit]
            value, p10, p90 = (work / size / seconds for seconds in (timing.median, timing.p90, timing.p10))
            share = value * size / (self.machine.copy_rate if of == COPY else self.machine.product_rate)
        name = base = ratio = None
        if self.session.rehearse:
            share = None  # of what a yardstick of tiny cases says
        if baseline is not None:
            name, other, their_work = baseline
            base = other.median * 1e6 if unit == "us" else their_work / size / other.median
            ratio = other.median / timing.median
        self.session.add(Result(SUITE, case, metric, value, unit, p10, p90, name, base, ratio, share), of=of)

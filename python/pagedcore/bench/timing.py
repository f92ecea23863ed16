"""Clocks: how long a call takes a device, apart from what it takes the host to launch it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pagedcore.bench.harness import Timing, interleave, wall_clock
from pagedcore.graphs import CudaRecorder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SAMPLE_SECONDS = 4e-4  # at least: what a sample costs beside its calls is then a percent of it
_MOST_CALLS = 4096


@dataclass(frozen=True)
class Sample:
    """What is timed at once: `run` makes `calls` calls. ``recorded``: the device repeats them without the host; the
    recording knows addresses alone, so ``call`` keeps alive what lies there.
    """

    run: Callable[[], object]
    calls: int
    recorded: bool
    call: Callable[[int], object]


class Clock(Protocol):
    """Times calls on a device."""

    def sample(self, call: Callable[[int], object], buffers: int, estimate: float) -> Sample:
        """Calls on each buffer in turn. `estimate` is the least number of seconds that one can take."""

    def seconds(self, run: Callable[[], object]) -> float:
        """How long `run` takes."""


def calls_of_sample(buffers: int, estimate: float) -> int:
    """Calls in a sample: each buffer as often as the others, and long enough."""
    turns = math.ceil(_SAMPLE_SECONDS / (estimate * buffers)) if estimate > 0 else 1
    return buffers * max(1, min(turns, _MOST_CALLS // buffers))


class HostClock:
    """For the CPU: calls take as long as they take."""

    def sample(self, call: Callable[[int], object], buffers: int, estimate: float) -> Sample:  # noqa: ARG002
        """See `Clock`. One call a buffer."""
        return Sample(lambda: [call(i) for i in range(buffers)], buffers, recorded=False, call=call)

    def seconds(self, run: Callable[[], object]) -> float:
        """See `Clock`."""
        return wall_clock(run)


class DeviceClock:
    """For a GPU: the calls of a sample are recorded as a CUDA graph, and events before and after its replay are read.

    What cannot be recorded is launched by the host, and the sample says so.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def sample(self, call: Callable[[int], object], buffers: int, estimate: float) -> Sample:
        """See `Clock`."""
        calls = calls_of_sample(buffers, estimate)

        def several() -> Any:
            for i in range(calls):
                result = call(i % buffers)
            return result

        try:
            replay, _ = CudaRecorder(self._device).record(several)
        except RuntimeError:  # torch's type for whatever cannot be recorded
            torch.cuda.synchronize()
            return Sample(several, calls, recorded=False, call=call)
        return Sample(replay, calls, recorded=True, call=call)

    def seconds(self, run: Callable[[], object]) -> float:
        """See `Clock`."""
        begin, end = self._events
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def time_samples(clock: Clock, samples: Mapping[str, Sample], *, seconds: float, rounds: int = 7) -> dict[str, Timing]:
    """Seconds of one call of each, taken in turn."""
    times = interleave(
        {name: sample.run for name, sample in samples.items()}, seconds=seconds, rounds=rounds, clock=clock.seconds
    )
    return {name: timing.scaled(1 / samples[name].calls) for name, timing in times.items()}

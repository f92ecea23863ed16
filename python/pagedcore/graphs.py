"""Decode steps recorded once and replayed: a step of one token a sequence launches thousands of small kernels, which
takes the host longer than the device needs to run them.

A recording has one number of sequences, so there is one for each of some sizes, and a step runs in the smallest that
holds it, filled up by empty sequences. Which models can be recorded is found by trying: a pass that reads a value
back from the device (rotary embeddings that depend on lengths, experts chosen on the host) cannot, and runs as it is.
"""

from __future__ import annotations

import logging
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from pagedcore._core import StepPlan
    from pagedcore.staging import DeviceStaging, StepTensors

logger = logging.getLogger(__name__)

# Graphs that torch could not end: its allocator for pinned memory still asks them which streams are theirs.
_unended: list[torch.cuda.CUDAGraph] = []

# Torch records one graph at a time in a process, whatever the thread and the device.
_recording = threading.Lock()

Forward = Callable[["StepTensors"], torch.Tensor]


class Recorder(Protocol):
    """What can record device work."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Runs ``work`` and returns a function that repeats what it did on the device, and its result, which each
        repetition overwrites. Raises what ``work`` raises, and RuntimeError for work that cannot be recorded.
        """


class CudaRecorder:
    """CUDA graphs, which share one memory pool: no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Torch's own stream for it would be one of the device on which this process first recorded anything. One for
        # all recordings, as the allocator keeps what each stream has freed for that stream.
        self._side = torch.cuda.Stream(device)

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """See `Recorder`. The work runs once as it is first, so that libraries are loaded and buffers there."""
        handled = sys.exception()
        with _recording, torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                work()
            current.wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may use the device meanwhile: only this one must not do what cannot be recorded.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                    result = work()
            except BaseException as error:
                self._end(graph)
                # Where CUDA refuses to end what was interrupted, torch raises that in its place.
                for earlier in _what_led_to(error, handled):
                    if not isinstance(earlier, Exception):
                        raise earlier  # noqa: B904  # it came first
                raise
            finally:
                torch.cuda.set_stream(current)  # some versions of torch leave their own where a recording fails
        return graph.replay, result

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """What torch before 2.12 leaves undone where CUDA refuses to end a recording, which it does once something in
        it waited for the device: its allocator takes the recording to be under way for good, and could free no memory
        again; and its generator refuses to draw numbers.
        """
        device = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(device, self._pool)  # noqa: SLF001
        except RuntimeError:
            return  # torch has ended it
        torch._C._cuda_releasePool(device, self._pool)  # noqa: SLF001
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())  # a copy is not recording
        _unended.append(graph)


@dataclass(frozen=True, eq=False)
class Recording:
    """A decode step of ``batch`` sequences."""

    batch: int
    replay: Callable[[], None]
    logits: torch.Tensor  # [batch, vocab], of the last replay


class DecodeGraphs:
    """The recordings of one model."""

    def __init__(self, staging: DeviceStaging, forward: Forward, recorder: Recorder, max_num_seqs: int) -> None:
        #: Sequences of each recording, ascending; empty for a model that cannot be recorded.
        self.sizes: list[int] = []
        self._recordings: list[Recording] = []
        handled = sys.exception()
        for batch in reversed(batch_sizes(max_num_seqs)):  # the largest first: the others fit its memory
            tensors = staging.decode_tensors(batch)
            try:
                replay, logits = recorder.record(partial(forward, tensors))
            except RuntimeError as error:  # torch's type for whatever CUDA refuses
                logger.warning("decode steps run without CUDA graphs: %s", _reason(error, handled))
                self._recordings.clear()
                return
            self._recordings.insert(0, Recording(batch, replay, logits))
        self.sizes = [recording.batch for recording in self._recordings]

    def recording_for(self, plan: StepPlan) -> Recording | None:
        """The one to run a plan in: None if a sequence of it has more tokens or samples than one, or if it is larger
        than all of them.
        """
        if plan.num_tokens != plan.num_seqs or len(plan.logits_indices) != plan.num_seqs:
            return None
        at = bisect_left(self.sizes, plan.num_seqs)
        return self._recordings[at] if at < len(self._recordings) else None


def _reason(error: BaseException, handled: BaseException | None = None) -> str:
    """A line: what went wrong first, after what was being handled already. What ends the recording fails for that."""
    *_, first = _what_led_to(error, handled)
    return str(first).partition("\n")[0]


def _what_led_to(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it was raised in the handling of, the latest first, up to what was being handled
    already.
    """
    while True:
        yield error
        earlier = error.__context__
        if earlier is None or earlier is handled or error.__suppress_context__:
            return
        error = earlier


def batch_sizes(most: int) -> list[int]:
    """Numbers of sequences worth a recording, up to ``most``: with few sequences each one counts, with many a quarter
    of them does not.
    """
    sizes = [1, 2, 4]
    while sizes[-1] < most:
        last = sizes[-1]
        sizes.append(last + (4 if last < 8 else max(8, last // 64 * 16)))
    return sorted({min(size, most) for size in sizes})

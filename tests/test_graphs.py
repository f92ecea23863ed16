"""What a recording leaves behind where it fails, with a stand-in for torch's side of it: no GPU is here. On one,
tests/device/test_device.py does the same with torch itself.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from pagedcore import graphs

if TYPE_CHECKING:
    from collections.abc import Iterator

POOL = (0, 1)


class Generator:
    """A generator that takes part in a recording until it is told that it ended."""

    def __init__(self) -> None:
        self.recording = False

    def clone_state(self) -> Generator:
        return Generator()

    def graphsafe_set_state(self, other: Generator) -> None:
        self.recording = other.recording


class Torch:
    """As much of torch as records, in the state that it keeps. ``tidy``: as from 2.12 on, the allocator is told of the
    end even where CUDA refuses it.
    """

    def __init__(self, *, tidy: bool) -> None:
        self.tidy = tidy
        self.underway: list[tuple[int, int]] = []
        self.streams: list[str] = []  # the devices of those that recordings were made on
        self.pool_users = 0
        self.stream = "the caller's"
        self.refuses = False  # the recording was invalidated
        self.generator = Generator()
        self._C = SimpleNamespace(_cuda_endAllocateToPool=self.end_allocating, _cuda_releasePool=self.release)
        self.cuda = SimpleNamespace(
            graph_pool_handle=lambda: POOL,
            device=lambda device: nullcontext(),
            current_device=lambda: 0,
            default_generators=[self.generator],
            Stream=lambda device: SimpleNamespace(device=device, wait_stream=lambda other: None),
            stream=lambda stream: nullcontext(),
            current_stream=lambda: SimpleNamespace(name=self.stream, wait_stream=lambda other: None),
            set_stream=lambda stream: setattr(self, "stream", stream.name),
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
            graph=self.graph,
        )

    def end_allocating(self, device: int, pool: tuple[int, int]) -> None:
        assert device == 0
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device: int, pool: tuple[int, int]) -> None:
        assert (device, pool) == (0, POOL)
        assert self.pool_users > 0
        self.pool_users -= 1

    @contextmanager
    def graph(self, graph: Any, *, pool: tuple[int, int], stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert not self.underway, "captures_underway.empty() INTERNAL ASSERT FAILED"
        assert not self.generator.recording
        assert capture_error_mode == "thread_local"
        self.underway.append(pool)
        self.streams.append(stream.device)
        self.pool_users += 1
        self.stream, self.generator.recording = "the recording's", True
        try:
            yield
        finally:
            if self.refuses:
                if self.tidy:
                    self.underway.remove(pool)
                    self.pool_users -= 1
                    self.generator.recording = False
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.underway.remove(pool)
            self.stream, self.generator.recording = "the caller's", False


@pytest.fixture(params=[False, True], ids=["torch 2.11", "torch 2.12"])
def torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Torch:
    fake = Torch(tidy=request.param)
    monkeypatch.setattr(graphs, "torch", fake)
    monkeypatch.setattr(graphs, "_unended", [])
    return fake


def test_after_a_recording_that_cuda_refuses_to_end_the_next_one_works(torch: Torch) -> None:
    runs: list[int] = []

    def waits() -> Any:
        runs.append(1)
        if len(runs) > 1:  # the first is no recording
            torch.refuses = True
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    recorder = graphs.CudaRecorder("cuda")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="previous error during capture") as caught:
        recorder.record(waits)
    assert graphs._reason(caught.value) == "operation not permitted when stream is capturing"
    assert (torch.underway, torch.pool_users) == ([], 0)
    assert torch.stream == "the caller's"
    assert not torch.generator.recording
    # torch's allocator of pinned memory has kept a way to the graph, where nobody told it of the end.
    assert len(graphs._unended) == (not torch.tidy)

    torch.refuses = False
    _, result = recorder.record(lambda: 42)  # type: ignore[arg-type, return-value]
    assert result == 42
    assert (torch.underway, torch.pool_users) == ([], 1)


def test_the_warning_gives_the_reason_of_the_recording(caplog: pytest.LogCaptureFixture) -> None:
    """And not what was being handled where an engine was made."""

    class Refusing:
        def record(self, work: Any) -> Any:
            raise RuntimeError("no stream can record that\nand more")

    staging: Any = SimpleNamespace(decode_tensors=lambda batch: None)
    with caplog.at_level("WARNING", logger="pagedcore"):
        try:
            int("another engine")
        except ValueError:
            recorded = graphs.DecodeGraphs(staging, lambda tensors: None, Refusing(), 2)  # type: ignore[arg-type, return-value]
    assert caplog.messages == ["decode steps run without CUDA graphs: no stream can record that"]
    assert recorded.sizes == []


def test_an_error_of_the_work_itself_leaves_an_ended_recording_to_torch(torch: Torch) -> None:
    runs: list[int] = []

    def fails() -> Any:
        runs.append(1)
        if len(runs) > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        graphs.CudaRecorder("cuda").record(fails)  # type: ignore[arg-type]
    assert torch.pool_users == 1  # the graph's, which gives it back when it goes
    assert torch.stream == "the caller's"
    assert graphs._unended == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_one_where_cuda_refuses_to_end_the_recording(torch: Torch, kind: type[BaseException]) -> None:
    """And no reason for decode steps without graphs, which torch's RuntimeError in its place would be."""
    runs: list[int] = []

    def interrupted(tensors: Any) -> Any:
        runs.append(1)
        if len(runs) > 1:
            torch.refuses = True
            raise kind

    staging: Any = SimpleNamespace(decode_tensors=lambda batch: None)
    recorder = graphs.CudaRecorder("cuda")  # type: ignore[arg-type]
    with pytest.raises(kind):
        graphs.DecodeGraphs(staging, interrupted, recorder, 2)
    assert (torch.underway, torch.pool_users) == ([], 0)
    assert torch.stream == "the caller's"
    assert not torch.generator.recording

    torch.refuses = False
    assert recorder.record(lambda: 42)[1] == 42  # type: ignore[arg-type, return-value]


def test_an_interrupt_of_before_is_not_the_recordings(torch: Torch) -> None:
    """One that is being handled where a recording fails."""
    runs: list[int] = []

    def waits() -> Any:
        runs.append(1)
        if len(runs) > 1:
            torch.refuses = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def interrupted() -> None:
        raise KeyboardInterrupt

    try:
        interrupted()
    except KeyboardInterrupt:
        with pytest.raises(RuntimeError, match="previous error during capture"):
            graphs.CudaRecorder("cuda").record(waits)  # type: ignore[arg-type]


def test_each_device_has_its_own_stream_to_record_on(torch: Torch) -> None:
    """Torch's own is of the device on which anything was recorded first: work for another would not be recorded."""
    for device in ("cuda:0", "cuda:1"):
        graphs.CudaRecorder(device).record(lambda: 42)  # type: ignore[arg-type, return-value]
    assert torch.streams == ["cuda:0", "cuda:1"]


def test_engines_made_in_two_threads_record_one_after_the_other(torch: Torch) -> None:
    """Torch can record one graph at a time: the stand-in fails where a second one begins within the first."""
    first, second = (graphs.CudaRecorder("cuda") for _ in range(2))  # type: ignore[arg-type]
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(second.record(lambda: 43)[1]))  # type: ignore[arg-type, return-value]

    def work() -> Any:
        if torch.underway:
            thread.start()
            thread.join(0.2)
            assert results == []
        return 42

    first.record(work)
    thread.join()
    assert results == [43]

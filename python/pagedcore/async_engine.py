"""The engine behind an event loop: one thread steps, any number of tasks wait for their answers.

    async with AsyncEngine("path/to/model") as engine:
        async for output in engine.generate("Once upon a time", SamplingParams(max_tokens=50)):
            print(output.outputs[0].new_text, end="")

The thread owns the engine: nobody else touches it. Tasks hand it calls (add, abort) through a queue that it empties
between two steps, and get outputs back through `asyncio` queues of their own; a step costs one call into the loop.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import logging
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pagedcore.checks import check_request_id
from pagedcore.engine import Engine
from pagedcore.errors import ClosedError, ForkedProcessError
from pagedcore.models import LoadedModel
from pagedcore.outputs import EngineStats, RequestOutput

if TYPE_CHECKING:
    from pagedcore.engine import Prompt
    from pagedcore.params import SamplingParams

T = TypeVar("T")

logger = logging.getLogger(__name__)


class AsyncEngine:
    """Answers requests of an event loop's tasks with one `Engine`, whose arguments it takes.

    The model is loaded when it is made, which takes seconds and blocks: make it before the loop has other work, or
    with ``await asyncio.to_thread(AsyncEngine, ...)``. Its methods belong to one event loop, the one that is running
    when they are first used. Use as an async context manager, or await `close`.

    A child of ``os.fork()`` has a copy without the thread: every call there but `close` raises ForkedProcessError.
    """

    def __init__(self, model: str | os.PathLike[str] | LoadedModel, **options: Any) -> None:
        self._engine = Engine(model, **options)
        ids = map("async-{}".format, itertools.count())
        self._free_ids = itertools.filterfalse(self._engine.in_use, ids)  # an id may be the choice of a caller
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: close
        self._streams: dict[str, _Stream] = {}  # the thread's
        self._closed = False
        self._process = os.getpid()
        self._lock = threading.Lock()  # around `_closed` and the end of `_calls`: no call is queued that nobody makes
        self._thread = threading.Thread(target=self._run, name="pagedcore-engine", daemon=True)
        self._thread.start()
        atexit.register(self._stop)  # the interpreter must not go away under a thread that computes

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Yields the request's state whenever it has got tokens; the last output has ``finished`` set.

        A consumer that is slower than the engine gets what has come meanwhile one output after another, none lost.
        The request is aborted if the generator is closed, or the task that waits for it cancelled. Raises as
        `Engine.add_request` does, and ClosedError if the engine is closed before the answer is complete.

        Without a ``request_id`` it gets one that is free. A prompt that is text is tokenised between two steps, as
        tokenizers are not made for two threads at a time; where that takes too long, give token ids.
        """
        if request_id is not None:
            check_request_id(request_id)
        stream = _Stream(asyncio.get_running_loop())

        def add() -> None:
            name = next(self._free_ids) if request_id is None else request_id
            self._engine.add_request(name, prompt, params, priority=priority, tenant=tenant, cache_salt=cache_salt)
            stream.request_id = name
            self._streams[name] = stream

        added = self._submit(add)
        try:
            await added
            while True:
                self._check_process()  # else a child would wait for what only the parent's thread computes
                output = await stream.outputs.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.finished:
                    return
        finally:
            self._calls.put(lambda: self._drop(stream))  # without waiting: a generator that is being closed cannot

    async def abort(self, request_id: str) -> None:
        """Ends a request; whoever iterates over it gets its final output. Raises UnknownRequestError."""

        def abort() -> None:
            output = self._engine.abort(request_id)
            self._tell([output])

        await self._submit(abort)

    async def stats(self) -> EngineStats:
        """Counters and gauges, as `Engine.stats` gives them, between two steps."""
        return await self._submit(self._engine.stats)

    async def close(self) -> None:
        """Ends the thread after the step it is in, and drops unfinished requests, whose consumers get ClosedError.
        Idempotent.
        """
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        if os.getpid() != self._process:
            return  # the thread is the parent's, and the lock may have been held when the child was made
        with self._lock:
            if not self._closed:
                self._closed = True
                self._calls.put(None)
        self._thread.join()
        atexit.unregister(self._stop)

    async def __aenter__(self) -> Self:
        self._check_process()
        if self._closed:
            raise ClosedError("this engine is closed")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _submit(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Has the thread call ``function`` between two steps; what is returned becomes its result or its exception."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return  # who asked has gone
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001  # it is raised where the call was made; a panic is no Exception
                future.set_exception(error)

        self._check_process()
        with self._lock:
            if self._closed or not self._thread.is_alive():
                raise ClosedError("this engine is closed")
            self._calls.put(call)
        return asyncio.wrap_future(future)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ForkedProcessError(
                "this engine's thread belongs to the parent of a forked process",
                hint="create it in the process that uses it, or start processes with the 'spawn' method",
            )

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        failure: Exception = ClosedError("this engine was closed")
        try:
            while self._serve_calls():
                if self._engine.has_unfinished:
                    self._tell(self._engine.step())
        except BaseException as error:  # the engine is broken: those who wait must know
            logger.exception("the engine's thread has ended")
            if isinstance(error, Exception):
                failure = error
            else:  # a panic of compiled code: no task expects one from somebody else's request
                failure = ClosedError(f"this engine has broken down: {error!r}")
                failure.__cause__ = error
        with self._lock:
            self._closed = True
        self._engine.close()
        with contextlib.suppress(queue.Empty):
            while True:  # calls that came too late: the engine they reach is closed, and says so
                call = self._calls.get_nowait()
                if call is not None:
                    call()
        _hand_over([(stream, failure) for stream in self._streams.values()])
        self._streams.clear()

    def _serve_calls(self) -> bool:
        """Makes the calls that wait; with nothing to compute, waits for one. False: the engine is to be closed."""
        wait = not self._engine.has_unfinished
        with contextlib.suppress(queue.Empty):
            while True:
                call = self._calls.get(block=wait)
                if call is None:
                    return False
                call()
                wait = False
        return True

    def _tell(self, outputs: list[RequestOutput]) -> None:
        """Hands outputs to those who wait for them; a stream ends with its last one."""
        streams = self._streams
        wanted = [(streams[output.request_id], output) for output in outputs if output.request_id in streams]
        for _, output in wanted:
            if output.finished:
                del streams[output.request_id]
        for stream in _hand_over(wanted):
            self._drop(stream)

    def _drop(self, stream: _Stream) -> None:
        """Ends the request of a stream that nobody reads any more."""
        if self._streams.get(stream.request_id) is stream:  # else it has ended, and the id may be somebody else's
            del self._streams[stream.request_id]
            self._engine.discard(stream.request_id)


class _Stream:
    """The outputs of one request on their way from the thread to its consumer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.request_id = ""  # once it is added
        self.outputs: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()


def _hand_over(items: Sequence[tuple[_Stream, RequestOutput | Exception]]) -> list[_Stream]:
    """Puts every item into its stream, by one call for each event loop. Returns the streams of loops that are closed,
    where nobody waits any more.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput | Exception]]] = {}
    for stream, item in items:
        by_loop.setdefault(stream.loop, []).append((stream, item))
    lost: list[_Stream] = []
    for loop, some in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, some)
        except RuntimeError:
            lost += [stream for stream, _ in some]
    return lost


def _put_all(items: Sequence[tuple[_Stream, RequestOutput | Exception]]) -> None:
    for stream, item in items:
        stream.outputs.put_nowait(item)

"""Several threads at once, and who runs while a call does."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

THREADS = 8


def in_threads(work: Callable[[int], None]) -> None:
    """Runs `work` in several threads that start at once; fails on an exception, or if they stand still."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(THREADS)

    def run(index: int) -> None:
        try:
            barrier.wait()
            work(index)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread stands still"
    if failures:
        raise failures[0]


def gives_way(call: Callable[[], object]) -> bool:
    """Whether another Python thread, which waits, runs while the call does: no thread is made to give way meanwhile."""
    ready, start, ran = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        ready.set()
        start.wait()
        ran.set()

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait()
    time.sleep(0.02)  # until it waits
    before = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    try:
        start.set()
        call()
        return ran.is_set()
    finally:
        sys.setswitchinterval(before)
        thread.join()


def gives_way_at_last(prepare: Callable[[], Callable[[], object]]) -> bool:
    """Whether one of many calls, each prepared anew, gives way.

    The other thread has the length of the call to wake up in, and a busy machine may take longer, many times over.
    """
    return any(gives_way(prepare()) for _ in range(50))

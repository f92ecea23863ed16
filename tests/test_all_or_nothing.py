"""A call that raises has changed nothing, also where what fails is not the core: its result's array, or memory."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from pagedcore import KVCacheManager
from pagedcore.errors import ClosedError


def in_process(code: str) -> None:
    """Runs code in a process of its own, which has to end well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


#: A manager in which each call that changes something and returns an array has something to return.
WORLD = """
from pagedcore import *

manager = KVCacheManager(64, 4)
pool, cache = manager.pool, manager.cache
parent = manager.add(range(14), tenant="a")
manager.allocate_slots(parent, 14)
manager.commit(parent, 14)
(child,) = manager.fork(parent)
manager.allocate_slots(child, 1)  # a copy
other = manager.add(range(4), tenant="b")
manager.allocate_slots(other, 4)
manager.free(other)
other = manager.add(range(4), tenant="c")
manager.allocate_slots(other, 4)  # into a block of b's: to be zeroed
ns = cache.namespace("a")
calls = {
    "allocate": (lambda: pool.allocate(3), 3),
    "acquire": (lambda: cache.acquire(range(30), ns).blocks, 3),
    "commit": (lambda: cache.commit(range(100, 108), mine, ns).blocks, 2),
    "take_block_copies": (lambda: manager.take_block_copies(), 1),
    "take_blocks_to_zero": (lambda: manager.take_blocks_to_zero(), 1),
}
def state():
    return manager.stats(), [pool.ref_count(block) for block in range(64)]
"""


def test_a_missing_numpy_changes_nothing() -> None:
    in_process(
        WORLD
        + """
import sys
mine = manager.add(range(200, 208), tenant="d")  # whose blocks are named without an array
manager.allocate_slots(mine, 8)
mine = [block for block in range(1, 64) if pool.ref_count(block)][-2:]
sys.modules["numpy"] = None  # an import fails from now on
before = state()
for name, (call, _) in calls.items():
    try:
        call()
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError(name)
    assert state() == before, (name, before, state())
del sys.modules["numpy"]
for name, (call, count) in calls.items():
    assert len(call()) == count, name
manager.check()
print("alive")
"""
    )


@pytest.mark.parametrize("error", ["MemoryError", "KeyboardInterrupt"])
def test_an_array_that_cannot_be_made_changes_nothing(error: str) -> None:
    in_process(
        WORLD
        + f"""
import numpy
real, fail = numpy.empty, False
def empty(*args):
    if fail:
        raise {error}("now")
    return real(*args)
numpy.empty = empty  # the core looks it up once
mine = pool.allocate(2)
before = state()
fail = True
for name, (call, _) in calls.items():
    try:
        call()
    except {error}:
        pass
    else:
        raise AssertionError(name)
    assert state() == before, (name, before, state())
fail = False
for name, (call, count) in calls.items():
    assert len(call()) == count, name
manager.check()
print("alive")
"""
    )


def test_forks_beyond_the_machine_are_refused() -> None:
    # 65,536 tables of two million blocks would take 500 GB; the process may have 4 GiB.
    in_process(
        """
import resource
from pagedcore import *
from pagedcore.errors import InvalidArgumentError
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
manager = KVCacheManager(2_000_000, block_size=1)
seq = manager.add(memoryview(bytearray(4 * 1_900_000)).cast("i"))
manager.allocate_slots(seq, 1_900_000)
manager.commit(seq, 1_900_000)
before = manager.stats(), manager.pool.ref_count(1)
for n in (65_536, 1_000):
    try:
        manager.fork(seq, n)
    except InvalidArgumentError as error:
        assert (error.argument, error.got) == ("n", n), error
    else:
        raise AssertionError("taken")
    assert (manager.stats(), manager.pool.ref_count(1)) == before
assert len(manager.fork(seq, 2)) == 2
# A number that is within bounds, in a process that has no room for it.
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), 4 << 30))
before = manager.stats(), manager.pool.ref_count(1)
try:
    manager.fork(seq, 130)
except InvalidArgumentError as error:
    assert "memory" in str(error), error
else:
    raise AssertionError("taken")
assert (manager.stats(), manager.pool.ref_count(1)) == before
manager.check()
print("alive")
"""
    )


def test_who_is_told_of_a_close_sees_it() -> None:
    """A thread whose call raises ClosedError finds `closed` True, however long the memory takes to go."""
    for _ in range(5):
        manager = KVCacheManager(1 << 20, block_size=1)
        seq = manager.add(memoryview(bytearray(4 << 20)).cast("i"))
        manager.allocate_slots(seq, (1 << 20) - 1)
        manager.commit(seq, (1 << 20) - 1)  # a million nodes: giving them back takes a while
        seen: list[bool] = []
        ready = threading.Event()

        def watch(
            manager: KVCacheManager = manager, seen: list[bool] = seen, ready: threading.Event = ready, seq: int = seq
        ) -> None:
            ready.set()
            while True:
                try:
                    manager.num_tokens(seq)
                except ClosedError:
                    seen.append(manager.closed)
                    return

        thread = threading.Thread(target=watch)
        thread.start()
        ready.wait()
        manager.close()
        thread.join(60)
        assert seen == [True]

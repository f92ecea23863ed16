"""close(): whatever shares a core ends together, every method says so afterwards, and nothing else breaks."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pagedcore import BlockPool, KVCacheManager, PrefixCache, Scheduler, SchedulerConfig
from pagedcore.errors import ClosedError, CorruptionError
from test_bad_input import World

CONFIG = SchedulerConfig(num_blocks=32, block_size=4, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)

#: What needs no core: sizes, views, and closing itself.
STAYS = {"num_blocks", "block_size", "config", "pool", "cache", "manager", "close", "closed"}


def methods(level: Any) -> dict[str, Callable[[], Any]]:
    """Calls without arguments: those that take none, and properties."""
    calls = {}
    for name in dir(type(level)):
        if not name.startswith("_") and name not in STAYS:
            member = getattr(type(level), name)
            calls[name] = getattr(level, name) if callable(member) else (lambda name=name: getattr(level, name))
    return calls


def test_every_method_is_refused_after_close() -> None:
    world = World()
    levels = [world.pool, world.cache, world.manager, world.scheduler]
    views = [world.manager.pool, world.manager.cache, world.scheduler.manager, world.scheduler.manager.pool]
    calls = {(id(level), name): call for level in levels + views for name, call in methods_open(level).items()}
    for entry in world.entries:
        level = getattr(entry.call, "__self__", None)
        if level is not None and hasattr(level, "closed"):
            calls[id(level), entry.call.__name__] = lambda entry=entry: entry.call(**entry.valid)
    known = {name for _, name in calls}
    for level in levels:
        assert {name for name in dir(level) if not name.startswith("_")} <= known | STAYS, "a method without a call"
        level.close()
    for (_, name), call in calls.items():
        with pytest.raises(ClosedError, match="closed") as caught:
            call()
        assert isinstance(caught.value, RuntimeError), name
        assert caught.value.hint, name
    for name in ("input_ids", "request_ids", "buffer"):
        with pytest.raises(ClosedError):
            getattr(world.plan, name)
    assert world.plan.num_tokens > 0, "numbers stay"
    for level in levels + views:
        assert level.closed
        level.close()
        assert "unusable" in repr(level)
        with pytest.raises(ClosedError):
            level.__enter__()
    assert world.pool.num_blocks == world.scheduler.config.num_blocks == 64
    with pytest.raises(ClosedError):
        PrefixCache(world.pool)
    with pytest.raises(ClosedError):
        Scheduler(CONFIG, world.manager)


def methods_open(level: Any) -> dict[str, Callable[[], Any]]:
    """Of `methods`, those that can be called just so: what they need otherwise, `World.entries` has."""
    without = {"num_free", "num_cached", "num_used", "num_fenced", "stats", "check", "begin_step", "reset"}
    without |= {"schedule", "has_unfinished", "take_blocks_to_zero", "take_block_copies"}
    return {name: call for name, call in methods(level).items() if name in without}


@pytest.mark.parametrize("which", ["pool", "cache", "manager", "scheduler"])
def test_what_shares_a_core_ends_together(which: str) -> None:
    scheduler = Scheduler(CONFIG)
    levels = {
        "scheduler": scheduler,
        "manager": scheduler.manager,
        "pool": scheduler.manager.pool,
        "cache": scheduler.manager.cache,
    }
    levels[which].close()
    assert all(level.closed for level in levels.values())
    with pytest.raises(ClosedError):
        scheduler.schedule()


@pytest.mark.parametrize("make", [lambda: BlockPool(8), lambda: PrefixCache(BlockPool(8)), lambda: KVCacheManager(8)])
def test_context_managers(make: Callable[[], Any]) -> None:
    with make() as level:
        assert not level.closed
        level.check()
    assert level.closed
    with pytest.raises(KeyError, match="mine"), make() as level:
        raise KeyError("mine")
    assert level.closed


def test_a_scheduler_is_a_context_manager() -> None:
    with Scheduler(CONFIG) as scheduler:
        scheduler.add_request("a", [1, 2], 2)
        plan = scheduler.schedule()
        scheduler.update(plan.step, [1])
    with pytest.raises(ClosedError):
        scheduler.explain("a")


def test_arrays_of_a_closed_scheduler_keep_their_memory() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add_request("a", range(40), 2)
    plan = scheduler.schedule()
    arrays = [plan.input_ids, plan.positions, plan.slot_mapping, plan.block_table, plan.buffer]
    before = [array.copy() for array in arrays]
    scheduler.close()
    del scheduler, plan
    gc.collect()
    size = arrays[-1].nbytes
    others = [np.full(size, 0xA5, np.uint8) for _ in range(64)]  # something else takes what memory there is
    assert all((array == copy).all() for array, copy in zip(arrays, before, strict=True))
    assert all(other[0] == 0xA5 for other in others)


def test_a_damaged_core_can_be_closed() -> None:
    manager = KVCacheManager(16, 4)
    seq = manager.add(range(8))
    manager.allocate_slots(seq, 8)
    manager.pool.release(manager.block_table(seq))
    with pytest.raises(CorruptionError):
        manager.check()
    with pytest.raises(CorruptionError):
        manager.add([1])
    manager.close()
    assert manager.closed
    with pytest.raises(ClosedError):
        manager.add([1])


def test_closing_beside_calls() -> None:
    """Threads that are at work when a core is closed get ClosedError, and nothing else."""
    for _ in range(20):
        manager = KVCacheManager(4096, 4)
        others: list[BaseException] = []
        ready = threading.Barrier(5)

        def work(
            manager: KVCacheManager = manager, ready: threading.Barrier = ready, others: list[BaseException] = others
        ) -> None:
            ready.wait()
            try:
                while True:
                    seq = manager.add(range(3000))
                    manager.free(seq)
            except ClosedError:
                pass
            except BaseException as error:  # noqa: BLE001 - handed to the main thread
                others.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        ready.wait()
        manager.close()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not others


def test_closing_gives_the_memory_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    closed = []
    before = resident()
    for _ in range(40):
        manager = KVCacheManager(1 << 18, block_size=1)
        seq = manager.add(np.zeros(1 << 18, np.int32))
        manager.allocate_slots(seq, (1 << 18) - 1)
        manager.close()
        closed.append(manager)  # the objects themselves are still held
    assert resident() - before < 10 * (1 << 18) * 24, "each takes more than 24 bytes per block while it is open"

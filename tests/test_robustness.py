"""Threads, forks, re-entry, damage: what a core does when it is used in ways that are not calls one after another."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from concurrency import THREADS, gives_way, gives_way_at_last, in_threads
from pagedcore import BlockPool, KVCacheManager, PrefixCache, Scheduler, SchedulerConfig, StepPlan
from pagedcore.errors import CorruptionError, InvalidArgumentError, PagedCoreError, StepError


@pytest.fixture
def quick_switches():
    """Threads give way to each other all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_switches")
def test_threads_share_a_manager() -> None:
    manager = KVCacheManager(4096, 16)
    prompt = np.arange(3000, dtype=np.int32)  # long enough for calls that release the interpreter

    def work(index: int) -> None:
        rng = np.random.default_rng(index)
        for i in range(30):
            length = int(rng.integers(1, 3000))
            seq = manager.add(prompt[:length])
            try:
                manager.allocate_slots(seq, length - manager.num_computed_tokens(seq))
                manager.commit(seq, length)
                (child,) = manager.fork(seq)
                manager.append(child, [index])
                manager.allocate_slots(child, 1)
                assert len(manager.block_table(child)) == -(-(length + 1) // 16)
                manager.free(child)
                if i % 8 == 0:
                    manager.check()
                    manager.cache.evict(100)
                manager.take_block_copies()
            except MemoryError:
                pass
            manager.free(seq)

    in_threads(work)
    manager.check()
    assert manager.pool.num_used == 0
    manager.cache.reset()
    assert manager.pool.num_free == 4095


@pytest.mark.usefixtures("quick_switches")
def test_threads_share_a_scheduler() -> None:
    config = SchedulerConfig(num_blocks=200, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128)
    scheduler = Scheduler(config)
    ended: list[tuple[str, int, str]] = []
    added = threading.Semaphore(0)
    per_thread = 30

    def add(index: int) -> None:
        rng = np.random.default_rng(index)
        for i in range(per_thread):
            name = f"{index}-{i}"
            scheduler.add_request(
                name, rng.integers(0, 50, int(rng.integers(1, 60))), max_tokens=int(rng.integers(1, 9))
            )
            added.release()
            if i % 5 == 0:
                with contextlib.suppress(KeyError):  # it has ended already
                    ended.extend(scheduler.abort(name))
            scheduler.stats()
            scheduler.manager.pool.num_free  # noqa: B018 - a view of the same core

    def serve() -> None:
        left = (THREADS - 1) * per_thread
        while left or scheduler.has_unfinished:
            while left and added.acquire(blocking=False):
                left -= 1
            plan = scheduler.schedule()
            if plan is None:
                time.sleep(0)
                continue
            tokens = int(plan.input_ids.sum())
            assert tokens >= 0
            result = scheduler.update(plan.step, np.ones(len(plan.sample_seqs), np.int32))
            ended.extend(result.finished)

    in_threads(lambda index: serve() if index == 0 else add(index))
    scheduler.check()
    assert len({(name, index) for name, index, _ in ended}) == len(ended) == (THREADS - 1) * per_thread
    assert scheduler.manager.pool.num_used == 0


class Long:
    """A manager whose one sequence is 2^20 blocks long, and ways to use it."""

    BLOCKS = 1 << 20

    def __init__(self) -> None:
        self.manager = KVCacheManager(self.BLOCKS + 8, block_size=1)
        self.seq = self.manager.add(np.arange(self.BLOCKS, dtype=np.int32))
        self.manager.allocate_slots(self.seq, self.BLOCKS)

    def commit(self) -> Callable[[], object]:
        return lambda: self.manager.commit(self.seq, self.BLOCKS)

    def truncate(self) -> Callable[[], object]:
        return lambda: self.manager.truncate(self.seq, 1)

    def fork(self) -> Callable[[], object]:
        self.commit()()
        return lambda: self.manager.fork(self.seq)

    def preempt(self) -> Callable[[], object]:
        return lambda: self.manager.preempt(self.seq)

    def resume(self) -> Callable[[], object]:
        self.commit()()
        self.preempt()()
        return lambda: self.manager.resume(self.seq)

    def free(self) -> Callable[[], object]:
        return lambda: self.manager.free(self.seq)

    def token_ids(self) -> Callable[[], object]:
        return lambda: self.manager.token_ids(self.seq)

    def block_table(self) -> Callable[[], object]:
        return lambda: self.manager.block_table(self.seq)

    def slot_mapping(self) -> Callable[[], object]:
        return lambda: self.manager.slot_mapping(self.seq, 0, self.BLOCKS)

    def check(self) -> Callable[[], object]:
        return self.manager.pool.check

    def complete_step(self) -> Callable[[], object]:
        step = self.manager.pool.begin_step()
        self.free()()
        return lambda: self.manager.pool.complete_step(step)

    def reset(self) -> Callable[[], object]:
        self.commit()()
        self.free()()
        return self.manager.cache.reset

    def evict(self) -> Callable[[], object]:
        self.commit()()
        self.free()()
        return lambda: self.manager.cache.evict(self.BLOCKS)

    def allocate(self) -> Callable[[], object]:
        self.free()()
        return lambda: self.manager.pool.allocate(self.BLOCKS)

    def close(self) -> Callable[[], object]:
        return self.manager.close


@pytest.mark.parametrize("call", [name for name in vars(Long) if name.islower() and not name.startswith("_")])
def test_long_calls_let_other_threads_run(call: str) -> None:
    assert gives_way_at_last(lambda: getattr(Long(), call)())


def test_short_calls_keep_the_interpreter() -> None:
    """A thread that is at work comes back to the interpreter late: what takes a microsecond does not leave it."""
    manager = KVCacheManager(4096, 16)
    seq = manager.add(range(20_000))
    manager.allocate_slots(seq, 20_000)
    manager.commit(seq, 20_000)
    manager.append(seq, [1])

    def decode() -> None:
        step = manager.pool.begin_step()
        manager.allocate_slots(seq, 1)
        manager.slot_mapping(seq, 20_000, 20_001)
        manager.block_table(seq)
        manager.take_block_copies()
        manager.pool.complete_step(step)
        manager.commit(seq, 20_001)
        manager.truncate(seq, 20_000)

    # A thread that had not begun to wait may run once.
    assert not all(gives_way(decode) for _ in range(3))


def test_a_step_of_the_callers_does_not_slip_in_under_a_scheduler() -> None:
    """Either the step is first, and the scheduler refuses a pool with a step in flight, or it is not begun at all."""
    for _ in range(40):
        manager = KVCacheManager(300_000, 4)
        done: dict[str, object] = {}

        def attempt(name: str, call: Callable[[], object], done: dict[str, object] = done) -> None:
            try:
                done[name] = call()
            except (StepError, InvalidArgumentError):
                done[name] = None

        config = SchedulerConfig(num_blocks=300_000, block_size=4)
        calls = {
            "check": manager.check,  # both of the others wait for its end, and for the lock again
            "step": manager.pool.begin_step,
            "scheduler": lambda config=config, manager=manager: Scheduler(config, manager),
        }
        threads = [threading.Thread(target=attempt, args=item) for item in calls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not (done["step"] and done["scheduler"]), "a step of the caller's is in flight under a scheduler"


def test_arguments_may_call_back() -> None:
    pool = BlockPool(16, block_size=2)
    cache = PrefixCache(pool)
    ns = cache.namespace()

    class Nested:
        """An int that uses the pool while it is converted."""

        def __init__(self, value: int) -> None:
            self.value = value

        def __index__(self) -> int:
            pool.release(pool.allocate(3))
            cache.probe([1, 2], ns)
            return self.value

    class Array:
        def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
            pool.check()
            return np.arange(4, dtype=np.int32)

    assert len(pool.allocate(Nested(2))) == 2
    assert cache.probe([Nested(1), Nested(2)], ns) == 0
    assert cache.probe(Array(), ns) == 0
    items = [1, 2, 3]

    class Shrinks:
        def __index__(self) -> int:
            items.clear()
            return 5

    items.insert(1, Shrinks())
    assert cache.probe(items, ns) == 0  # the list became shorter while it was read
    pool.check()


def test_an_interrupt_in_an_argument_changes_nothing() -> None:
    pool = BlockPool(16)

    class Interrupts:
        def __index__(self) -> int:
            raise KeyboardInterrupt

    before = pool.stats()
    for call in (pool.allocate, pool.complete_step, pool.ref_count):
        with pytest.raises(KeyboardInterrupt):
            call(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        pool.retain([1, Interrupts()])
    assert pool.stats() == before


def test_a_forked_child_is_refused() -> None:
    # In a process of its own: a fork of one that has threads is warned about.
    code = """
import os, sys
from pagedcore import *
from pagedcore.errors import ForkedProcessError

pool, manager = BlockPool(8), KVCacheManager(8)
seq = manager.add([1, 2, 3])
sched = Scheduler(SchedulerConfig(num_blocks=8))
sched.add_request("a", [1], 1)
plan = sched.schedule()
child = os.fork()
if child == 0:
    try:
        calls = [
            lambda: pool.allocate(1), lambda: pool.num_free, pool.begin_step, lambda: PrefixCache(pool),
            lambda: manager.append(seq, [1]), lambda: manager.cache.reset(), lambda: manager.free(seq),
            sched.schedule, lambda: sched.update(plan.step, [1]), lambda: sched.abort("a"), sched.check,
            lambda: plan.request_ids,
        ]
        for call in calls:
            try:
                call()
            except ForkedProcessError as error:
                assert isinstance(error, RuntimeError) and error.hint
            else:
                raise AssertionError("taken")
        repr(pool), repr(manager), repr(sched)
        fresh = BlockPool(8)  # one of the child's own works
        fresh.allocate(1)
        fresh.check()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
pool.allocate(1)
sched.update(plan.step, [1])
pool.check(), manager.check(), sched.check()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_sizes_beyond_the_machine_are_refused() -> None:
    # In a process that may have 4 GiB: memory that is not there must not end it.
    code = """
import resource
from pagedcore import *
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for exponent in (20, 26, 31):
    n = 2**exponent - 1
    for make in (
        lambda: BlockPool(n),
        lambda: PrefixCache(BlockPool(n)),
        lambda: KVCacheManager(n),
        lambda: Scheduler(SchedulerConfig(num_blocks=n)),
        lambda: Scheduler(SchedulerConfig(num_blocks=64, max_num_seqs=n)),
        lambda: Scheduler(SchedulerConfig(num_blocks=64, max_num_batched_tokens=n)),
        lambda: Scheduler(SchedulerConfig(num_blocks=n, max_model_len=n)),
        # A manager that fills the memory is not copied to find out that it does not fit.
        lambda: Scheduler(SchedulerConfig(num_blocks=8), KVCacheManager(n)),
    ):
        try:
            make()
        except (PagedCoreError, MemoryError):
            pass
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_damage_is_reported_by_every_later_call() -> None:
    manager = KVCacheManager(16, 4)
    seq = manager.add(range(8))
    manager.allocate_slots(seq, 8)
    manager.pool.release(manager.block_table(seq))  # blocks that are not the caller's to release
    with pytest.raises(CorruptionError) as caught:
        manager.check()
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.hint
    for call in (
        lambda: manager.pool.num_free,
        lambda: manager.pool.allocate(1),
        lambda: manager.add([1]),
        lambda: manager.cache.stats(),
        manager.stats,
        manager.check,
    ):
        with pytest.raises(CorruptionError):
            call()
    assert "unusable" in repr(manager)
    assert "unusable" in repr(manager.pool)


def test_releasing_what_a_request_holds_is_survived() -> None:
    """Misuse that no lower level can tell from use: errors, perhaps damage, but the process lives."""
    config = SchedulerConfig(num_blocks=32, block_size=4, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        scheduler = Scheduler(config)
        for step in range(12):
            try:
                prompt = rng.integers(0, 3, int(rng.integers(1, 30)))
                scheduler.add_request(f"r{step}", prompt, int(rng.integers(1, 9)))
                plan = scheduler.schedule()
                scheduler.manager.pool.release(rng.integers(1, 32, 2))
                if plan is not None:
                    scheduler.update(plan.step, np.ones(len(plan.sample_seqs), np.int32))
            except PagedCoreError as error:
                if "internal error" in str(error):
                    pytest.fail(f"seed {seed}, step {step}: a panic: {error}")


def test_arrays_of_a_plan_outlive_it() -> None:
    config = SchedulerConfig(num_blocks=32, block_size=4, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)
    scheduler = Scheduler(config)
    scheduler.add_request("a", [5, 6, 7], 2)
    plan = scheduler.schedule()
    ids, table, whole = plan.input_ids, plan.block_table, plan.buffer
    copies = ids.copy(), table.copy(), whole.copy()
    scheduler.update(plan.step, [1])
    with pytest.raises(StepError, match="step 1 is over") as caught:
        plan.input_ids  # noqa: B018
    assert caught.value.step == 1
    assert (plan.step, plan.num_tokens) == (1, 3), "numbers stay"
    del scheduler, plan
    gc.collect()
    others = [np.full(whole.nbytes + size, 0xA5, np.uint8) for size in range(-64, 64)]  # take what memory there is
    assert ids.tolist() == copies[0].tolist() == [5, 6, 7]
    assert table.tolist() == copies[1].tolist()
    assert (whole == copies[2]).all()
    assert all((other == 0xA5).all() for other in others)


def test_a_plan_from_a_buffer_is_a_copy() -> None:
    config = SchedulerConfig(num_blocks=32, block_size=4, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)
    scheduler = Scheduler(config)
    scheduler.add_request("a", [5, 6, 7], 2)
    plan = scheduler.schedule()
    received = bytearray(plan.buffer.tobytes())
    other = StepPlan.from_buffer(received)
    received[:] = bytes(len(received))
    scheduler.update(plan.step, [1])
    assert other.input_ids.tolist() == [5, 6, 7]
    assert other.groups[0].slot_mapping.tolist() == [4, 5, 6]
    with pytest.raises(ValueError, match="request_ids"):
        other.request_ids  # noqa: B018


@pytest.mark.parametrize("seed", range(3))
def test_damaged_plans_are_refused(seed: int) -> None:
    config = SchedulerConfig(num_blocks=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)
    scheduler = Scheduler(config)
    for i in range(3):
        scheduler.add_request(f"r{i}", range(5 + i), 4, n=1 + i % 2)
    plan = scheduler.schedule()
    whole = plan.buffer.copy()
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(2000):
        damaged = whole.copy()
        for _ in range(int(rng.integers(1, 4))):
            damaged[rng.integers(0, len(damaged))] ^= 1 << int(rng.integers(0, 8))
        try:
            taken = StepPlan.from_buffer(damaged)
        except ValueError:
            refused += 1
            continue
        # What is taken can be indexed with: every slot is one of the table's blocks.
        starts, lens = taken.query_start_loc, taken.seq_lens
        assert starts[0] == 0
        assert starts[-1] == taken.num_tokens == len(taken.slot_mapping)
        for i in range(taken.num_seqs):
            positions = taken.positions[starts[i] : starts[i + 1]]
            assert positions[-1] == lens[i] - 1
            assert (taken.block_table[i][positions // taken.block_size] > 0).all()
    assert refused > 200

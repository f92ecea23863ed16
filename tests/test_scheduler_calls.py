"""Level 3 as a neighbour: what its calls hold up, and what they take or leave of a manager."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from concurrency import gives_way, gives_way_at_last
from pagedcore import KVCacheManager, Scheduler, SchedulerConfig
from pagedcore.errors import InvalidArgumentError, OutOfBlocksError, TokenOutOfRangeError
from test_scheduler import VOCAB, Server, config

LONG = 1 << 20


class Long:
    """A scheduler, one token in a block, and a request of 2^20 tokens."""

    def __init__(self, *, add: bool = True) -> None:
        sizes = SchedulerConfig(
            num_blocks=LONG + 8, block_size=1, max_num_batched_tokens=LONG, max_model_len=LONG + 8, max_num_seqs=2
        )
        self.scheduler = Scheduler(sizes)
        if add:
            self.add()()

    def add(self) -> Callable[[], object]:
        return lambda: self.scheduler.add_request("long", np.arange(LONG, dtype=np.int32), 4)

    def schedule(self) -> Callable[[], object]:
        return self.scheduler.schedule

    def update(self) -> Callable[[], object]:
        plan = self.scheduler.schedule()
        return lambda: self.scheduler.update(plan.step, [1])

    def cancel(self) -> Callable[[], object]:
        # The step is short, and many blocks were given back since: they are free when it is over.
        self.scheduler.add_request("short", [1], 4)
        manager = self.scheduler.manager
        seq = manager.add(np.arange(LONG, dtype=np.int32))
        manager.allocate_slots(seq, LONG)
        plan = self.scheduler.schedule()
        manager.free(seq)
        return lambda: self.scheduler.cancel(plan.step)

    def abort(self) -> Callable[[], object]:
        self.update()()
        return lambda: self.scheduler.abort("long")

    def finish(self) -> Callable[[], object]:
        self.update()()
        return lambda: self.scheduler.finish("long", "enough", 0)

    def check(self) -> Callable[[], object]:
        self.update()()
        return self.scheduler.check


@pytest.mark.parametrize("name", ["schedule", "update", "abort", "finish", "check"])
def test_long_calls_let_other_threads_run(name: str) -> None:
    assert gives_way_at_last(lambda: getattr(Long(), name)())


def test_adding_a_long_prompt_lets_other_threads_run() -> None:
    assert gives_way_at_last(lambda: Long(add=False).add())


def test_cancelling_with_many_blocks_to_free_lets_other_threads_run() -> None:
    assert gives_way_at_last(lambda: Long(add=False).cancel())


def test_short_steps_keep_the_interpreter() -> None:
    server = Server(config())
    server.add("a", [1, 2, 3], 9)
    server.step()
    plans = []
    assert not gives_way(lambda: plans.append(server.scheduler.schedule()))
    assert not gives_way(lambda: server.scheduler.update(plans[0].step, [1]))
    assert not gives_way(lambda: server.scheduler.abort("a"))


def test_vocabularies_of_scheduler_and_manager_are_the_same() -> None:
    sizes = config()
    for vocab_size, got in ((None, 1 << 31), (VOCAB + 1, VOCAB + 1), (VOCAB - 1, VOCAB - 1)):
        manager = KVCacheManager(sizes.num_blocks, sizes.block_size, vocab_size=vocab_size)
        with pytest.raises(InvalidArgumentError, match=f"vocab_size is {got}, expected {VOCAB}"):
            Scheduler(sizes, manager)
        manager.add([5])  # it is as before
        manager.check()
    manager = KVCacheManager(64, 4, vocab_size=1 << 31)
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4), manager)
    scheduler.add_request("a", [(1 << 31) - 1], 1)


def test_what_is_written_into_the_block_table_never_becomes_a_slot() -> None:
    sizes = {"num_blocks": 64, "block_size": 4, "max_num_batched_tokens": 10, "max_num_seqs": 2, "max_model_len": 64}
    schedulers = [Scheduler(SchedulerConfig(**sizes)) for _ in range(2)]
    for scheduler in schedulers:
        scheduler.add_request("a", list(range(36)), 9)
    for _ in range(9):
        plans = [scheduler.schedule() for scheduler in schedulers]
        slots = [plan.slot_mapping.tolist() for plan in plans]
        assert slots[0] == slots[1]
        # A server that takes the lines for its own, against the documentation.
        plans[1].block_table[:] = 1 << 30
        for scheduler, plan in zip(schedulers, plans, strict=True):
            scheduler.update(plan.step, [1] * len(plan.sample_seqs))


def test_a_count_of_samples_is_no_token() -> None:
    server = Server(config())
    server.add("a", [1, 2, 3], 4)
    plan = server.scheduler.schedule()
    with pytest.raises(
        InvalidArgumentError, match=r"num_sampled\[0\] is 1099511627776, which is not an int32"
    ) as caught:
        server.scheduler.update(plan.step, [1], num_sampled=[1 << 40])
    assert not isinstance(caught.value, TokenOutOfRangeError)
    assert (caught.value.argument, caught.value.got) == ("num_sampled", 1 << 40)
    server.scheduler.update(plan.step, [1], num_sampled=[1])


def test_a_plan_holds_all_that_other_owners_leave_to_it() -> None:
    sizes = config(num_blocks=1200, max_num_seqs=2)
    manager = KVCacheManager(sizes.num_blocks, sizes.block_size, vocab_size=VOCAB)
    scheduler = Scheduler(sizes, manager)
    first = manager.add([7], tenant="a")
    manager.allocate_slots(first, 3000)
    manager.free(first)
    second = manager.add([7], tenant="b")
    manager.allocate_slots(second, 3000)
    with pytest.raises(OutOfBlocksError):
        manager.allocate_slots(second, 9000)
    scheduler.add_request("r", [1, 2, 3], 2)
    for _ in range(3):
        plan = scheduler.schedule()
        assert len(plan.blocks_to_zero) == 750
        scheduler.cancel(plan.step)
        scheduler.check()


def test_a_scheduler_is_made_without_numpy() -> None:
    """Nothing can fail, and NumPy's import least of all, once a manager has been taken."""
    code = (
        "import sys; sys.modules['numpy'] = None; from pagedcore._core import *\n"
        "m = KVCacheManager(8, 4); s = Scheduler(SchedulerConfig(num_blocks=8, block_size=4), m)\n"
        "s.add_request('a', [1], 1); p = s.schedule(); s.update(p.step, [1]); s.check()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")

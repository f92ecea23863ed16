"""Malformed calls of every public entry of levels 0 to 3: the right exception, nothing changed, the next call fine.

Each call takes valid arguments and spoils one of them. ``PAGEDCORE_TEST_SEED`` replays a run.
"""

from __future__ import annotations

import array
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from bad_values import (
    ANY_TOKENS,
    BAD_OUTS,
    BLOCKS,
    COMMIT_BLOCKS,
    CONTENT,
    FLAG,
    HANDLE,
    HUGE,
    NAMESPACE,
    NEGATIVE,
    NOT_NONE,
    OPTIONAL_SIZE,
    POSITIVE,
    REQUEST,
    SIZE,
    STALE,
    STEP,
    TEXT,
    TOKENS,
    TOO_MUCH,
    VOCAB,
    WRONG_ARRAYS,
    WRONG_NUMBERS,
    WRONG_OUTS,
    WRONG_SHAPES,
    WRONG_TOKENS,
    ZERO,
    Bad,
)
from pagedcore import (
    BlockPool,
    Commit,
    KVCacheManager,
    KVGroup,
    PrefixCache,
    PrefixHit,
    Scheduler,
    SchedulerConfig,
    StepPlan,
    StepResult,
)
from pagedcore.errors import (
    BlockError,
    CorruptionError,
    InvalidArgumentError,
    PagedCoreError,
    StepError,
)

CALLS = 12_000
SEED = int(
    os.environ.get("PAGEDCORE_TEST_SEED", "0" if os.environ.get("CI") else str(random.SystemRandom().getrandbits(32)))
)


@dataclass
class Entry:
    """A callable, arguments that it takes, and what each of them must refuse."""

    call: Callable[..., Any]
    valid: dict[str, Any]
    bad: dict[str, list[Bad]]
    name: str = field(default="")

    def __post_init__(self) -> None:
        self.name = self.name or getattr(self.call, "__qualname__", repr(self.call))
        assert set(self.bad) <= set(self.valid), self.name


class World:
    """One of everything, in use, and nothing of it changed by a call that fails."""

    def __init__(self) -> None:
        self.pool = BlockPool(64, block_size=4)
        self.cache = PrefixCache(self.pool)
        self.ns = self.cache.namespace(tenant="t")
        self.blocks = self.pool.allocate(8)
        self.node = self.cache.commit(range(16), self.blocks[:4], self.ns).node
        self.step = self.pool.begin_step()
        self.manager = KVCacheManager(64, 4, vocab_size=VOCAB)
        self.seq = self.manager.add(range(10))
        self.manager.allocate_slots(self.seq, 10)
        self.manager.commit(self.seq, 10)
        self.fork = self.manager.fork(self.seq)[0]
        self.resting = self.manager.add([5, 6])
        self.manager.preempt(self.resting)
        config = SchedulerConfig(
            num_blocks=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, vocab_size=VOCAB
        )
        self.scheduler = Scheduler(config)
        self.scheduler.add_request("r1", range(10), 20, n=2)
        self.scheduler.add_request("r2", range(50), 5)
        first = self.scheduler.schedule()
        self.scheduler.update(first.step, [7] * first.num_samples)
        self.plan = self.scheduler.schedule()
        self.samples = [1] * self.plan.num_samples
        self.entries = list(self.make_entries())

    def snapshot(self) -> tuple[Any, ...]:
        return (
            self.pool.stats(),
            self.cache.stats(),
            self.manager.stats(),
            self.scheduler.stats(),
            self.scheduler.manager.stats(),
            self.plan.input_ids.tolist(),
        )

    def check(self) -> None:
        for level in (self.pool, self.cache, self.manager, self.scheduler):
            level.check()

    def use(self) -> None:
        """The next calls are fine: one of each level, undone again."""
        self.pool.release(self.pool.allocate(3), after_step=0)
        assert self.cache.probe(range(16), self.ns) == 16
        seq = self.manager.add(range(9))
        assert self.manager.num_computed_tokens(seq) == 8
        self.manager.free(seq)
        self.scheduler.add_request("next", [1, 2, 3], 1)
        assert self.scheduler.explain("next").phase == "waiting"
        self.scheduler.abort("next")

    def make_entries(self):
        pool, cache, manager, scheduler = self.pool, self.cache, self.manager, self.scheduler
        yield Entry(
            BlockPool,
            {"num_blocks": 8, "block_size": 4},
            {"num_blocks": [WRONG_NUMBERS, NOT_NONE, NEGATIVE, HUGE, ZERO], "block_size": POSITIVE},
        )
        yield Entry(pool.allocate, {"n": 1}, {"n": SIZE})
        yield Entry(pool.retain, {"blocks": self.blocks}, {"blocks": BLOCKS})
        yield Entry(pool.release, {"blocks": self.blocks, "after_step": 0}, {"blocks": BLOCKS, "after_step": STEP})
        yield Entry(pool.complete_step, {"step": self.step}, {"step": [*STEP, NOT_NONE]})
        outside = Bad((BlockError,), lambda: [-1, 64, 2**31, 2**32 - 1, 2**32, 2**64])
        yield Entry(pool.ref_count, {"block": 1}, {"block": [WRONG_NUMBERS, NOT_NONE, outside]})

        tokens = {"token_ids": range(16), "ns": self.ns}
        lookup = {"token_ids": ANY_TOKENS, "ns": HANDLE, "max_tokens": OPTIONAL_SIZE, "content_keys": CONTENT}
        yield Entry(
            PrefixCache,
            {"pool": BlockPool(8)},
            {"pool": [Bad((TypeError,), lambda: [None, 5, "p", manager, BlockPool])]},
        )
        yield Entry(cache.namespace, {"tenant": "", "cache_salt": "", "extra_keys": ()}, NAMESPACE)
        yield Entry(cache.drop_namespace, {"ns": self.ns, "purge": False}, {"ns": HANDLE, "purge": FLAG})
        yield Entry(cache.probe, {**tokens, "max_tokens": 4, "content_keys": ()}, lookup)
        yield Entry(cache.acquire, {**tokens, "max_tokens": 4, "content_keys": ()}, lookup)
        yield Entry(
            cache.commit,
            {**tokens, "blocks": self.blocks[4:], "parent": self.node, "after_step": None, "content_keys": ()},
            {
                "token_ids": ANY_TOKENS,
                "ns": HANDLE,
                "blocks": COMMIT_BLOCKS,
                "parent": [WRONG_NUMBERS, STALE],
                "after_step": STEP,
                "content_keys": CONTENT,
            },
        )
        yield Entry(cache.evict, {"n": 0}, {"n": [WRONG_NUMBERS, NOT_NONE, NEGATIVE, HUGE]})

        groups = Bad((TypeError,), lambda: [None, 5, KVGroup(), "a", [None], (1,), [KVGroup], {KVGroup()}])
        odd_groups = Bad((InvalidArgumentError,), lambda: [(), [], (KVGroup(5),), [KVGroup(), KVGroup()]])
        vocab = [WRONG_NUMBERS, NEGATIVE, ZERO, HUGE, Bad((InvalidArgumentError,), lambda: [2**31 + 1, 2**32])]
        yield Entry(KVGroup, {"window": 4}, {"window": [WRONG_NUMBERS, NEGATIVE, ZERO, HUGE]})
        yield Entry(
            KVCacheManager,
            {
                "num_blocks": 8,
                "block_size": 4,
                "enable_prefix_caching": True,
                "merge_blocks": True,
                "groups": (KVGroup(),),
                "vocab_size": None,
            },
            {
                "num_blocks": [WRONG_NUMBERS, NOT_NONE, NEGATIVE, HUGE, ZERO],
                "block_size": POSITIVE,
                "enable_prefix_caching": FLAG,
                "merge_blocks": FLAG,
                "groups": [groups, odd_groups],
                "vocab_size": vocab,
            },
        )
        empty = Bad((InvalidArgumentError,), lambda: [[], (), range(0), np.zeros(0, np.int32), np.zeros(0, np.int64)])
        yield Entry(
            manager.add,
            {"token_ids": [1], "tenant": "", "cache_salt": "", "extra_keys": (), "content_keys": ()},
            {"token_ids": [*TOKENS, empty], **NAMESPACE, "content_keys": CONTENT},
        )
        seq = {"seq": self.seq}
        for call in (
            manager.num_tokens,
            manager.num_computed_tokens,
            manager.is_preempted,
            manager.token_ids,
            manager.free,
            manager.preempt,
        ):
            yield Entry(call, dict(seq), {"seq": HANDLE})
        yield Entry(manager.append, {**seq, "token_ids": [1]}, {"seq": HANDLE, "token_ids": TOKENS})
        resting = Bad((InvalidArgumentError,), lambda: [self.resting])
        yield Entry(
            manager.allocate_slots,
            {**seq, "num_new_tokens": 1, "num_lookahead_tokens": 0},
            {"seq": [*HANDLE, resting], "num_new_tokens": SIZE, "num_lookahead_tokens": SIZE},
        )
        yield Entry(
            manager.commit, {**seq, "num_computed_tokens": 10}, {"seq": HANDLE, "num_computed_tokens": [*SIZE, ZERO]}
        )
        yield Entry(
            manager.truncate,
            {**seq, "num_tokens": 10, "after_step": None},
            {"seq": HANDLE, "num_tokens": POSITIVE, "after_step": STEP},
        )
        yield Entry(manager.fork, {**seq, "n": 1}, {"seq": HANDLE, "n": POSITIVE})
        awake = Bad((InvalidArgumentError,), lambda: [self.seq])
        yield Entry(manager.resume, {"seq": self.resting}, {"seq": [*HANDLE, awake]})
        yield Entry(manager.preempt, {**seq, "after_step": None}, {"seq": [*HANDLE, resting], "after_step": STEP})
        yield Entry(manager.free, {**seq, "after_step": None}, {"seq": HANDLE, "after_step": STEP})
        group = [WRONG_NUMBERS, NOT_NONE, NEGATIVE, HUGE, TOO_MUCH]
        short = Bad(
            (InvalidArgumentError,),
            lambda: [np.zeros(2, np.int32), np.zeros(0, np.int32), np.broadcast_to(np.int32(0), 64)],
        )
        long = Bad((TypeError,), lambda: [np.zeros(64, np.int64)])
        yield Entry(
            manager.block_table,
            {**seq, "group": 0, "out": None},
            {"seq": HANDLE, "group": group, "out": [WRONG_OUTS, BAD_OUTS, short, long]},
        )
        short = Bad(
            (InvalidArgumentError,),
            lambda: [np.zeros(2, np.int64), np.zeros(0, np.int64), np.broadcast_to(np.int64(0), 64)],
        )
        long = Bad((TypeError,), lambda: [np.zeros(64, np.int32)])
        yield Entry(
            manager.slot_mapping,
            {**seq, "start": 0, "stop": 10, "group": 0, "out": None},
            {"seq": HANDLE, "start": SIZE, "stop": SIZE, "group": group, "out": [WRONG_OUTS, BAD_OUTS, short, long]},
        )
        yield Entry(manager.take_block_copies, {"group": 0}, {"group": group})

        positive = [WRONG_NUMBERS, NOT_NONE, NEGATIVE, ZERO, HUGE]
        sizes = (
            "num_blocks",
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "max_steps_in_flight",
        )
        yield Entry(
            SchedulerConfig,
            {**dict.fromkeys(sizes, 8), "max_steps_in_flight": 1, "vocab_size": None, "enable_prefix_caching": True},
            {**dict.fromkeys(sizes, positive), "vocab_size": vocab, "enable_prefix_caching": FLAG},
        )
        objects = Bad((TypeError,), lambda: [5, "c", {}, manager.pool, Scheduler])
        odd = Bad(
            (InvalidArgumentError,),
            lambda: [
                KVCacheManager(63, 4),
                KVCacheManager(64, 8),
                KVCacheManager(64, 4, merge_blocks=False),
                scheduler.manager,
            ],
        )
        clocks = Bad((InvalidArgumentError,), lambda: [len, 5, 1.5])
        yield Entry(
            Scheduler,
            {"config": scheduler.config, "manager": None, "clock": None},
            {"config": [objects, NOT_NONE], "manager": [objects, odd], "clock": [clocks]},
        )
        ids = Bad((PagedCoreError,), lambda: ["r1"])
        long_prompts = Bad((PagedCoreError,), lambda: [range(64), [1] * 1000, np.ones(500, np.int32)])
        yield Entry(
            scheduler.add_request,
            {
                "request_id": "new",
                "prompt_token_ids": [1],
                "max_tokens": 1,
                "stop_token_ids": (),
                "n": 1,
                "priority": 0,
                "tenant": "",
                "cache_salt": "",
                "extra_keys": (),
                "content_keys": (),
                "pipelined": True,
            },
            {
                "request_id": [*TEXT, ids],
                "prompt_token_ids": [*TOKENS, empty, long_prompts],
                "max_tokens": positive,
                "stop_token_ids": TOKENS,
                "n": POSITIVE,
                "priority": [WRONG_NUMBERS, NOT_NONE, HUGE],
                **NAMESPACE,
                "content_keys": CONTENT,
                "pipelined": FLAG,
            },
        )
        samples = [
            WRONG_ARRAYS,
            WRONG_SHAPES,
            Bad((InvalidArgumentError,), WRONG_TOKENS.values),
            Bad((InvalidArgumentError,), lambda: [[], [1] * 9, np.zeros(0, np.int32)]),
        ]
        counts = [
            WRONG_ARRAYS,
            WRONG_SHAPES,
            samples[-1],
            Bad((InvalidArgumentError,), lambda: [[0] * 3, [2] * 3, [-1] * 3]),
        ]
        flags = Bad(
            (TypeError,),
            lambda: [5, "ab", [0, 1, 0], np.zeros(3), np.zeros(3, np.uint8), [None] * 3, object(), b"abc", {}],
        )
        few = Bad((InvalidArgumentError,), lambda: [[], [True] * 9, np.zeros(0, bool), np.zeros((3, 1), bool)])
        late = Bad((StepError,), lambda: [0, 1, self.plan.step + 1, 2**40])
        yield Entry(
            scheduler.update,
            {"step": self.plan.step, "sampled_token_ids": self.samples, "num_sampled": None, "failed": None},
            {
                "step": [WRONG_NUMBERS, NOT_NONE, NEGATIVE, HUGE, late],
                "sampled_token_ids": samples,
                "num_sampled": [Bad(b.error, lambda b=b: [v for v in b.values() if v is not None]) for b in counts],
                "failed": [flags, few],
            },
        )
        yield Entry(
            scheduler.cancel, {"step": self.plan.step}, {"step": [WRONG_NUMBERS, NOT_NONE, NEGATIVE, HUGE, late]}
        )
        yield Entry(
            scheduler.finish,
            {"request_id": "r1", "reason": "stop", "index": 0},
            {"request_id": REQUEST, "reason": TEXT, "index": [*OPTIONAL_SIZE, TOO_MUCH]},
        )
        yield Entry(scheduler.abort, {"request_id": "r1"}, {"request_id": REQUEST})
        yield Entry(scheduler.explain, {"request_id": "r1"}, {"request_id": REQUEST})
        theirs = Bad((InvalidArgumentError,), lambda: [0x1_0000_0000, 0x1_0000_0001])
        for call in (
            scheduler.manager.free,
            scheduler.manager.preempt,
            scheduler.manager.fork,
            scheduler.manager.resume,
        ):
            yield Entry(call, {"seq": 0}, {"seq": [*HANDLE, theirs]}, name=f"Scheduler.manager.{call.__name__}")

        plan = self.plan.buffer.tobytes()
        not_bytes = Bad(
            (TypeError,), lambda: [None, 5, "plan", [1, 2], object(), np.zeros(9), array.array("i", [1]), {}]
        )
        not_plans = Bad(
            (InvalidArgumentError,),
            lambda: [
                b"",
                bytes(512),
                bytes(4096),
                plan[:-1],
                plan[:600],
                plan[1:],
                plan[8:],
                np.zeros((4, 512), np.uint8),
                np.broadcast_to(np.uint8(0), 2**40),
                np.frombuffer(plan, np.uint8)[::-1],
            ],
        )
        yield Entry(StepPlan.from_buffer, {"buf": plan}, {"buf": [not_bytes, not_plans]})


def spoiled(rng: random.Random, entry: Entry) -> tuple[dict[str, Any], str, Bad, Any]:
    name = rng.choice(sorted(entry.bad))
    bad = rng.choice(entry.bad[name])
    values = bad.values()
    value = values[rng.randrange(len(values))]
    return {**entry.valid, name: value}, name, bad, value


def test_malformed_calls() -> None:
    print(f"PAGEDCORE_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    world = World()
    before = world.snapshot()
    for i in range(CALLS):
        entry = rng.choice(world.entries)
        arguments, name, bad, value = spoiled(rng, entry)
        told = f"call {i}: {entry.name}({name}={type(value).__name__})"
        try:
            entry.call(**arguments)
        except Exception as caught:  # noqa: BLE001 - which one is what is looked at
            error = caught
        else:
            pytest.fail(f"{told} was taken")
        assert isinstance(error, bad.error), f"{told}: {error!r}"
        assert not isinstance(error, CorruptionError), f"{told}: {error}"
        assert str(error), told
        if isinstance(error, PagedCoreError):
            assert isinstance(error, (ValueError, KeyError, MemoryError, RuntimeError)), told
        assert world.snapshot() == before, told
        if i % 500 == 0:
            world.check()
    world.check()
    world.use()
    world.check()


def test_every_argument_refuses_every_bad_value() -> None:
    world = World()
    before = world.snapshot()
    taken = []
    for entry in world.entries:
        for name, bads in entry.bad.items():
            for bad in bads:
                for value in bad.values():
                    try:
                        entry.call(**{**entry.valid, name: value})
                    except bad.error:
                        pass
                    except Exception as error:  # noqa: BLE001
                        taken.append(f"{entry.name}({name}={value!r:.60}): {type(error).__name__}: {error}")
                    else:
                        taken.append(f"{entry.name}({name}={value!r:.60}) was taken")
                        world = World()
                        break
        assert world.snapshot() == before, entry.name
    assert not taken, "\n".join(taken)
    world.check()
    world.use()


def test_wrong_numbers_of_arguments() -> None:
    world = World()
    before = world.snapshot()
    for entry in world.entries:
        with pytest.raises(TypeError):
            entry.call(**entry.valid, no_such_argument=1)
        with pytest.raises(TypeError):
            entry.call(*entry.valid.values(), *range(20))
    for call in (
        world.pool.check,
        world.pool.stats,
        world.pool.begin_step,
        world.cache.reset,
        world.scheduler.schedule,
    ):
        with pytest.raises(TypeError):
            call(1)
    for cls in (StepPlan, type(world.scheduler.explain("r1")), PrefixHit, Commit, StepResult):
        with pytest.raises(TypeError):
            cls()
    assert world.snapshot() == before


def test_attributes_are_read_only() -> None:
    world = World()
    for obj, name in [
        (world.pool, "num_blocks"),
        (world.manager, "pool"),
        (world.scheduler, "config"),
        (world.scheduler.config, "num_blocks"),
        (world.plan, "step"),
        (KVGroup(), "window"),
    ]:
        with pytest.raises(AttributeError):
            setattr(obj, name, 5)
        with pytest.raises((AttributeError, TypeError)):
            obj.something_else = 5

"""Level 2 through Python: sequences, slots, copy-on-write, prefixes, preemption."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pagedcore import KVCacheManager, KVGroup
from pagedcore.errors import InvalidArgumentError, OutOfBlocksError, StaleHandleError, StepError, UnsupportedError

SIZE = 4


@pytest.fixture
def manager() -> KVCacheManager:
    return KVCacheManager(32, block_size=SIZE, vocab_size=1000)


def compute(manager: KVCacheManager, seq: int) -> None:
    """What a server does in a step, but for the tensors."""
    missing = manager.num_tokens(seq) - manager.num_computed_tokens(seq)
    manager.allocate_slots(seq, missing)
    manager.commit(seq, manager.num_tokens(seq))


def test_a_sequence_from_its_prompt_to_its_end(manager: KVCacheManager) -> None:
    seq = manager.add([1, 2, 3, 4, 5])
    assert (manager.num_tokens(seq), manager.num_computed_tokens(seq)) == (5, 0)
    assert manager.allocate_slots(seq, 5) == 0, "the table changed from its first entry on"
    table = manager.block_table(seq)
    assert (table.dtype, len(table)) == (np.int32, 2)
    slots = manager.slot_mapping(seq, 0, 5)
    assert slots.dtype == np.int64
    assert slots.tolist() == [table[i // SIZE] * SIZE + i % SIZE for i in range(5)]
    assert manager.commit(seq, 5) == 2, "nothing changed"
    manager.append(seq, [6])
    assert manager.allocate_slots(seq, 1) == 2, "it fits the last block"
    assert manager.commit(seq, 6) == 2
    assert manager.token_ids(seq).tolist() == [1, 2, 3, 4, 5, 6]
    manager.free(seq)
    assert (manager.pool.num_used, manager.pool.num_cached) == (0, 1)
    manager.check()


def test_slots_are_all_or_nothing_and_idempotent(manager: KVCacheManager) -> None:
    seq = manager.add(range(120))
    before = manager.stats()
    with pytest.raises(OutOfBlocksError) as caught:
        manager.allocate_slots(seq, 120, num_lookahead_tokens=10)
    assert (caught.value.needed, caught.value.free) == (33, 31)
    assert manager.stats() == before
    assert manager.allocate_slots(seq, 100, num_lookahead_tokens=24) == 0
    assert manager.allocate_slots(seq, 100, num_lookahead_tokens=24) == 31
    assert len(manager.block_table(seq)) == 31


def test_a_prompt_takes_its_hit_but_one_token_is_left(manager: KVCacheManager) -> None:
    first = manager.add(range(8))
    compute(manager, first)
    second = manager.add(range(8))
    assert manager.num_computed_tokens(second) == 4
    assert manager.block_table(second).tolist() == manager.block_table(first)[:1].tolist()
    longer = manager.add(range(12))
    assert manager.num_computed_tokens(longer) == 8
    foreign = [
        manager.add(range(8), tenant="b"),
        manager.add(range(8), cache_salt="b"),
        manager.add(range(8), extra_keys=("b",)),
        manager.add(range(8), content_keys=[(0, 2, b"b")]),
    ]
    assert [manager.num_computed_tokens(seq) for seq in foreign] == [0] * 4


def test_equal_blocks_are_merged_at_commit() -> None:
    for merge in (True, False):
        manager = KVCacheManager(32, SIZE, merge_blocks=merge)
        one, two = manager.add(range(9)), manager.add(range(9))
        for seq in (one, two):
            manager.allocate_slots(seq, 9)
        manager.commit(one, 9)
        own = manager.block_table(two).tolist()
        assert manager.commit(two, 9) == (0 if merge else 3), "the first entry that changed"
        shared = manager.block_table(one).tolist()[:2] + own[2:]
        assert manager.block_table(two).tolist() == (shared if merge else own)
        manager.check()


def test_forks_share_until_they_write(manager: KVCacheManager) -> None:
    parent = manager.add(range(6))
    compute(manager, parent)
    children = manager.fork(parent, 3)
    assert len(set(children)) == 3
    assert manager.pool.num_used == 2
    for i, child in enumerate(children):
        manager.append(child, [100 + i])
        assert manager.allocate_slots(child, 1) == 1
    source = manager.block_table(parent)[1]
    copies = manager.take_block_copies()
    assert (copies.dtype, copies.shape) == (np.int32, (3, 2))
    assert copies[:, 0].tolist() == [source] * 3
    assert copies[:, 1].tolist() == [manager.block_table(child)[1] for child in children]
    assert manager.take_block_copies().shape == (0, 2)
    manager.append(parent, [99])
    assert manager.allocate_slots(parent, 1) == 2, "the last one that shares it writes in place"
    assert manager.block_table(parent)[1] == source
    manager.check()


def test_a_copy_ends_with_its_destination(manager: KVCacheManager) -> None:
    parent = manager.add(range(6))
    compute(manager, parent)
    (child,) = manager.fork(parent)
    manager.append(child, [7])
    manager.allocate_slots(child, 1)
    manager.free(child)
    assert len(manager.take_block_copies()) == 0
    manager.check()


def test_blocks_that_change_tenant_are_zeroed() -> None:
    manager = KVCacheManager(3, SIZE)
    seq = manager.add(range(8), tenant="a")
    manager.allocate_slots(seq, 8)
    manager.free(seq)
    other = manager.add([1], tenant="b")
    manager.allocate_slots(other, 1)
    zero = manager.take_blocks_to_zero()
    assert zero.dtype == np.int32
    assert zero.tolist() == manager.block_table(other).tolist()


def test_truncation_gives_blocks_back(manager: KVCacheManager) -> None:
    seq = manager.add(range(10))
    manager.allocate_slots(seq, 10, num_lookahead_tokens=8)
    assert len(manager.block_table(seq)) == 5
    step = manager.pool.begin_step()
    assert manager.truncate(seq, 6, after_step=step) == 2
    assert (manager.num_tokens(seq), manager.pool.num_fenced) == (6, 3)
    manager.pool.complete_step(step)
    assert manager.pool.num_fenced == 0
    for num_tokens in (0, 7):
        with pytest.raises(InvalidArgumentError):
            manager.truncate(seq, num_tokens)
    with pytest.raises(StepError):
        manager.truncate(seq, 5, after_step=9)


def test_preemption_keeps_the_tokens(manager: KVCacheManager) -> None:
    seq = manager.add(range(10))
    compute(manager, seq)
    manager.preempt(seq)
    assert manager.is_preempted(seq)
    assert (manager.pool.num_used, manager.pool.num_cached) == (0, 2)
    with pytest.raises(InvalidArgumentError, match="preempted"):
        manager.allocate_slots(seq, 1)
    manager.append(seq, [10, 11])
    assert manager.resume(seq) == 8
    assert manager.num_computed_tokens(seq) == 8
    with pytest.raises(InvalidArgumentError, match="preempted"):
        manager.resume(seq)
    manager.check()


def test_without_caching_nothing_is_found() -> None:
    manager = KVCacheManager(32, SIZE, enable_prefix_caching=False)
    assert manager.cache is None
    for _ in range(2):
        seq = manager.add(range(9))
        assert manager.num_computed_tokens(seq) == 0
        compute(manager, seq)
    assert manager.stats()["cache"] is None
    assert manager.pool.num_used == 6


def test_tables_are_written_into_the_callers_memory(manager: KVCacheManager) -> None:
    seq = manager.add(range(10))
    manager.allocate_slots(seq, 10)
    table = np.full((2, 8), -1, np.int32)
    view = manager.block_table(seq, out=table[1])
    assert view.base is table
    assert table.tolist() == [[-1] * 8, [*view.tolist(), -1, -1, -1, -1, -1]]
    columns = np.full((16, 2), -1, np.int64)
    slots = manager.slot_mapping(seq, 2, 9, out=columns[:, 0])
    assert columns[:7, 0].tolist() == slots.tolist() == manager.slot_mapping(seq, 2, 9).tolist()
    assert (columns[7:, 0] == -1).all()
    assert (columns[:, 1] == -1).all()
    with pytest.raises(InvalidArgumentError, match="room for 2 values, 3 are needed"):
        manager.block_table(seq, out=table[0, :2])
    assert (table[0] == -1).all()


def test_tables_are_written_into_tensors(manager: KVCacheManager) -> None:
    torch = pytest.importorskip("torch")
    seq = manager.add(range(10))
    manager.allocate_slots(seq, 10)
    out = torch.full((5,), -1, dtype=torch.int32)
    manager.block_table(seq, out=out)
    assert out.tolist() == [*manager.block_table(seq).tolist(), -1, -1]


def test_handles_end(manager: KVCacheManager) -> None:
    seq = manager.add([1])
    manager.free(seq)
    again = manager.add([2])
    assert again != seq
    for call in (manager.num_tokens, manager.free, manager.fork, manager.block_table, manager.preempt, manager.resume):
        with pytest.raises(StaleHandleError) as caught:
            call(seq)
        assert (caught.value.kind, caught.value.handle) == ("sequence", seq)
    assert manager.num_tokens(again) == 1


def test_groups_are_what_this_version_does() -> None:
    KVCacheManager(8, groups=[KVGroup()])
    for groups in [(KVGroup(window=4),), (KVGroup(), KVGroup())]:
        with pytest.raises(UnsupportedError) as caught:
            KVCacheManager(8, groups=groups)
        assert caught.value.argument == "groups"
    assert KVGroup(4) == KVGroup(window=4) != KVGroup()
    assert len({KVGroup(), KVGroup(None), KVGroup(1)}) == 2
    assert repr(KVGroup(4)) == "KVGroup(window=4)"


def test_views_are_of_the_same_core(manager: KVCacheManager) -> None:
    seq = manager.add(range(9))
    compute(manager, seq)
    assert manager.cache.pool.num_used == manager.pool.num_used == manager.stats()["pool"]["num_used"] == 3
    assert manager.cache.probe(range(9), manager.cache.namespace()) == 8
    stats = manager.stats()
    assert json.loads(json.dumps(stats)) == stats
    assert repr(manager) == "KVCacheManager(num_blocks=32, block_size=4, num_sequences=1, num_used=3)"

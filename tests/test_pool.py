"""Level 0 through Python: blocks, references, fences."""

from __future__ import annotations

import array
import ctypes
import json

import numpy as np
import pytest
from pagedcore import BlockPool
from pagedcore.errors import BlockError, InvalidArgumentError, OutOfBlocksError, StepError


def counts(pool: BlockPool) -> tuple[int, int, int, int]:
    return pool.num_free, pool.num_cached, pool.num_used, pool.num_fenced


def test_blocks_are_handed_out_once_and_come_back() -> None:
    pool = BlockPool(10, block_size=4)
    assert (pool.num_blocks, pool.block_size) == (10, 4)
    blocks = pool.allocate(9)
    assert blocks.dtype == np.int32
    assert blocks.shape == (9,)
    assert sorted(blocks.tolist()) == list(range(1, 10))
    assert counts(pool) == (0, 0, 9, 0)
    pool.release(blocks)
    assert counts(pool) == (9, 0, 0, 0)
    pool.check()


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    pool = BlockPool(10)
    pool.allocate(4)
    before = pool.stats()
    with pytest.raises(OutOfBlocksError, match="needed 6 blocks, 5 can be had") as caught:
        pool.allocate(6)
    assert (caught.value.needed, caught.value.free) == (6, 5)
    assert isinstance(caught.value, MemoryError)
    assert caught.value.hint
    assert pool.stats() == before
    assert len(pool.allocate(5)) == 5


def test_nothing_can_be_asked_for() -> None:
    pool = BlockPool(2)
    empty = pool.allocate(0)
    assert (empty.dtype, empty.shape) == (np.int32, (0,))
    pool.retain([])
    pool.release(empty)


def test_references_are_counted() -> None:
    pool = BlockPool(10)
    (block,) = pool.allocate(1).tolist()
    assert (pool.ref_count(block), pool.ref_count(0), pool.ref_count(9)) == (1, 0, 0)
    pool.retain([block, block])
    assert pool.ref_count(block) == 3
    pool.release([block])
    pool.release([block, block])
    assert pool.num_free == 9


@pytest.mark.parametrize("blocks", [[1, 9], [1, 0], [1, 10], [1, 1], [1, -1], [1, 2**31], [1, 2**64]])
def test_a_release_is_all_or_nothing(blocks: list[int]) -> None:
    pool = BlockPool(10)
    assert pool.allocate(2).tolist() == [1, 2]
    before = pool.stats()
    with pytest.raises(BlockError) as caught:
        pool.release(blocks)
    assert caught.value.block == blocks[1]
    assert caught.value.num_blocks == 10
    assert pool.stats() == before
    assert pool.ref_count(1) == 1
    pool.check()


def test_a_fence_delays_reuse() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    first, second = pool.begin_step(), pool.begin_step()
    assert (first, second) == (1, 2)
    pool.release(blocks[:1], after_step=0)  # no step reads it
    pool.release(blocks[1:2], after_step=first)
    pool.release(blocks[2:])  # the newest
    assert counts(pool) == (1, 0, 0, 2)
    pool.complete_step(second)
    assert counts(pool) == (1, 0, 0, 2), "the second step's fence also waits for the first"
    pool.complete_step(first)
    assert counts(pool) == (3, 0, 0, 0)


def test_steps_are_refused_out_of_order() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    with pytest.raises(StepError) as caught:
        pool.release(blocks, after_step=1)
    assert (caught.value.step, caught.value.expected) == (1, 0)
    with pytest.raises(StepError):
        pool.complete_step(1)
    step = pool.begin_step()
    pool.complete_step(step)
    with pytest.raises(StepError, match="complete already"):
        pool.complete_step(step)
    assert pool.num_used == 1


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a,
        lambda a: a.astype(np.int64),
        lambda a: a[::-1],
        lambda a: np.repeat(a, 2)[::2],
        lambda a: np.stack([a, a], axis=1)[:, 0],
        lambda a: a.tolist(),
        lambda a: tuple(a),
        lambda a: range(a[0], a[-1] + 1),
        lambda a: array.array("i", a),
        lambda a: array.array("q", a),
        lambda a: memoryview(a),
        lambda a: (ctypes.c_int32 * len(a))(*a),
        lambda a: (ctypes.c_int64 * len(a))(*a),
        lambda a: memoryview((ctypes.c_int32 * len(a))(*a)),
    ],
    ids=lambda f: "",
)
def test_ids_come_in_any_integer_buffer(convert) -> None:
    pool = BlockPool(10)
    blocks = pool.allocate(4)
    pool.retain(convert(blocks))
    assert [pool.ref_count(b) for b in blocks] == [2] * 4
    pool.release(convert(blocks))
    pool.release(convert(blocks))
    assert pool.num_free == 9


def test_ids_come_in_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    pool = BlockPool(10)
    blocks = torch.from_numpy(pool.allocate(4))
    pool.retain(blocks)
    pool.release(blocks.long())
    pool.release(blocks.flip(0))
    assert pool.num_free == 9
    with pytest.raises(TypeError, match="float32"):
        pool.retain(torch.ones(1))
    with pytest.raises(TypeError, match="meta"):
        pool.retain(torch.ones(1, dtype=torch.int32, device="meta"))


def test_ids_come_through_dlpack() -> None:
    class Foreign:
        """An array of a library that NumPy knows nothing of."""

        def __init__(self, data: np.ndarray) -> None:
            self.data = data

        def __dlpack__(self, **kwargs: object) -> object:
            return self.data.__dlpack__(**kwargs)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.data.__dlpack_device__()

    pool = BlockPool(10)
    pool.release(Foreign(pool.allocate(3)))
    assert pool.num_free == 9


def test_sizes_are_checked() -> None:
    for num_blocks in (0, 1, -1, 2**31, 2**64):
        with pytest.raises(InvalidArgumentError) as caught:
            BlockPool(num_blocks)
        assert (caught.value.argument, caught.value.got) == ("num_blocks", num_blocks)
    for block_size in (0, -1, 2**16 + 1, 2**64):
        with pytest.raises(InvalidArgumentError) as caught:
            BlockPool(10, block_size)
        assert (caught.value.argument, caught.value.got) == ("block_size", block_size)


def test_stats_are_plain_data() -> None:
    pool = BlockPool(10)
    pool.release(pool.allocate(3))
    stats = pool.stats()
    assert json.loads(json.dumps(stats)) == stats
    assert (stats["peak_used"], stats["allocated"], stats["num_free"]) == (3, 3, 9)
    assert "num_free=9" in repr(pool)


def test_the_null_block_belongs_to_nobody() -> None:
    pool = BlockPool(10)
    for call in (pool.retain, pool.release):
        with pytest.raises(BlockError, match="null block") as caught:
            call([0])
        assert caught.value.block == 0

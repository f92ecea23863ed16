"""gather_blocks, scatter_blocks and update_block_table on the CPU, and what plans are there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pagedcore import _kernels, ops
from pagedcore.errors import BlockError, InvalidArgumentError, UnsupportedError
from pagedcore.layout import KVCacheLayout
from reference import empty_cache

ORDERS = ["HND", "NHD", "strided", "heads first"]


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_whole_cache_there_and_back(order: str, library: str) -> None:
    layout = KVCacheLayout(6, 4, 3, 2, 24, "float32", order=order)
    kv, other = layout.allocate(library=library), layout.allocate(library=library)
    torch.as_tensor(kv.data).random_(0, 64)  # never NaN
    blocks = int32(4, 1, 1, 0)
    staging = torch.empty(4, layout.block_bytes, dtype=torch.uint8)
    ops.gather_blocks(kv, blocks, staging)
    ops.scatter_blocks(other, blocks, staging)
    moved, still = [4, 1, 0], [2, 3, 5]
    for layer in range(3):
        for theirs, ours in zip(other.layer(layer), kv.layer(layer), strict=True):
            assert torch.equal(torch.as_tensor(theirs)[moved], torch.as_tensor(ours)[moved])
            assert (torch.as_tensor(theirs)[still] == 0).all()


def test_what_lies_where() -> None:
    """Tensor of kv after tensor, entry after entry, a block's bytes in memory order."""
    first = torch.arange(24, dtype=torch.int32).reshape(4, 2, 3)
    second = torch.arange(100, 108, dtype=torch.int32).reshape(4, 2)
    staging = torch.empty(2 * 6 + 2 * 2, dtype=torch.int32)
    ops.gather_blocks([first.transpose(1, 2), second], int32(3, 1), staging)
    assert staging.tolist() == [18, 19, 20, 21, 22, 23, 6, 7, 8, 9, 10, 11, 106, 107, 102, 103]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_threads", [1, 4])
def test_strided_caches_on_several_threads(order: str, num_threads: int) -> None:
    cache = empty_cache(order, 40, 3, 64, 33, torch.float32, "cpu")
    cache.copy_(torch.randn(cache.shape))
    blocks = torch.randperm(40)[:30].int()
    staging = torch.empty(30, cache[0].nbytes, dtype=torch.uint8)
    ops.gather_blocks(cache, blocks, staging, num_threads=num_threads)
    copy = empty_cache(order, 40, 3, 64, 33, torch.float32, "cpu")
    ops.scatter_blocks(copy, blocks, staging, num_threads=num_threads)
    assert torch.equal(copy[blocks.long()], cache[blocks.long()])
    assert int(copy.isnan().sum()) == 10 * cache[0].numel()  # nothing else was touched


def test_of_two_entries_with_one_block_the_later_is_kept() -> None:
    cache = torch.zeros(3, 100_000)
    staging = torch.arange(50.0)[:, None].expand(50, 100_000).contiguous()
    ops.scatter_blocks(cache, int32(*[1] * 50), staging, num_threads=4)
    assert (cache[1] == 49).all()


def test_nothing_to_move() -> None:
    cache = torch.ones(3, 4)
    ops.gather_blocks(cache, int32(), torch.empty(0, dtype=torch.uint8))
    ops.scatter_blocks([], int32(), torch.empty(0))
    ops.update_block_table(torch.ones(2, 2, dtype=torch.int32), torch.empty(0, 3, dtype=torch.int32))


@pytest.mark.parametrize("op", [ops.gather_blocks, ops.scatter_blocks])
@pytest.mark.parametrize("bad", [-1, 3, 2**31 - 1])
def test_a_bad_block_moves_nothing(op: Any, bad: int) -> None:
    cache, staging = torch.ones(3, 4), torch.zeros(2, 4)
    with pytest.raises(BlockError, match=rf"blocks: expected ids in \[0, 3\), got block {bad} at index 1") as caught:
        op(cache, int32(0, bad), staging)
    assert (caught.value.block, caught.value.num_blocks) == (bad, 3)
    assert (cache == 1).all()
    assert (staging == 0).all()


@pytest.mark.parametrize(
    ("staging", "message"),
    [
        (torch.zeros(2, 3), "expected 32 bytes: 2 blocks of 16, got 24"),
        (torch.zeros(2, 8)[:, ::2], "expected contiguous memory, got stride 2 on axis 1"),
        (torch.zeros(1, 4).expand(2, 4), "expected contiguous memory, got stride 0 on axis 0"),
    ],
)
def test_staging_buffers_that_do_not_do(staging: torch.Tensor, message: str) -> None:
    for op, name in ((ops.gather_blocks, "out"), (ops.scatter_blocks, "src")):
        with pytest.raises(InvalidArgumentError, match=f"^{name}: {message}"):
            op(torch.ones(3, 4), int32(0, 1), staging)


def test_staging_apart_from_the_cache() -> None:
    cache = torch.ones(5, 4)
    for op in (ops.gather_blocks, ops.scatter_blocks):
        with pytest.raises(InvalidArgumentError, match=r"^kv: expected memory apart from (out|src)"):
            op(cache[:3], int32(0, 1), cache[2:4])


def test_read_only_staging() -> None:
    staging = np.zeros((2, 4), np.float32)
    staging.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match=r"^out: expected writable memory"):
        ops.gather_blocks(torch.ones(3, 4), int32(0, 1), staging)
    cache = torch.ones(3, 4)
    ops.scatter_blocks(cache, int32(0, 1), staging)
    assert cache.sum() == 4


# -------------------------------------------------------------------------------------------------- block tables


def test_updates() -> None:
    table = torch.zeros(3, 8, dtype=torch.int32)[:, :5]  # rows need not touch
    ops.update_block_table(table, int32([0, 0, 7], [2, 4, 9], [0, 0, 8]))
    assert table.tolist() == [[8, 0, 0, 0, 0], [0] * 5, [0, 0, 0, 0, 9]]


@pytest.mark.parametrize("bad", [(3, 0), (-1, 0), (0, 5), (0, -1), (2**31 - 1, 0)])
def test_an_update_outside_of_the_table_changes_nothing(bad: tuple[int, int]) -> None:
    table = torch.zeros(3, 5, dtype=torch.int32)
    message = rf"updates\[1\]: expected a row below 3 and an index below 5, got \({bad[0]}, {bad[1]}\)"
    with pytest.raises(InvalidArgumentError, match=message):
        ops.update_block_table(table, int32([0, 0, 7], [*bad, 9]))
    assert (table == 0).all()


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), r"expected contiguous int32 \[2, 3\]"),
        (torch.zeros(2, 6, dtype=torch.int32)[:, :3], r"expected contiguous int32 \[2, 3\]"),
        (torch.zeros(2, 3, dtype=torch.int64), "expected dtype int32"),
        (torch.zeros(6, dtype=torch.int32), r"expected shape \[num_updates, 3\]"),
    ],
)
def test_updates_that_do_not_do(updates: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^updates: {message}"):
        ops.update_block_table(torch.zeros(3, 5, dtype=torch.int32), updates)


# --------------------------------------------------------------------------------------------------------- plans


def plan(**changes: Any) -> Any:
    given = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "max_query_len": 1} | changes
    return ops.plan_attention(int32(5, 8), int32(0, 1, 2), **given)


def test_the_cpu_plans_as_it_attends() -> None:
    assert plan().shape == (0,)
    assert plan(window=4, split_size=16, dtype=torch.float32).dtype == torch.uint8
    assert ops.plan_attention(np.array([3], np.int32), np.array([0, 1], np.int32), num_heads=1, num_kv_heads=1,
                              head_dim=8, max_query_len=1).dtype == np.uint8  # fmt: skip
    assert ops.attention_plan_size(10, 10, 4, 2, 64, device="cpu") == 0
    ops.warmup("cpu")
    assert ops.device_errors("cpu") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads: expected a multiple of num_kv_heads = 2, got 3"),
        ({"num_heads": 0}, "num_heads: expected 1 to 2147483647, got 0"),
        ({"head_dim": 257}, "head_dim: expected 1 to 256, got 257"),
        ({"v_head_dim": 300}, "v_head_dim: expected 1 to 256, got 300"),
        ({"max_query_len": -1, "num_tokens": 2}, "max_query_len: expected 0 or more, got -1"),
        ({"max_query_len": 1, "num_tokens": -2}, "num_tokens: expected 0 or more, got -2"),
        ({"num_tokens": 2**35}, "num_tokens: expected at most 1073741823, got 34359738368"),
        (
            {"max_query_len": 4},
            r"num_tokens: expected the number of query tokens where max_query_len is not 1 but 4, got None",
        ),
        ({"dtype": "float64"}, "dtype: expected one of"),
        ({"num_heads": "4"}, "num_heads: expected an int, got '4'"),
        ({"num_tokens": "2"}, "num_tokens: expected an int, got '2'"),
        ({"window": 0}, "window: expected 1 or more, got 0"),
        ({"split_size": -2}, "split_size: expected None, 0 or a number of tokens, got -2"),
    ],
)
def test_plans_of_what_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{message}"):
        plan(**changes)


@pytest.mark.parametrize("size", [ops.attention_workspace_size, ops.attention_plan_size])
def test_sizes_of_what_cannot_be(size: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^split_size: expected None, 0 or a number of tokens, got -1"):
        size(4, 4, 8, 2, 64, device="cpu", split_size=-1)
    with pytest.raises(TypeError, match=r"^split_size: expected an int or None, got str"):
        size(4, 4, 8, 2, 64, device="cpu", split_size="a")
    with pytest.raises(InvalidArgumentError, match=r"^num_tokens: expected at most 536870911, got 536870912"):
        size(2**29, 4, 8, 2, 64, device="cpu")
    with pytest.raises(InvalidArgumentError, match=r"^seq_lens: expected at most 2\^30 sequences, got 1073741825"):
        size(4, 2**30 + 1, 8, 2, 64, device="cpu")


@pytest.mark.parametrize(
    "size",
    [ops.attention_workspace_size, ops.attention_plan_size, ops.cascade_workspace_size, ops.cascade_plan_size],
)
@pytest.mark.parametrize("at", range(6))
def test_sizes_that_are_no_number(size: Any, at: int) -> None:
    """Are told by the name of the argument."""
    name = ("max_num_tokens", "max_num_seqs", "num_heads", "num_kv_heads", "head_dim", "v_head_dim")[at]
    sizes: list[Any] = [4, 4, 8, 2, 64, 64]
    for wrong in ("8", 8.5, math.nan):
        sizes[at] = wrong
        with pytest.raises(InvalidArgumentError, match=f"^{name}: expected an int, got {wrong!r}$"):
            size(*sizes[:5], v_head_dim=sizes[5], device="cpu")


@pytest.mark.skipif(_kernels.gpu_facts()["images"] is not None, reason="these kernels were built with CUDA")
def test_a_gpu_where_none_was_built_for() -> None:
    calls = {
        "warmup": lambda: ops.warmup("cuda:1"),
        "errors": lambda: ops.device_errors("cuda:1"),
        "size": lambda: ops.attention_workspace_size(4, 4, 8, 2, 64, device="cuda:1"),
    }
    for call in calls.values():
        message = "^device: expected the CPU, as this build of pagedcore has no GPU kernels, got cuda:1$"
        with pytest.raises(UnsupportedError, match=message):
            call()


def test_a_plan_needs_query_starts_that_fit() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^query_start_loc: expected 3 entries, one more than seq_lens has"):
        ops.plan_attention(int32(5, 8), int32(0, 1), num_heads=4, num_kv_heads=2, head_dim=64, max_query_len=1)

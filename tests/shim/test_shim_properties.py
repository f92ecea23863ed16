"""What attention on the GPU's kernels satisfies whatever the data: identities, to the bit where nothing may change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from device import attend, check_tiled
from reference import Batch, check, make_batch

SEQ_LENS = [0, 1, 17, 64, 65, 200, 40]
QUERY_LENS = [1, 1, 3, 1, 2, 1, 40]
KERNELS = pytest.mark.parametrize("kernel", ["generic", "tiled"])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@KERNELS
@HALVES
def test_constant_values_come_back(plain_shim: Any, kernel: str, dtype: torch.dtype) -> None:
    """V = 1 gives O = 1: the weights that are multiplied are the ones that are summed."""
    batch = make_batch(SEQ_LENS, QUERY_LENS, dtype=dtype)
    batch.v_cache[~batch.v_cache.isnan()] = 1
    out, lse = attend(plain_shim, batch, kernel)
    seen = ~lse.isneginf()
    assert (out[seen] == 1).all()
    assert (out[~seen] == 0).all()


@KERNELS
def test_where_pages_lie_changes_no_bit(plain_shim: Any, kernel: str) -> None:
    batch = make_batch(SEQ_LENS, QUERY_LENS, dtype=torch.bfloat16)
    order = torch.randperm(len(batch.k_cache), generator=torch.Generator().manual_seed(1))
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    known = batch.block_table >= 0
    table = batch.block_table.clone()
    table[known] = places[batch.block_table[known].long()].int()
    moved = replace(batch, k_cache=batch.k_cache[order], v_cache=batch.v_cache[order], block_table=table)
    assert equal(attend(plain_shim, moved, kernel, seed=3), attend(plain_shim, batch, kernel, seed=3))


@KERNELS
@pytest.mark.parametrize("order", ["NHD", "heads first"])
def test_strides_change_no_bit(plain_shim: Any, kernel: str, order: str) -> None:
    batch, strided = (make_batch(SEQ_LENS, QUERY_LENS, dtype=torch.float16, order=o) for o in ("HND", order))
    assert equal(attend(plain_shim, strided, kernel), attend(plain_shim, batch, kernel))


@KERNELS
@pytest.mark.parametrize("window", [None, 20])
def test_what_nobody_sees_changes_nothing(shim: Any, kernel: str, window: int | None) -> None:
    """Unwritten slots and freed blocks hold NaN in every batch here: zeros there give the same bits."""
    batch = make_batch(SEQ_LENS, QUERY_LENS, dtype=torch.bfloat16, window=window)
    assert batch.k_cache.isnan().any()
    clean = replace(batch, k_cache=batch.k_cache.nan_to_num(0), v_cache=batch.v_cache.nan_to_num(0))
    got = attend(shim, batch, kernel, window=window)
    assert equal(got, attend(shim, clean, kernel, window=window))
    check(batch, *got, whole_references=kernel == "tiled", window=window)


@KERNELS
def test_a_window_over_everything_is_none(plain_shim: Any, kernel: str) -> None:
    batch = make_batch(SEQ_LENS, QUERY_LENS, dtype=torch.bfloat16)
    assert equal(attend(plain_shim, batch, kernel, window=max(SEQ_LENS)), attend(plain_shim, batch, kernel))


@KERNELS
def test_packed_heads_equal_heads_alone(plain_shim: Any, kernel: str) -> None:
    """Query heads that share a KV head, and the same with that head repeated for each."""
    batch = make_batch(SEQ_LENS, QUERY_LENS, dtype=torch.float16, heads=(6, 2))
    repeated = replace(
        batch, k_cache=batch.k_cache.repeat_interleave(3, 1), v_cache=batch.v_cache.repeat_interleave(3, 1)
    )
    packed, alone = (attend(plain_shim, b, kernel, grid=1) for b in (batch, repeated))
    torch.testing.assert_close(packed, alone, rtol=2e-3, atol=1e-3)
    check(batch, *packed, whole_references=kernel == "tiled")
    check(repeated, *alone, whole_references=kernel == "tiled")


@KERNELS
@HALVES
def test_scores_that_grow(shim: Any, kernel: str, dtype: torch.dtype) -> None:
    """A maximum that keeps rising makes every earlier weight smaller: sums and output are rescaled on the way."""
    batch = make_batch([300, 130, 64], [1, 2, 5], dtype=dtype)
    growing(batch)
    check(batch, *attend(shim, batch, kernel), whole_references=kernel == "tiled")


def growing(batch: Batch) -> None:
    """Scores grow along each sequence, from about 0 to about 30."""
    for seq, length in enumerate(batch.seq_lens.tolist()):
        block_size = batch.k_cache.shape[2]
        direction = batch.query[int(batch.query_start_loc[seq])].float().mean(0)
        for position in range(length):
            block, slot = int(batch.block_table[seq, position // block_size]), position % block_size
            size = 30 * position / length * batch.query.shape[2] ** 0.5 / float(direction @ direction)
            batch.k_cache[block, :, slot] += (direction * size).to(batch.k_cache.dtype)


@pytest.mark.parametrize("grid", [1, 5, 20])
def test_layers_that_share_a_plan(shim: Any, grid: int) -> None:
    """Each writes its own output: the plan is as it was after the one before."""
    batch = make_batch([700, 3, 300], [1, 1, 2], dtype=torch.bfloat16)
    check_tiled(batch, *attend(shim, batch, "tiled", grid=grid, launches=3))

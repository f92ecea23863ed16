"""Tiles of 64 and 128 rows, under the shim: chunks of prompts beside decoding sequences, and prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from device import Attention, Device, attend, check_tiled
from reference import make_batch
from shim_build import CHECKED_HEAD_DIMS, TILED_HEAD_DIMS

if TYPE_CHECKING:
    from reference import Batch

HALVES = [torch.float16, torch.bfloat16]


def mixed_batch(**options: Any) -> Batch:
    """Rows that see nothing, decoding sequences, chunks with and without history, of a tile and of more."""
    return make_batch([0, 5, 70, 130, 33], [1, 1, 20, 36, 33], **{"dtype": torch.bfloat16, "heads": (4, 2), **options})


def prompts_batch(**options: Any) -> Batch:
    """All alike, and of more rows than a tile of 128 has."""
    return make_batch([70, 150, 65], [65, 65, 65], **{"dtype": torch.bfloat16, "heads": (2, 1), **options})


BATCHES = pytest.mark.parametrize("make", [mixed_batch, prompts_batch], ids=["mixed", "prompts"])


@BATCHES
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", TILED_HEAD_DIMS)
def test_head_sizes(plain_shim: Any, make: Any, dtype: torch.dtype, head_dim: int) -> None:
    batch = make(dtype=dtype, head_dim=head_dim)
    check_tiled(batch, *attend(plain_shim, batch, "tiled"))


@BATCHES
@pytest.mark.parametrize("head_dim", CHECKED_HEAD_DIMS)
def test_head_sizes_without_races(race_shim: Any, make: Any, head_dim: int) -> None:
    batch = make(head_dim=head_dim)
    check_tiled(batch, *attend(race_shim, batch, "tiled"))


@pytest.mark.parametrize("query_len", [1, 2, 5, 16, 17, 128, 300])
@pytest.mark.parametrize("heads", [(1, 1), (4, 1)], ids=str)
def test_query_lengths(plain_shim: Any, query_len: int, heads: tuple[int, int]) -> None:
    """A chunk with history beside a sequence that decodes, a prompt without history, and one longer than its keys."""
    lengths, queries = [query_len + 45, 77, query_len], [query_len, 1, query_len]
    if query_len <= 17:
        lengths, queries = [*lengths, query_len // 2], [*queries, query_len]
    batch = make_batch(lengths, queries, dtype=torch.float16, heads=heads)
    check_tiled(batch, *attend(plain_shim, batch, "tiled"))


@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (32, 8), (28, 4), (71, 1)], ids=str)
def test_groups(plain_shim: Any, heads: tuple[int, int]) -> None:
    batch = make_batch([40, 100, 0, 70], [17, 1, 1, 3], dtype=torch.bfloat16, heads=heads)
    check_tiled(batch, *attend(plain_shim, batch, "tiled"))


@BATCHES
@pytest.mark.parametrize("grid", [1, 3, 7, 40])
def test_however_the_work_is_cut(shim: Any, make: Any, grid: int) -> None:
    """Items whole, split in two and over many blocks, in any order of arrival; twice over one plan, as layers do."""
    batch = make(seed=grid)
    check_tiled(batch, *attend(shim, batch, "tiled", grid=grid, launches=2, seed=grid))


@BATCHES
@pytest.mark.parametrize("block_size", [1, 3, 16, 128])
@pytest.mark.parametrize("order", ["HND", "NHD", "heads first"])
def test_layouts(plain_shim: Any, make: Any, block_size: int, order: str) -> None:
    batch = make(block_size=block_size, order=order)
    check_tiled(batch, *attend(plain_shim, batch, "tiled"))


@BATCHES
@pytest.mark.parametrize("window", [1, 16, 33, 64, 98, 1000])
def test_window(plain_shim: Any, make: Any, window: int) -> None:
    """98: the first keys of all are in the window of a warp's first query, and not in its last one's."""
    batch = make(window=window)
    check_tiled(batch, *attend(plain_shim, batch, "tiled", window=window), window=window)


@BATCHES
def test_not_causal(plain_shim: Any, make: Any) -> None:
    batch = make()
    check_tiled(batch, *attend(plain_shim, batch, "tiled", causal=False), causal=False)


@BATCHES
def test_blocks_out_of_range_are_masked(plain_shim: Any, make: Any) -> None:
    """As if the keys in them were none: among values of 1 the mean stays 1."""
    batch = make()
    batch.v_cache.fill_(1.0)
    seq = int(batch.seq_lens.argmax())
    batch.block_table[seq, 0] = len(batch.k_cache)
    out, _ = attend(plain_shim, batch, "tiled")
    rows = slice(*batch.query_start_loc[seq : seq + 2].tolist())
    assert (out[rows] == 1).all()


@BATCHES
def test_where_pages_lie_changes_no_bit(plain_shim: Any, make: Any) -> None:
    batch, moved = make(), make()
    order = torch.randperm(len(batch.k_cache), generator=torch.Generator().manual_seed(3))
    for name in ("k_cache", "v_cache"):
        getattr(moved, name)[order] = getattr(batch, name)
    table = batch.block_table
    inside = (table >= 0) & (table < len(order))
    moved.block_table[inside] = order[table[inside].long()].int()
    for one, other in zip(attend(plain_shim, batch, "tiled"), attend(plain_shim, moved, "tiled"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_row_is_the_same_in_tiles_of_64_and_of_128(plain_shim: Any, head_dim: int) -> None:
    batch = make_batch([70, 150, 65], [20, 20, 20], dtype=torch.float16, heads=(17, 1), head_dim=head_dim)
    large = attend(plain_shim, batch, "tiled", split_size=0)
    # A longer query than any is one that the host may expect: then not all are known to be alike.
    small = attend(plain_shim, batch, "tiled", split_size=0, max_query_len=21)
    for one, other in zip(large, small, strict=True):
        assert torch.equal(one, other)
    check_tiled(batch, *small)


def test_tokens_of_no_sequence_are_zero(shim: Any) -> None:
    batch, padded = mixed_batch(), mixed_batch()
    count = len(batch.query)
    padded.query = torch.cat([batch.query, torch.full((3, *batch.query.shape[1:]), float("nan"), dtype=torch.bfloat16)])
    out, lse = attend(shim, padded, "tiled")
    check_tiled(batch, out[:count], lse[:count])
    assert (out[count:] == 0).all()
    assert lse[count:].isneginf().all()


@BATCHES
def test_nan_where_a_query_looks_shows(plain_shim: Any, make: Any) -> None:
    batch = make()
    token = int(batch.query_start_loc[2]) - 1
    batch.query[token, 1] = float("nan")
    out, _ = attend(plain_shim, batch, "tiled")
    assert out[token, 1].isnan().all()
    out[token, 1] = 0
    assert out.isfinite().all()


@pytest.mark.shim_only
def test_a_recorded_step_runs_with_other_lengths(shim: Any) -> None:
    """Chunks and decoding sequences change places: the same shapes are another batch at the next replay."""
    batch = make_batch([100, 130, 64], [20, 1, 10], dtype=torch.float16)
    with Device(shim) as device:
        attention = Attention(device, batch, max_query_len=20)
        recording = shim.Recording()
        attention.launch("tiled", grid=7, launches=2)
        recording.stop()
        for lengths, queries in (([100, 130, 64], [20, 1, 10]), ([1, 99, 30], [1, 20, 10]), ([50, 0, 40], [20, 1, 5])):
            batch.seq_lens = torch.tensor(lengths, dtype=torch.int32)
            batch.query_start_loc = torch.tensor([0, *queries]).cumsum(0).int()
            for name in ("seq_lens", "query_start_loc"):
                values = getattr(batch, name)
                shim.copy_to_device(attention.fields[name], values.data_ptr(), values.nbytes)
            recording.replay()
            out, lse = attention.result()
            count = int(batch.query_start_loc[-1])
            query, batch.query = batch.query, batch.query[:count]
            check_tiled(batch, out[:count], lse[:count])
            batch.query = query
            assert (out[count:] == 0).all()

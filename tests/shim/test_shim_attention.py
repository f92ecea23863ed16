"""Attention on the GPU's kernels, run by the host shim, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import Attention, Device, attend, check_tiled
from reference import check, make_batch

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HALVES = FLOATS[1:]
LENGTHS = [0, 1, 15, 16, 17, 64, 65, 130]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "v_head_dim", "block_size", "order"),
    [
        ((4, 2), 64, None, 16, "HND"),
        ((8, 1), 80, None, 1, "NHD"),
        ((3, 3), 33, 17, 5, "strided"),
        ((2, 1), 256, 128, 7, "heads first"),
    ],
)
def test_generic(
    shim: Any,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    v_head_dim: int | None,
    block_size: int,
    order: str,
) -> None:
    batch = make_batch(
        LENGTHS,
        [1, 1, 3, 1, 2, 1, 5, 1],
        dtype=dtype,
        heads=heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        block_size=block_size,
        order=order,
    )
    check(batch, *attend(shim, batch, "generic"))


@pytest.mark.parametrize(("window", "causal"), [(1, True), (20, True), (500, True), (None, False)])
def test_generic_masks(plain_shim: Any, window: int | None, causal: bool) -> None:
    batch = make_batch(LENGTHS, [1, 1, 3, 1, 2, 1, 5, 1], window=window)
    options = {"window": window, "causal": causal}
    check(batch, *attend(plain_shim, batch, "generic", **options), **options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_decode_head_sizes(shim: Any, dtype: torch.dtype, head_dim: int) -> None:
    batch = make_batch(LENGTHS, [1] * 8, dtype=dtype, heads=(8, 2), head_dim=head_dim)
    check_tiled(batch, *attend(shim, batch, "tiled"))


@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (32, 8), (28, 4), (71, 1)], ids=str)
@pytest.mark.parametrize("query_len", [1, 2, 5])
def test_decode_groups(plain_shim: Any, heads: tuple[int, int], query_len: int) -> None:
    batch = make_batch([40, 200, 0, 7], [query_len, 1, 1, query_len], dtype=torch.bfloat16, heads=heads)
    check_tiled(batch, *attend(plain_shim, batch, "tiled"))


@pytest.mark.parametrize("grid", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("seed", range(3))
def test_decode_however_the_work_is_cut(shim: Any, grid: int, seed: int) -> None:
    """Items whole, split in two and over many blocks, in any order of arrival; twice over one plan, as layers do."""
    batch = make_batch([700, 3, 64, 300], [1, 1, 1, 2], dtype=torch.float16, heads=(4, 2), seed=seed)
    check_tiled(batch, *attend(shim, batch, "tiled", grid=grid, launches=2, seed=seed))


@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 128])
@pytest.mark.parametrize("order", ["HND", "NHD", "heads first"])
def test_decode_layouts(plain_shim: Any, block_size: int, order: str) -> None:
    batch = make_batch(LENGTHS, [1] * 8, dtype=torch.bfloat16, block_size=block_size, order=order)
    check_tiled(batch, *attend(plain_shim, batch, "tiled"))


@pytest.mark.parametrize("window", [1, 16, 33, 64, 1000])
def test_decode_window(shim: Any, window: int) -> None:
    batch = make_batch([0, 1, 17, 64, 65, 300], [1, 1, 4, 1, 1, 3], dtype=torch.bfloat16, window=window)
    check_tiled(batch, *attend(shim, batch, "tiled", window=window), window=window)


def test_decode_ignores_blocks_out_of_range(plain_shim: Any) -> None:
    """Their keys are masked: the sequence is as long as what is left."""
    batch = make_batch([48], [1], dtype=torch.bfloat16)
    batch.block_table[0, 2] = len(batch.k_cache)
    out, lse = attend(plain_shim, batch, "tiled")
    shorter = make_batch([48], [1], dtype=torch.bfloat16)
    shorter.seq_lens[0] = 32
    check_tiled(shorter, out, lse)


KERNELS = pytest.mark.parametrize("kernel", ["generic", "tiled"])


@KERNELS
def test_tokens_of_no_sequence_are_zero(shim: Any, kernel: str) -> None:
    """Rows after the last sequence's, as a padded batch has them."""
    batch = make_batch([40, 3], [2, 1], dtype=torch.bfloat16)
    padded = make_batch([40, 3], [2, 1], dtype=torch.bfloat16)
    padded.query = torch.cat([batch.query, torch.full((3, *batch.query.shape[1:]), float("nan"), dtype=torch.bfloat16)])
    out, lse = attend(shim, padded, kernel)
    check(batch, out[:3], lse[:3], whole_references=kernel == "tiled")
    assert (out[3:] == 0).all()
    assert lse[3:].isneginf().all()


@KERNELS
def test_no_sequence_at_all(plain_shim: Any, kernel: str) -> None:
    batch = make_batch([], [], dtype=torch.bfloat16)
    batch.query = torch.ones(2, *batch.query.shape[1:], dtype=torch.bfloat16)
    out, lse = attend(plain_shim, batch, kernel)
    assert (out == 0).all()
    assert lse.isneginf().all()


@KERNELS
@pytest.mark.parametrize("where", ["query", "k_cache", "v_cache"])
def test_nan_where_a_query_looks_shows(plain_shim: Any, kernel: str, where: str) -> None:
    batch = make_batch([30, 20], [1, 1], dtype=torch.bfloat16, heads=(2, 1))
    if where == "query":
        batch.query[0, 1] = float("nan")
        bad = [(0, 1)]
    else:
        getattr(batch, where)[batch.block_table[0, 1].long(), 0, 3] = float("nan")
        bad = [(0, 0), (0, 1)]
    out, _ = attend(plain_shim, batch, kernel)
    for token in range(2):
        for head in range(2):
            assert bool(out[token, head].isnan().all()) == ((token, head) in bad)


@KERNELS
def test_lengths_past_the_table_read_nothing_outside_it(plain_shim: Any, kernel: str) -> None:
    """Keys without an entry are masked, as keys in blocks out of range are."""
    batch = make_batch([32], [1], dtype=torch.bfloat16)
    batch.block_table = batch.block_table[:, :2].contiguous()
    batch.seq_lens[0] = 1000
    out, lse = attend(plain_shim, batch, kernel)
    batch.seq_lens[0] = 32
    check(batch, out, lse, whole_references=kernel == "tiled")


@pytest.mark.shim_only
@KERNELS
@pytest.mark.parametrize("starts", [[0, 2, -5], [-3, 2, 4], [0, 3, 1], [0, 600_000_000, 600_000_004], [0, 2, 1000]])
def test_query_starts_out_of_range_write_nothing_outside(plain_shim: Any, kernel: str, starts: list[int]) -> None:
    """Starts that no host has read: below 0, decreasing, and with more rows than an int32 counts."""
    batch = make_batch([40, 40], [2, 2], dtype=torch.bfloat16, heads=(4, 1))
    batch.query_start_loc = torch.tensor(starts, dtype=torch.int32)
    attend(plain_shim, batch, kernel, max_query_len=2)  # an access to anything else is an error


@KERNELS
def test_table_rows(plain_shim: Any, kernel: str) -> None:
    """Sequences in any rows of a larger table; a row that is not in it is a sequence without keys."""
    batch = make_batch([30, 70], [1, 2], dtype=torch.bfloat16)
    rows = torch.tensor([3, 1], dtype=torch.int32)
    table = torch.full((5, batch.block_table.shape[1]), -(2**31), dtype=torch.int32)
    table[rows.long()] = batch.block_table
    narrow, batch.block_table = batch.block_table, table
    out, lse = attend(plain_shim, batch, kernel, block_table_rows=rows)
    wrong, _ = attend(plain_shim, batch, kernel, block_table_rows=torch.tensor([5, -1], dtype=torch.int32))
    batch.block_table = narrow
    check(batch, out, lse, whole_references=kernel == "tiled")
    assert (wrong == 0).all()


@pytest.mark.shim_only
def test_a_recorded_step_runs_with_other_lengths(shim: Any) -> None:
    """As a CUDA graph does: the plan is made anew at each replay, from what the device holds then."""
    batch = make_batch([100, 300, 0, 64], [1] * 4, dtype=torch.float16)
    with Device(shim) as device:
        attention = Attention(device, batch)
        recording = shim.Recording()
        attention.launch("tiled", grid=7, launches=2)
        recording.stop()
        for lengths in ([100, 300, 0, 64], [7, 290, 0, 0], [97, 1, 0, 33]):
            batch.seq_lens = torch.tensor(lengths, dtype=torch.int32)
            shim.copy_to_device(attention.fields["seq_lens"], batch.seq_lens.data_ptr(), batch.seq_lens.nbytes)
            recording.replay()
            check_tiled(batch, *attention.result())


@KERNELS
def test_offsets_past_32_bits(plain_shim: Any, kernel: str) -> None:
    """Blocks 2^31 elements apart, as in a large pool."""
    batch = make_batch([70, 20], [1, 1], dtype=torch.bfloat16)
    check(batch, *attend(plain_shim, batch, kernel, block_stride=2**31))


@pytest.mark.shim_only
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "dtype"),
        ({"head_dim": 72}, "head size"),
        ({"v_head_dim": 80}, "different head sizes"),
        ({"order": "strided"}, "rows of k_cache"),
    ],
)
def test_says_why_not_tiled(plain_shim: Any, options: dict[str, Any], reason: str) -> None:
    """Which the generic kernel then takes, without a plan."""
    batch = make_batch([20], [1], **{"dtype": torch.bfloat16, **options})
    with Device(plain_shim) as device:
        attention = Attention(device, batch)
        assert reason in plain_shim.why_not_tiled(attention.fields)
        assert plain_shim.plan_bytes(attention.fields) == plain_shim.workspace_bytes(attention.fields) == 0
        plain_shim.paged_attention(attention.fields, 0, 0)
        check(batch, *attention.result())

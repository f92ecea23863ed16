"""Attention on the GPU's kernels, run by the host shim, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import attend
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
    check(batch, *attend(shim, batch, "decode"))


@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (32, 8), (28, 4), (71, 1)], ids=str)
@pytest.mark.parametrize("query_len", [1, 2, 5])
def test_decode_groups(plain_shim: Any, heads: tuple[int, int], query_len: int) -> None:
    batch = make_batch([40, 200, 0, 7], [query_len, 1, 1, query_len], dtype=torch.bfloat16, heads=heads)
    check(batch, *attend(plain_shim, batch, "decode"))


@pytest.mark.parametrize("grid", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("seed", range(3))
def test_decode_however_the_work_is_cut(shim: Any, grid: int, seed: int) -> None:
    """Items whole, split in two and over many blocks, in any order of arrival; twice over one plan, as layers do."""
    batch = make_batch([700, 3, 64, 300], [1, 1, 1, 2], dtype=torch.float16, heads=(4, 2), seed=seed)
    check(batch, *attend(shim, batch, "decode", grid=grid, launches=2, seed=seed))


@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 128])
@pytest.mark.parametrize("order", ["HND", "NHD", "heads first"])
def test_decode_layouts(plain_shim: Any, block_size: int, order: str) -> None:
    batch = make_batch(LENGTHS, [1] * 8, dtype=torch.bfloat16, block_size=block_size, order=order)
    check(batch, *attend(plain_shim, batch, "decode"))


@pytest.mark.parametrize("window", [1, 16, 33, 64, 1000])
def test_decode_window(shim: Any, window: int) -> None:
    batch = make_batch([0, 1, 17, 64, 65, 300], [1, 1, 4, 1, 1, 3], dtype=torch.bfloat16, window=window)
    check(batch, *attend(shim, batch, "decode", window=window), window=window)


def test_decode_ignores_blocks_out_of_range(plain_shim: Any) -> None:
    """Their keys are masked: the sequence is as long as what is left."""
    batch = make_batch([48], [1], dtype=torch.bfloat16)
    batch.block_table[0, 2] = len(batch.k_cache)
    out, lse = attend(plain_shim, batch, "decode")
    shorter = make_batch([48], [1], dtype=torch.bfloat16)
    shorter.seq_lens[0] = 32
    check(shorter, out, lse)


@pytest.mark.parametrize("kernel", ["generic", "decode"])
def test_offsets_past_32_bits(plain_shim: Any, kernel: str) -> None:
    """Blocks 2^31 elements apart, as in a large pool."""
    batch = make_batch([70, 20], [1, 1], dtype=torch.bfloat16)
    check(batch, *attend(plain_shim, batch, kernel, block_stride=2**31))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "dtype"),
        ({"head_dim": 72}, "head size"),
        ({"v_head_dim": 80}, "different head sizes"),
        ({"order": "strided"}, "rows of k_cache"),
    ],
)
def test_decode_says_why_not(plain_shim: Any, options: dict[str, Any], reason: str) -> None:
    batch = make_batch([20], [1], **{"dtype": torch.bfloat16, **options})
    with pytest.raises(ValueError, match=reason):
        attend(plain_shim, batch, "decode")

"""Tiles over a cache of e4m3 codes, under the shim: against the oracle over what the codes stand for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from codes import GRANULARITIES, Quantized
from device import Attention, Device, attend, check_tiled
from pagedcore.quantized import dequantize
from reference import FEATURES, make_batch

if TYPE_CHECKING:
    from reference import Batch

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
NAN_CODES = (0x7F, 0xFF)


def decode_batch(**options: Any) -> Batch:
    """Sequences of at most 16 rows a KV head, one of them empty, one of a single key."""
    return make_batch([200, 65, 0, 1, 130], [1, 2, 1, 1, 4], **{"dtype": torch.bfloat16, "heads": (8, 2), **options})


def mixed_batch(**options: Any) -> Batch:
    return make_batch([0, 5, 70, 130, 33], [1, 1, 20, 36, 33], **{"dtype": torch.bfloat16, "heads": (4, 2), **options})


def prompts_batch(**options: Any) -> Batch:
    return make_batch([70, 150, 65], [65, 65, 65], **{"dtype": torch.bfloat16, "heads": (2, 1), **options})


BATCHES = pytest.mark.parametrize(
    "make", [decode_batch, mixed_batch, prompts_batch], ids=["decode", "mixed", "prompts"]
)


def attend_codes(shim: Any, quantized: Quantized, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    k_scale, v_scale = quantized.scales
    return attend(shim, quantized.of_codes, "tiled", k_scale=k_scale, v_scale=v_scale, **options)


def check_codes(shim: Any, quantized: Quantized, *, asked: dict[str, Any] | None = None, **options: Any) -> None:
    """Against the oracle. `asked`: options that the kernels alone take.

    Its emulation rounds weights, and these kernels weights times scales: no row shares the luck of the other."""
    check_tiled(quantized.exact, *attend_codes(shim, quantized, **options, **(asked or {})), row_factor=4, **options)


@BATCHES
@HALVES
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_granularities(plain_shim: Any, make: Any, dtype: torch.dtype, granularity: str, head_dim: int) -> None:
    check_codes(plain_shim, Quantized(make(dtype=dtype, head_dim=head_dim), granularity))


@BATCHES
@pytest.mark.parametrize("head_dim", [64, 128])
def test_without_races(race_shim: Any, make: Any, head_dim: int) -> None:
    check_codes(race_shim, Quantized(make(head_dim=head_dim), "token"))


@BATCHES
@pytest.mark.parametrize("grid", [1, 3, 7, 40])
def test_however_the_work_is_cut(shim: Any, make: Any, grid: int) -> None:
    check_codes(shim, Quantized(make(seed=grid), "token"), asked={"grid": grid, "launches": 2, "seed": grid})


@BATCHES
@pytest.mark.parametrize("split_size", [0, 64, 100])
def test_split_size(plain_shim: Any, make: Any, split_size: int) -> None:
    """A result depends on nothing but the cuts that were asked for; with 17 heads to a KV head also by tiles of 128."""
    quantized = Quantized(make(heads=(17, 1)) if make is prompts_batch else make(), "token")
    few, many = (attend_codes(plain_shim, quantized, split_size=split_size, grid=grid) for grid in (2, 30))
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one, other)
    check_tiled(quantized.exact, *few, row_factor=4)


@BATCHES
@pytest.mark.parametrize("options", FEATURES, ids="+".join)
def test_features(plain_shim: Any, make: Any, options: dict[str, Any]) -> None:
    batch = make(heads=(8, 4) if make is prompts_batch else (8, 2), window=options.get("window"))
    check_codes(plain_shim, Quantized(batch, "token"), **options)


@BATCHES
@pytest.mark.parametrize("window", [1, 16, 33, 64])
def test_window(shim: Any, make: Any, window: int) -> None:
    """Freed blocks hold NaN codes and NaN scales."""
    check_codes(shim, Quantized(make(window=window), "token"), window=window)


@BATCHES
@pytest.mark.parametrize("block_size", [1, 3, 128])
def test_block_sizes(plain_shim: Any, make: Any, block_size: int) -> None:
    check_codes(plain_shim, Quantized(make(block_size=block_size), "token"))


@BATCHES
def test_strides(plain_shim: Any, make: Any) -> None:
    """Rows of codes 16 bytes apart from one another, and scales inside of what could be a block's record."""
    quantized = Quantized(make(), "token")
    dense = attend_codes(plain_shim, quantized)
    codes = []
    for cache in quantized.codes:
        wide = torch.full((*cache.shape[:3], cache.shape[3] + 16), 0x7F, dtype=torch.uint8)
        wide[..., :-16] = cache
        codes.append(wide[..., :-16])
    quantized.of_codes = replace(quantized.of_codes, k_cache=codes[0], v_cache=codes[1])
    for side, scale in enumerate(quantized.scales):
        record = torch.full((*scale.shape[:2], 2 * scale.shape[2] + 1), float("nan"))
        record[..., 1::2] = scale
        quantized.scales[side] = record[..., 1::2]
    for one, other in zip(dense, attend_codes(plain_shim, quantized), strict=True):
        assert torch.equal(one, other)


@BATCHES
@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("power", [-7, -14, -24, -100, -119, -122, 13, 110])
def test_values_of_any_size(plain_shim: Any, make: Any, granularity: str, power: int) -> None:
    """Weights times such scales are no normal f16, or none at all, and at last the scales no normal f32.

    In bfloat16, which holds the output.
    """
    quantized = Quantized(make(), granularity)
    exact = quantized.exact.v_cache
    quantized.scales[1] *= 2.0**power
    out, lse = attend_codes(plain_shim, quantized)
    unscaled = (out.double() * 2.0**-power).to(out.dtype)
    check_tiled(replace(quantized.exact, v_cache=exact), unscaled, lse, row_factor=4)


@BATCHES
@HALVES
@pytest.mark.parametrize("grow", [False, True])
def test_values_whose_size_changes(shim: Any, make: Any, dtype: torch.dtype, grow: bool) -> None:
    """Along each sequence V's scale grows, or falls, by ten binary orders: the reference follows what weighs most."""
    quantized = Quantized(make(dtype=dtype, seed=4), "token")
    table = quantized.batch.block_table
    for seq, length in enumerate(quantized.batch.seq_lens.tolist()):
        for position in range(length):
            size = 2.0 ** (-10 * (1 - position / length if grow else position / length))
            at = (int(table[seq, position // 16]), slice(None), position % 16)
            quantized.scales[1][at] *= size
            quantized.exact.v_cache[at] *= size
    check_codes(shim, quantized)


@BATCHES
@HALVES
def test_scores_and_values_that_grow(shim: Any, make: Any, dtype: torch.dtype) -> None:
    """Later keys weigh more and are smaller: both references move, and not together."""
    quantized = Quantized(make(dtype=dtype, heads=(2, 2)), "token")
    batch = quantized.batch
    for seq, length in enumerate(batch.seq_lens.tolist()):
        query = batch.query[int(batch.query_start_loc[seq])].double()
        for position in range(length):
            block, slot = int(batch.block_table[seq, position // 16]), position % 16
            for head in range(2):
                key = quantized.exact.k_cache[block, head, slot].double()
                up = 1 if key @ query[head] > 0 else -1
                size = up * (0.1 + 8 * position / length)
                quantized.scales[0][block, head, slot] *= size
                quantized.exact.k_cache[block, head, slot] *= size
                small = 2.0 ** (-6 * position / length)
                quantized.scales[1][block, head, slot] *= small
                quantized.exact.v_cache[block, head, slot] *= small
    check_codes(shim, quantized)


@BATCHES
def test_queries_beyond_f16(plain_shim: Any, make: Any) -> None:
    """Each row of a size of its own, up to 1e36, where bf16 ends soon after; keys are as much smaller."""
    batch = make()
    sizes = torch.tensor([1e36, 1e20, 70000.0, 1.0, 1e-20, 1e-36])[torch.arange(len(batch.query)) % 6]
    quantized = Quantized(batch, "token")
    plain = attend_codes(plain_shim, quantized)
    scaled = (batch.query.float() * sizes[:, None, None]).to(torch.bfloat16)
    for size in sizes.unique().tolist():
        quantized.of_codes = replace(quantized.of_codes, query=scaled)
        rows = sizes == size
        scales = quantized.scales[0] / size
        out, lse = attend(plain_shim, quantized.of_codes, "tiled", k_scale=scales, v_scale=quantized.scales[1])
        exact = replace(quantized.exact, query=scaled, k_cache=quantized.exact.k_cache.double() / size)
        want, want_lse = exact.expected()
        seen = rows[:, None] & torch.from_numpy(want_lse > -1e9)
        torch.testing.assert_close(out[seen].double(), torch.from_numpy(want)[seen], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse[seen].double(), torch.from_numpy(want_lse)[seen], rtol=1e-4, atol=1e-3)
    check_tiled(quantized.exact, *plain, row_factor=4)


@BATCHES
@pytest.mark.parametrize("code", NAN_CODES)
@pytest.mark.parametrize("side", [0, 1], ids=["K", "V"])
def test_nan_codes_show(plain_shim: Any, make: Any, code: int, side: int) -> None:
    """Where a query looks, in the columns that it is in; and nowhere else."""
    quantized = Quantized(make(), "token")
    batch = quantized.batch
    seq = 1
    block, slot = int(batch.block_table[seq, 0]), 3
    quantized.codes[side][block, -1, slot, 37] = code
    out, lse = attend_codes(plain_shim, quantized)
    token = int(batch.query_start_loc[seq + 1]) - 1
    heads = slice(-(batch.query.shape[1] // batch.k_cache.shape[1]), None)  # that share the last KV head
    columns = slice(None) if side == 0 else 37
    assert out[token, heads, columns].isnan().all()
    rest = out.clone()
    rest[int(batch.query_start_loc[seq]) : token + 1, heads, columns] = 0
    assert rest.isfinite().all()
    assert not lse[: int(batch.query_start_loc[seq])].isnan().any()


@BATCHES
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("window", [None, 20])
def test_what_nobody_sees_changes_nothing(shim: Any, make: Any, granularity: str, window: int | None) -> None:
    """Unwritten slots and freed blocks hold NaN codes, and NaN scales: zeros there give the same bits."""
    quantized = Quantized(make(window=window), granularity)
    assert (quantized.codes[1] == NAN_CODES[0]).any()
    got = attend_codes(shim, quantized, window=window)
    for codes, scale in zip(quantized.codes, quantized.scales, strict=True):
        codes[codes == NAN_CODES[0]] = 0
        scale[scale.isnan()] = 0
    for one, other in zip(got, attend_codes(shim, quantized, window=window), strict=True):
        assert torch.equal(one, other)
    check_tiled(quantized.exact, *got, row_factor=4, window=window)


@BATCHES
@HALVES
def test_constant_values_come_back(plain_shim: Any, make: Any, dtype: torch.dtype) -> None:
    """V = 1 gives O = 1: the weights that are multiplied are the ones that are summed, whatever scales say."""
    quantized = Quantized(make(dtype=dtype), "token")
    codes, scale = quantized.codes[1], quantized.scales[1]
    halves = torch.rand(scale.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    codes[:] = torch.where(halves, 0x38, 0x30)[..., None].to(torch.uint8)  # 1 and 0.5
    scale[:] = torch.where(halves, 1.0, 2.0)
    out, lse = attend_codes(plain_shim, quantized)
    seen = ~lse.isneginf()
    torch.testing.assert_close(
        out[seen], torch.ones_like(out[seen]), rtol=0, atol=2e-3 if dtype == torch.bfloat16 else 0
    )
    assert (out[~seen] == 0).all()


@BATCHES
def test_scales_of_zero(plain_shim: Any, make: Any) -> None:
    """What zero_blocks leaves: V is 0, however a key scores, and scores are 0, however the codes look."""
    quantized = Quantized(make(), "token")
    written = ~quantized.scales[1].isnan()
    quantized.scales[1][written] = 0
    out, lse = attend_codes(plain_shim, quantized)
    assert (out == 0).all()
    check_tiled(quantized.exact, torch.zeros_like(out) + quantized_out(quantized), lse)


SCALES = [0.0, 1e-45, 2.0**-130, 2.0**-126, 2.0**-110, float("nan"), float("inf")]


@BATCHES
@pytest.mark.parametrize("side", [0, 1], ids=["K", "V"])
@pytest.mark.parametrize("scale", SCALES)
def test_one_scale_of_any_size(plain_shim: Any, make: Any, side: int, scale: float) -> None:
    """One key's, beside others of usual scales, is what the generic kernel makes of it: a value, or none."""
    quantized = Quantized(make(), "token")
    batch = quantized.batch
    block, slot = int(batch.block_table[1, 0]), 3
    quantized.scales[side][block, :, slot] = scale
    k_scale, v_scale = quantized.scales
    out, lse = attend_codes(plain_shim, quantized)
    plain, plain_lse = attend(plain_shim, quantized.of_codes, "generic", k_scale=k_scale, v_scale=v_scale)
    last = int(batch.query_start_loc[2]) - 1  # the row of the sequence that sees all of its keys
    usual = [token for token in range(len(out)) if not batch.query_start_loc[1] <= token < last]
    assert torch.equal(out[usual].isfinite(), plain[usual].isfinite())
    expected = math.isfinite(scale) or (side == 0 and bool(plain[last].isfinite().all()))
    assert bool(out[last].isfinite().all()) == expected
    finite = plain.isfinite() & out.isfinite()
    torch.testing.assert_close(out[finite], plain[finite], rtol=2e-2, atol=4e-3)
    seen = plain_lse.isfinite() & lse.isfinite()
    torch.testing.assert_close(lse[seen], plain_lse[seen], rtol=1e-3, atol=1e-3)


@pytest.mark.shim_only
@pytest.mark.parametrize("capability", [80, 89])
def test_all_codes_are_decoded(plain_shim: Any, capability: int) -> None:
    """By shifts and by the instruction, in each place of four, to the bit, as torch reads them; NaN is any NaN."""
    plain_shim.set_compute_capability(capability)
    all_codes = torch.arange(256, dtype=torch.uint8)
    exact = torch.from_numpy(dequantize(all_codes.view(1, 1, 1, 256).numpy(), np.ones((1, 1, 1), np.float32))).flatten()
    try:
        for place in range(4):
            ones = 0x38383838 & ~(0xFF << 8 * place)
            pairs = torch.tensor([plain_shim.decode_codes(ones | code << 8 * place) for code in range(256)])
            assert (pairs[:, 1 - place % 2] == 0x3C003C00).all()  # 1 and 1
            got = (pairs[:, place % 2] >> place // 2 * 16 & 0xFFFF).to(torch.uint16).view(torch.float16)
            assert got.isnan().nonzero().flatten().tolist() == list(NAN_CODES)
            real = ~got.isnan()
            by_torch = all_codes.view(torch.float8_e4m3fn).to(torch.float16)
            for want in (by_torch, exact.to(torch.float16)):
                assert torch.equal(got[real].view(torch.int16), want[real].view(torch.int16))  # -0 is not 0
    finally:
        plain_shim.set_compute_capability(80)


@pytest.mark.shim_only
@BATCHES
@HALVES
def test_the_instruction_gives_the_same_bits(plain_shim: Any, make: Any, dtype: torch.dtype) -> None:
    """Which decodes from sm_89 on, in the place of shifts; NaN in both sides of some keys too."""
    quantized = Quantized(make(dtype=dtype), "token")
    for side, column in enumerate((5, 9)):
        quantized.codes[side][int(quantized.batch.block_table[1, 0]), -1, 3, column] = NAN_CODES[side]
    shifts = attend_codes(plain_shim, quantized)
    plain_shim.set_compute_capability(90)
    try:
        instruction = attend_codes(plain_shim, quantized)
    finally:
        plain_shim.set_compute_capability(80)
    for one, other in zip(shifts, instruction, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def quantized_out(quantized: Quantized) -> torch.Tensor:
    """The oracle's output, so that only the LSE is left to be checked."""
    return torch.from_numpy(quantized.exact.expected()[0]).to(quantized.batch.query.dtype)


def test_no_scales_are_ones(plain_shim: Any) -> None:
    quantized = Quantized(decode_batch(), "tensor")
    quantized.scales = [torch.ones(1), torch.ones(1)]
    ones = attend_codes(plain_shim, quantized)
    for one, other in zip(ones, attend(plain_shim, quantized.of_codes, "tiled"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.shim_only
@BATCHES
def test_a_plan_made_without_the_cache_serves_codes(plain_shim: Any, make: Any) -> None:
    """One that was made for elements, of that size."""
    quantized = Quantized(make(), "token")
    k_scale, v_scale = quantized.scales
    plain_shim.set_multiprocessors(7)
    with Device(plain_shim) as device:
        elements = Attention(device, quantized.batch).fields
        codes = Attention(device, quantized.of_codes, k_scale=k_scale, v_scale=v_scale)
        sizes = [size(elements) for size in (plain_shim.plan_bytes, plain_shim.workspace_bytes)]
        assert sizes == [size(codes.fields) for size in (plain_shim.plan_bytes, plain_shim.workspace_bytes)]
        plan, workspace = map(device.allocate, sizes)
        plain_shim.paged_attention(elements, plan, workspace)
        plain_shim.paged_attention(codes.fields, plan, workspace, planned=True)
        check_tiled(quantized.exact, *codes.result(), row_factor=4)

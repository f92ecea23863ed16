"""Soft cap, ALiBi and attention sinks against the oracle, alone and together; and their properties."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pagedcore import ops
from reference import FEATURES, Batch, check, features, make_batch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = (8, 2)
NOT_ANY = float("-inf")

# In one call: decode, short and long chunks, a whole prompt, queries before the first token, a padding row.
SEQ_LENS = [65, 2, 300, 40, 3, 0]
QUERY_LENS = [1, 2, 5, 40, 6, 1]


def attend(batch: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.paged_attention(*batch.args, return_lse=True, **options)


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", FEATURES, ids="+".join)
def test_features(isa: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    batch = make_batch(SEQ_LENS, QUERY_LENS, dtype=dtype, heads=HEADS, window=options.get("window"))
    check(batch, *attend(batch, **options), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (28, 4), (71, 1)], ids=str)
def test_heads(isa: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """Every head has its own slope and its own sink, however heads are packed."""
    options = features("alibi_slopes", "sinks", num_heads=heads[0])
    batch = make_batch([65, 70, 20], [1, 3, 20], dtype=dtype, heads=heads)
    check(batch, *attend(batch, **options), **options)


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(192, 128), (64, 1), (16, 256), (31, 33)])
def test_v_head_dim_differs(isa: str, head_dim: int, v_head_dim: int) -> None:
    options = features("softcap", "alibi_slopes", "sinks")
    batch = make_batch([50, 70], [1, 33], heads=HEADS, head_dim=head_dim, v_head_dim=v_head_dim)
    check(batch, *attend(batch, **options), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0, 1e4, 1e30])
def test_soft_caps(isa: str, dtype: torch.dtype, softcap: float) -> None:
    """From one that holds every score down to one that no score feels: tanh is right at both ends."""
    batch = make_batch([50, 200], [1, 40], dtype=dtype, heads=HEADS)
    check(batch, *attend(batch, softcap=softcap), softcap=softcap)


@pytest.mark.parametrize("scale", [0.0, -0.3, 40.0])
def test_soft_cap_bounds_every_score(isa: str, scale: float) -> None:
    batch = make_batch([50, 200], [1, 40], heads=HEADS)
    out, lse = attend(batch, scale=scale, softcap=2.0)
    check(batch, out, lse, scale=scale, softcap=2.0)
    seen = torch.cat([torch.tensor([50]), torch.arange(161, 201)])
    assert (lse <= 2 + seen.log()[:, None] + 1e-5).all()
    assert (lse >= -2 + seen.log()[:, None] - 1e-5).all()


def test_the_smallest_soft_cap(isa: str) -> None:
    """All scores are then 0, those of dot products of 0 too."""
    batch = make_batch([50], [1], heads=HEADS)
    batch.query[0, 0] = 0
    out, lse = attend(batch, softcap=1e-38)
    assert out.isfinite().all()
    torch.testing.assert_close(lse, torch.full((1, 8), 50.0).log())


@pytest.mark.parametrize("query_len", [1, 40])
def test_no_feature_by_its_neutral_value(isa: str, query_len: int) -> None:
    batch = make_batch([333, 64], [query_len, query_len], heads=HEADS)
    want = attend(batch)
    assert equal(attend(batch, softcap=0.0), want)
    assert equal(attend(batch, alibi_slopes=torch.zeros(8)), want)
    assert equal(attend(batch, sinks=torch.full((8,), NOT_ANY)), want)
    for a, b in zip(attend(batch, softcap=1e6), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_len", [1, 70])
def test_constant_values_come_back(isa: str, dtype: torch.dtype, query_len: int) -> None:
    """Without sinks; what a sink takes is its share of the sum."""
    batch = make_batch([500, 77], [query_len, query_len], dtype=dtype, heads=HEADS)
    batch.v_cache[:] = 1
    out, lse = attend(batch, **features("softcap", "alibi_slopes"))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=2e-6 if dtype == torch.float32 else 0, atol=0)
    out, with_sinks = attend(batch, **features("softcap", "alibi_slopes", "sinks"))
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(out[..., 0].float(), (lse - with_sinks).exp(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("query_len", [1, 40])
def test_a_steep_slope_leaves_the_query_its_own_key(isa: str, query_len: int) -> None:
    batch = make_batch([5000], [query_len], heads=HEADS)
    out, _ = attend(batch, alibi_slopes=torch.full((8,), 1e4))
    positions = torch.arange(5000 - query_len, 5000)
    own = batch.v_cache[batch.block_table[0, positions // 16].long(), :, positions % 16]
    torch.testing.assert_close(out, own.repeat_interleave(4, 1))


def test_a_large_sink_takes_everything(isa: str) -> None:
    batch = make_batch([50, 70], [1, 33], heads=HEADS)
    out, lse = attend(batch, sinks=torch.full((8,), 1000.0))
    assert (out == 0).all()
    torch.testing.assert_close(lse, torch.full_like(lse, 1000.0))


@pytest.mark.parametrize("query_len", [1, 40])
def test_nan_in_a_visible_key_shows(isa: str, query_len: int) -> None:
    batch = make_batch([70, 70], [query_len, query_len], heads=HEADS)
    batch.k_cache[batch.block_table[0, 0].item(), :, 0] = float("nan")
    out, lse = attend(batch, **features("softcap", "alibi_slopes", "sinks"))
    assert out[:query_len].isnan().all()
    assert lse[:query_len].isnan().all()
    assert out[query_len:].isfinite().all()


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_nan_of_one_head_stays_there(isa: str, name: str) -> None:
    batch = make_batch([70, 70], [1, 40], heads=HEADS)
    values = torch.zeros(8)
    values[3] = float("nan")
    out, _ = attend(batch, **{name: values})
    assert out[:, 3].isnan().all()
    assert np.isfinite(np.delete(out.numpy(), 3, axis=1)).all()


@pytest.mark.parametrize("split_size", [0, 1, 50, 64])
@pytest.mark.parametrize("query_len", [1, 3, 40])
def test_fixed_split_does_not_depend_on_companions(isa: str, split_size: int, query_len: int) -> None:
    companions = [(4, 1), (300, 1), (64, 64), (90, 7)]
    lengths, queries = zip((210, query_len), *companions, strict=True)
    options = features("softcap", "alibi_slopes", "sinks", "window")
    batch = make_batch(lengths, queries, heads=HEADS, window=options["window"])
    together = attend(batch, split_size=split_size, **options)
    check(batch, *together, **options)
    rows = slice(None, query_len)
    alone = Batch(
        batch.query[rows],
        *batch.args[1:3],
        batch.block_table[:1],
        batch.seq_lens[:1],
        batch.query_start_loc[:2],
    )
    for threads in (1, 2, 5):
        for a, b in zip(attend(alone, split_size=split_size, num_threads=threads, **options), together, strict=True):
            assert torch.equal(a, b[rows])


@pytest.mark.parametrize("num_threads", [2, 16])
def test_planner_split_adds_sinks_once(num_threads: int) -> None:
    options = features("softcap", "alibi_slopes", "sinks", num_heads=9)
    batch = make_batch([3000, 1, 700], [1, 1, 30], heads=(9, 3))
    check(batch, *attend(batch, num_threads=num_threads, **options), **options)


def test_instruction_sets_agree(isa: str) -> None:
    options = features("softcap", "alibi_slopes", "sinks", num_heads=9)
    batch = make_batch([333, 41], [1, 40], heads=(9, 3))
    out, _ = attend(batch, **options)
    np.testing.assert_allclose(out.numpy(), batch.expected(**options)[0], rtol=1e-5, atol=1e-5)


def test_strided_slopes_are_refused() -> None:
    batch = make_batch([20], [1], heads=HEADS)
    for name in ("alibi_slopes", "sinks"):
        with pytest.raises(ValueError, match=f"^{name}: expected a contiguous last axis"):
            attend(batch, **{name: torch.zeros(16)[::2]})


def test_outputs_over_slopes_are_refused() -> None:
    batch = make_batch([20], [1], heads=HEADS)
    out, lse = attend(batch)
    for name, (output, value) in itertools.product(
        ("alibi_slopes", "sinks"), {"out": out.view(-1)[:8], "lse": lse.view(-1)}.items()
    ):
        with pytest.raises(ValueError, match=f"^{output}: expected memory apart from {name}"):
            ops.paged_attention(*batch.args, out=out, lse=lse, **{name: value})

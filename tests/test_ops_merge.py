"""merge_states: attention over parts of the keys becomes attention over all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pagedcore import ops
from pagedcore.errors import InvalidArgumentError
from reference import Batch, check, features, make_batch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NOTHING = float("-inf")


def attend(batch: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.paged_attention(*batch.args, return_lse=True, **options)


def halves(batch: Batch, at: int) -> tuple[torch.Tensor, ...]:
    """o_a, lse_a, o_b, lse_b of a decode batch: over the first `at` blocks of every sequence, and over the others."""
    block_size = batch.k_cache.shape[2]
    first = torch.minimum(batch.seq_lens, torch.tensor(at * block_size)).int()
    index = (*batch.args[:3],)
    a = ops.paged_attention(*index, batch.block_table, first, batch.query_start_loc, return_lse=True)
    rest = batch.block_table[:, at:].contiguous()
    b = ops.paged_attention(*index, rest, batch.seq_lens - first, batch.query_start_loc, return_lse=True)
    return (*a, *b)


@pytest.mark.parametrize("at", [0, 1, 3, 19])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_two_halves_are_the_whole(at: int, with_sinks: bool) -> None:
    """Sequences that lie in one half alone, in both, in none; sinks are added once."""
    batch = make_batch([300, 16, 17, 40, 0, 65], [1] * 6, heads=(8, 2))
    options = features("sinks") if with_sinks else {}
    check(batch, *ops.merge_states(*halves(batch, at), **options), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_halves(dtype: torch.dtype) -> None:
    """Each half was rounded once more than the whole is."""
    batch = make_batch([300, 40], [1, 1], dtype=dtype, heads=(8, 2))
    out, lse = ops.merge_states(*halves(batch, 2), **features("sinks"))
    want, want_lse = batch.expected(**features("sinks"))
    error = np.linalg.norm(out.double().numpy() - want) / np.linalg.norm(want)
    assert error < {torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    np.testing.assert_allclose(lse.numpy(), want_lse, atol=1e-3)


def test_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    o_a, o_b = torch.randn(2, 7, 3, 5, generator=generator)
    lse_a, lse_b = 4 * torch.randn(2, 7, 3, generator=generator)
    sinks = torch.randn(3, generator=generator)
    weights = torch.stack([lse_a, lse_b, sinks.expand(7, 3)]).double()
    share = weights.softmax(0)[..., None]
    out, lse = ops.merge_states(o_a, lse_a, o_b, lse_b, sinks)
    torch.testing.assert_close(out.double(), share[0] * o_a + share[1] * o_b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), weights.logsumexp(0), rtol=1e-6, atol=1e-6)


def test_states_that_saw_nothing_bring_nothing() -> None:
    """Their outputs may hold anything. Where neither saw a key, a sink changes nothing."""
    nan = float("nan")
    o_a, o_b = torch.full((4, 1, 8), nan), torch.full((4, 1, 8), nan)
    lse_a, lse_b = torch.full((4, 1), NOTHING), torch.full((4, 1), NOTHING)
    o_a[1], lse_a[1] = 3.0, 1.5
    o_b[2], lse_b[2] = 5.0, -700.0
    for sinks in (None, torch.tensor([NOTHING])):
        out, lse = ops.merge_states(o_a, lse_a, o_b, lse_b, sinks)
        assert out[:, 0, 0].tolist() == [0.0, 3.0, 5.0, 0.0]
        assert lse[:, 0].tolist() == [NOTHING, 1.5, -700.0, NOTHING]
    out, lse = ops.merge_states(o_a, lse_a, o_b, lse_b, torch.tensor([2.0]))
    assert lse[[0, 3]].isneginf().all()
    assert (out[[0, 2, 3]] == 0).all()
    torch.testing.assert_close(lse[2], torch.tensor([2.0]))


@pytest.mark.parametrize("place", ["o_a", "lse_a", "o_b", "lse_b", "sinks"])
def test_nan_shows(place: str) -> None:
    args = {
        "o_a": torch.ones(2, 2, 8),
        "lse_a": torch.zeros(2, 2),
        "o_b": torch.ones(2, 2, 8),
        "lse_b": torch.zeros(2, 2),
        "sinks": torch.zeros(2),
    }
    args[place].view(-1)[0] = float("nan")
    out, lse = ops.merge_states(**args)
    assert out[0, 0, 0].isnan()
    assert lse[0, 0].isnan() == ("lse" in place or place == "sinks")
    assert out[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_threads_and_places(dtype: torch.dtype) -> None:
    """Strided states and outputs, many threads, NumPy: the same bits; and nothing beside the outputs is written."""
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(500, 9, n, generator=generator).to(kind) for n, kind in ((70, dtype), (1, torch.float32)) * 2
    ]
    states = [t.squeeze(-1) if t.shape[2] == 1 else t[..., 2:66] for t in tensors]
    want, want_lse = ops.merge_states(*states, num_threads=1)
    wide = torch.full((500, 11, 70), 7.0, dtype=dtype)
    out, lse = wide[:, 1:10, 3:67], torch.full((9, 500), 7.0).T
    got = ops.merge_states(*states, out=out, lse=lse, num_threads=5)
    assert got[0] is out
    assert got[1] is lse
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    wide[:, 1:10, 3:67] = 7
    assert (wide == 7).all()
    if dtype != torch.bfloat16:
        arrays, array_lse = ops.merge_states(*(t.numpy() for t in states))
        assert np.array_equal(arrays, want.numpy())
        assert np.array_equal(array_lse, want_lse.numpy())


def test_no_tokens() -> None:
    out, lse = ops.merge_states(torch.ones(0, 2, 8), torch.ones(0, 2), torch.ones(0, 2, 8), torch.ones(0, 2))
    assert out.shape == (0, 2, 8)
    assert lse.shape == (0, 2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("o_a", torch.ones(3, 2), r"o_a: expected shape \[num_tokens, num_heads, v_head_dim\]"),
        ("o_a", torch.ones(3, 2, 8).double(), "o_a: expected dtype"),
        ("o_b", torch.ones(3, 2, 8).half(), "o_b: expected dtype float32"),
        ("o_b", torch.ones(3, 2, 7), r"o_b: expected v_head_dim = 8 on axis 2 \(as o_a has\)"),
        ("lse_a", torch.ones(3, 3), r"lse_a: expected num_heads = 2"),
        ("lse_a", torch.ones(3, 2).half(), "lse_a: expected dtype float32"),
        ("lse_b", torch.ones(4, 2), r"lse_b: expected num_tokens = 3"),
        ("out", torch.ones(3, 2, 9), r"out: expected v_head_dim = 8"),
        ("lse", torch.ones(3), r"lse: expected shape"),
        ("sinks", torch.ones(3), r"sinks: expected num_heads = 2"),
        ("sinks", torch.ones(2).double(), "sinks: expected dtype float32"),
        ("num_threads", 0, "num_threads: expected 1 or more"),
    ],
)
def test_bad_arguments(name: str, value: object, message: str) -> None:
    args = {
        "o_a": torch.ones(3, 2, 8),
        "lse_a": torch.ones(3, 2),
        "o_b": torch.ones(3, 2, 8),
        "lse_b": torch.ones(3, 2),
        "out": torch.full((3, 2, 8), 7.0),
        "lse": torch.full((3, 2), 7.0),
    }
    with pytest.raises(InvalidArgumentError, match=f"^{message}"):
        ops.merge_states(**{**args, name: value})
    assert (args["out"] == 7).all()
    assert (args["lse"] == 7).all()


def test_outputs_over_inputs() -> None:
    o, lse = torch.ones(3, 2, 8), torch.ones(3, 2)
    with pytest.raises(InvalidArgumentError, match=r"^out: expected memory apart from o_a"):
        ops.merge_states(o, lse, o.clone(), lse, out=o)
    with pytest.raises(InvalidArgumentError, match=r"^lse: expected memory apart from lse_b"):
        ops.merge_states(o, lse.clone(), o, lse, lse=lse)


def test_as_a_torch_operator() -> None:
    import pagedcore.torch  # noqa: F401

    o, lse = torch.randn(3, 2, 8), torch.randn(3, 2)
    args = (o, lse, o * 2, lse * 3, torch.empty(3, 2, 8), torch.empty(3, 2), torch.randn(2))
    torch.library.opcheck(torch.ops.pagedcore.merge_states.default, args)
    compiled = torch.compile(ops.merge_states, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*args[:4], args[6]), ops.merge_states(*args[:4], args[6]), strict=True):
        assert torch.equal(a, b)

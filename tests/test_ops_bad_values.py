"""Contents of the index tensors of an op, its options and its signature, wrong in every way: an exception that names
what is wrong, and nothing written. The tensors themselves: test_ops_bad_input.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ops_calls import attention_args, call_attention, call_cache, int32
from pagedcore import ops
from pagedcore.errors import BlockError, InvalidArgumentError, UnsupportedError

# Contents of the index tensors


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seq_lens", int32(-1, 8), r"seq_lens\[0\]: expected 0 or more, got -1"),
        (
            "seq_lens",
            int32(5, 9),
            r"seq_lens\[1\]: expected at most 8 tokens, which the 2 columns of.*got 9",
        ),
        ("seq_lens", int32(5, 2**31 - 1), r"seq_lens\[1\]: expected at most 8 tokens"),
        ("query_start_loc", int32(1, 1, 3), r"query_start_loc\[0\]: expected 0, got 1"),
        ("query_start_loc", int32(0, 2, 1), r"query_start_loc\[2\]: expected at least its predecessor, 2, got 1"),
        ("query_start_loc", int32(0, -5, 3), r"query_start_loc\[1\]: expected at least its predecessor, 0, got -5"),
        ("query_start_loc", int32(0, 1, 4), r"query_start_loc\[2\]: expected at most num_tokens, 3, got 4"),
        ("query_start_loc", int32(0, 1, 2**31 - 1), r"query_start_loc\[2\]: expected at most num_tokens, 3"),
        ("block_table_rows", int32(0, 2), r"block_table_rows\[1\]: expected a row in \[0, 2\), got 2"),
        ("block_table_rows", int32(-1, 0), r"block_table_rows\[0\]: expected a row in \[0, 2\), got -1"),
        ("block_table_rows", int32(0), r"block_table_rows: expected num_seqs = 2"),
    ],
)
def test_bad_indices(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^" + message):
        call_attention(**{name: value})


@pytest.mark.parametrize("bad", [-1, 6, 2**31 - 1, -(2**31)])
def test_bad_block_ids(bad: int) -> None:
    table = torch.tensor([[3, 1], [2, bad]], dtype=torch.int32)
    with pytest.raises(BlockError, match=rf"ids in \[0, 6\), got block {bad} at index 1 of sequence 1") as caught:
        call_attention(block_table=table)
    assert (caught.value.block, caught.value.num_blocks) == (bad, 6)
    # The same entry, where no key that is seen lies in it.
    ops.paged_attention(**{**attention_args(), "block_table": table, "seq_lens": int32(5, 4)})
    shifted = torch.tensor([[bad, 1], [bad, 5]], dtype=torch.int32)
    ops.paged_attention(**{**attention_args(), "block_table": shifted, "window": 1, "query_start_loc": int32(0, 1, 2)})


def test_starts_are_checked_before_what_is_said_of_them() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^query_start_loc\[2\]: expected at least its predecessor, 5, got 3"
    ):
        call_attention(query_start_loc=int32(0, 5, 3), max_query_len=1)


# Options


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", float("nan"), "scale: expected a finite float32"),
        ("scale", float("inf"), "scale: expected a finite float32"),
        ("scale", 1e300, "scale: expected a finite float32"),
        ("softcap", -1.0, "softcap: expected a finite float32, 0"),
        ("softcap", float("nan"), "softcap: expected a finite float32, 0"),
        ("softcap", float("inf"), "softcap: expected a finite float32, 0"),
        ("softcap", 1e-300, "softcap: expected a finite float32, 0"),
        ("window", 0, "window: expected 1 or more, got 0"),
        ("window", -(2**63), "window: expected 1 or more"),
        ("num_threads", 0, "num_threads: expected 1 or more, got 0"),
        ("num_threads", -3, "num_threads: expected 1 or more, got -3"),
        ("split_size", -1, "split_size: expected None, 0 or a number of tokens, got -1"),
        ("max_query_len", -1, "max_query_len: expected 0 or more"),
        ("max_query_len", 1, "max_query_len: expected at least the query length of sequence 1, 2, got 1"),
        ("max_seq_len", -1, "max_seq_len: expected 0 or more"),
        ("max_seq_len", 7, "max_seq_len: expected at least the length of sequence 1, 8, got 7"),
    ],
)
def test_bad_options(name: str, value: object, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^" + message):
        call_attention(**{name: value})


@pytest.mark.parametrize(
    "name", ["scale", "softcap", "window", "num_threads", "split_size", "max_query_len", "max_seq_len"]
)
@pytest.mark.parametrize("value", ["x", [1], 2**200])
def test_options_of_another_type(name: str, value: object) -> None:
    with pytest.raises((InvalidArgumentError, TypeError), match=f"^{name}: expected"):
        call_attention(**{name: value})


@pytest.mark.parametrize("name", ["window", "split_size", "max_query_len", "max_seq_len", "num_threads"])
def test_huge_options_are_fine(name: str) -> None:
    want = ops.paged_attention(**attention_args() | {"query": torch.ones(3, 4, 16)})[0].shape
    assert ops.paged_attention(**{**attention_args(), name: 2**62})[0].shape == want


def test_window_without_causal() -> None:
    with pytest.raises(UnsupportedError, match=r"^window: expected causal=True with a window, got causal=False"):
        call_attention(window=3, causal=False)


@pytest.mark.parametrize("scale", ["k_scale", "v_scale"])
def test_scales_of_a_cache_without_codes(scale: str) -> None:
    for call in (call_attention, call_cache):
        with pytest.raises(UnsupportedError, match=f"^{scale}: expected None for a cache that is not quantised"):
            call(**{scale: torch.ones(1)})


@pytest.mark.parametrize("name", ["plan", "workspace"])
def test_the_cpu_takes_gpu_memory_and_needs_none(name: str) -> None:
    args = attention_args()
    want = ops.paged_attention(**args)[0].clone()
    assert torch.equal(ops.paged_attention(**args, **{name: torch.empty(0, dtype=torch.uint8)})[0], want)
    with pytest.raises(TypeError, match=f"^{name}: expected a tensor"):
        call_attention(**{name: 3})


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_values_of_each_head(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{name}: expected dtype float32, got float16"):
        call_attention(**{name: torch.zeros(4, dtype=torch.float16)})
    with pytest.raises(InvalidArgumentError, match=rf"^{name}: expected num_heads = 4 on axis 0"):
        call_attention(**{name: torch.zeros(2)})
    with pytest.raises(InvalidArgumentError, match=f"^{name}: expected shape"):
        call_attention(**{name: torch.zeros(1, 4)})


@pytest.mark.parametrize("bad", ["yes", None, [], np.zeros(3, bool), 2, -1, 0.5, float("nan"), np.int64(3)])
def test_causal_is_a_bool(bad: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^causal: expected a bool|truth value of an array"):
        call_attention(causal=bad)


@pytest.mark.parametrize("make", [np.bool_, torch.tensor, int])
def test_causal_is_what_equals_a_bool(make: Callable[[bool], object]) -> None:
    args = attention_args()
    for causal in (False, True):
        want = ops.paged_attention(**{**args, "causal": causal, "out": None, "lse": None})
        got = ops.paged_attention(**{**args, "causal": make(causal), "out": None, "lse": None})
        assert torch.equal(got, want)


def test_calls_that_do_not_fit_the_signature() -> None:
    from pagedcore import _kernels

    args = list(attention_args().values())
    for call, message in [
        (lambda: _kernels.paged_attention(*args, 1.0), "takes 8 positional arguments but 9 were given"),
        (lambda: _kernels.paged_attention(*args[:6]), "missing required argument: 'out'"),
        (lambda: _kernels.paged_attention(*args, scala=1.0), "unexpected keyword argument 'scala'"),
        (lambda: _kernels.paged_attention(*args, out=args[6]), "multiple values for argument 'out'"),
        (lambda: _kernels.paged_attention(), "missing required argument: 'query'"),
        (lambda: _kernels.try_paged_attention(*args), "takes 24 positional arguments but 8 were given"),
        (lambda: _kernels.try_reshape_and_cache(*args, None), "takes 8 positional arguments but 9 were given"),
    ]:
        with pytest.raises(TypeError, match=message):
            call()


def test_an_error_inside_a_number_comes_through() -> None:
    class Number:
        def __index__(self) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_attention(window=Number())

"""The oracle itself: what is wrong in one row or one head is seen, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pagedcore import ops
from reference import Batch, check, make_batch


def many_short_and_one_long(dtype: torch.dtype) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Rows of short sequences are large, and the long one's are small: its errors vanish in a norm over the batch."""
    batch = make_batch([1] * 60 + [4000], [1] * 61, dtype=dtype, heads=(4, 2))
    return batch, *ops.paged_attention(*batch.args, return_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_wrong_row_is_seen(dtype: torch.dtype) -> None:
    batch, out, lse = many_short_and_one_long(dtype)
    check(batch, out, lse)
    wrong = out.clone()
    wrong[60, 2] *= {torch.float32: 1 + 1e-4, torch.float16: 1.02, torch.bfloat16: 1.12}[dtype]
    want = batch.expected()[0]
    assert np.linalg.norm(wrong.double().numpy() - want) / np.linalg.norm(want) < 1.5e-3  # next to nothing
    with pytest.raises(AssertionError, match="token 60, head 2: row error"):
        check(batch, wrong, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_wrong_element_is_seen(dtype: torch.dtype) -> None:
    batch, out, lse = many_short_and_one_long(dtype)
    out[60, 2, 10] += 1e-3 if dtype == torch.bfloat16 else 1e-4
    with pytest.raises(AssertionError, match=r"token 60, head 2: (row|element) error"):
        check(batch, out, lse)


def test_two_heads_changed_for_each_other_are_seen() -> None:
    batch, out, lse = many_short_and_one_long(torch.bfloat16)
    out[60, [0, 1]] = out[60, [1, 0]]
    with pytest.raises(AssertionError, match="token 60, head 0: row error"):
        check(batch, out, lse)


def test_a_wrong_lse_is_seen() -> None:
    batch, out, lse = many_short_and_one_long(torch.float32)
    lse[60, 3] += 1e-4
    with pytest.raises(AssertionError, match="lse error 1"):
        check(batch, out, lse)


def test_rows_that_see_nothing_must_be_zero() -> None:
    batch = make_batch([3, 0], [1, 1])
    out, lse = ops.paged_attention(*batch.args, return_lse=True)
    check(batch, out, lse)
    out[1, 0, 0] = 1e-9
    with pytest.raises(AssertionError):
        check(batch, out, lse)

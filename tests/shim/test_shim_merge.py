"""merge_states on the GPU's kernel, run by the host shim, against the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import ELEMENT, Device
from pagedcore import ops


@pytest.mark.parametrize("dtype", list(ELEMENT), ids=str)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_merge_states(shim: Any, dtype: torch.dtype, with_sinks: bool) -> None:
    """States that saw nothing among others, their outputs NaN; strided outputs, beside which nothing is written."""
    generator = torch.Generator().manual_seed(3)
    tokens, heads, dim = 37, 5, 72
    o_a, o_b = torch.randn(2, tokens, heads, dim, generator=generator).to(dtype)
    lse_a, lse_b = 4 * torch.randn(2, tokens, heads, generator=generator)
    for o, lse, rows in ((o_a, lse_a, slice(3, 6)), (o_b, lse_b, slice(5, 8))):
        o[rows], lse[rows] = float("nan"), float("-inf")
    sinks = torch.randn(heads, generator=generator) if with_sinks else None
    want, want_lse = ops.merge_states(o_a, lse_a, o_b, lse_b, sinks)

    wide = torch.full((tokens, heads, dim + 5), 7.0, dtype=dtype)
    wide_lse = torch.full((heads, tokens), 7.0)
    out, lse = wide[..., 2:-3], wide_lse.T
    with Device(shim) as device:
        fields: dict[str, Any] = {"num_tokens": tokens, "num_heads": heads, "v_head_dim": dim, "dtype": ELEMENT[dtype]}
        states = {"a": (o_a, lse_a), "b": (o_b, lse_b), "total": (out, lse)}
        for name, (o, state_lse) in states.items():
            fields[name] = (device.upload(o), *o.stride()[:2], device.upload(state_lse), *state_lse.stride())
        if sinks is not None:
            fields["sinks"] = device.upload(sinks)
        shim.merge_states(fields)
        got, got_lse = device.download_view(fields["total"][0], out), device.download_view(fields["total"][3], lse)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_lse, want_lse)
    edges = got.as_strided(wide.shape, wide.stride(), 0).clone()
    edges[..., 2:-3] = 7
    assert (edges == 7).all()


@pytest.mark.shim_only
def test_no_rows(plain_shim: Any) -> None:
    nothing = (0, 0, 0, 0, 0, 0)
    fields = {"a": nothing, "b": nothing, "total": nothing, "num_tokens": 0, "num_heads": 2, "v_head_dim": 8}
    plain_shim.merge_states({**fields, "dtype": "float32"})

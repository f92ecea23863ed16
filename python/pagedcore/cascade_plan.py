"""The plan of a step's cascade attention: what both passes read that no layer changes, made once for all of them."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pagedcore import _kernels
from pagedcore.layout import dtype_name
from pagedcore.tensors import (
    carve,
    device_index,
    device_of,
    fill,
    new_bytes,
    query_tokens,
    refuse,
    require_axes,
    require_bytes,
    require_sequences,
    subtract,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

ALIGNMENT = 256  # bytes: every part of a workspace or plan begins on one


def plan_cascade(
    seq_lens: Any,
    query_start_loc: Any,
    *,
    num_shared_blocks: int,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_query_len: int,
    causal: bool = True,
    num_tokens: int | None = None,
    v_head_dim: int | None = None,
    dtype: Any = "bfloat16",
    out: Any = None,
) -> Any:
    """The plan of one step's `cascade_attention`, for every layer that agrees in heads, head sizes and dtype: the two
    work plans of a GPU, and the lengths of what is shared and of what is each sequence's own. Made on the device, as
    `plan_attention` makes its, whose arguments these are.

    Returns `out`: uint8 ``[cascade_plan_size(...)]`` that begins on 16 bytes, allocated if absent.
    """
    shared_tokens = whole("num_shared_blocks", num_shared_blocks, 0) * whole("block_size", block_size, 1)
    (num_seqs,) = require_axes("seq_lens", seq_lens, "num_seqs")
    num_tokens = query_tokens(num_tokens, num_seqs, max_query_len)
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    dtype = dtype_name(dtype)
    if out is None:
        sizes = (num_tokens, num_seqs, num_heads, num_kv_heads, head_dim, v_head_dim)
        out = new_bytes(seq_lens, plan_places(*sizes, dtype, device_of(seq_lens))["end"])
    from pagedcore import ops

    traced = ops.is_compiling() or ops.any_subclass(seq_lens, query_start_loc, out)
    make = sys.modules["torch"].ops.pagedcore.plan_cascade if traced else write_plan
    make(
        seq_lens,
        query_start_loc,
        out,
        shared_tokens=shared_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        num_tokens=num_tokens,
        max_query_len=max_query_len,
        dtype=dtype,
        causal=causal,
    )
    return out


def cascade_plan_size(
    max_num_tokens: int,
    max_num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    v_head_dim: int | None = None,
    dtype: Any = "bfloat16",
    device: Any = "cuda",
) -> int:
    """Bytes of the `out` of every `plan_cascade` of at most these sizes, from shapes alone."""
    dim = head_dim if v_head_dim is None else v_head_dim
    sizes = (max_num_tokens, max_num_seqs, num_heads, num_kv_heads, head_dim, dim)
    return plan_places(*sizes, dtype_name(dtype), device_index(device))["end"]


class PlanParts(NamedTuple):
    """The parts of a plan as tensors."""

    shared_len: Any  # int32 [1]: tokens that all sequences share
    starts: Any  # int32 [2]: of the shared pass, whose one sequence has all query tokens
    own_lens: Any  # int32 [num_seqs]: tokens behind the shared ones
    shared: Any  # uint8: the shared pass's plan; None where there is nothing to plan
    own: Any  # uint8: that of the other


def parts_of(memory: Any, places: Mapping[str, int], num_seqs: int) -> PlanParts:
    """The parts of a plan that lies in `memory` at `places`."""

    def plan(name: str, end: str) -> Any:
        size = places[end] - places[name]
        return carve(memory, places[name], (size,), "uint8") if size else None

    return PlanParts(
        carve(memory, places["length"], (1,), "int32"),
        carve(memory, places["starts"], (2,), "int32"),
        carve(memory, places["own lengths"], (num_seqs,), "int32"),
        plan("shared plan", "own plan"),
        plan("own plan", "end"),
    )


def require_lengths(parts: PlanParts, seq_lens: Any, shared_tokens: int) -> None:
    """Refuses a plan in the host's memory that was made for other lengths: the passes would read other keys."""
    if (planned := int(parts.shared_len[0])) != shared_tokens:
        refuse("plan", f"one that was made for {shared_tokens} shared tokens", f"one for {planned}")
    own, wanted = np.asarray(parts.own_lens), np.maximum(np.asarray(seq_lens) - shared_tokens, 0)
    if (other := np.flatnonzero(own != wanted)).size:
        seq = int(other[0])
        refuse("plan", f"one that was made for these seq_lens, {wanted[seq]} own tokens of sequence {seq}", own[seq])


def write_plan(
    seq_lens: Any,
    query_start_loc: Any,
    out: Any,
    *,
    shared_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    num_tokens: int,
    max_query_len: int,
    dtype: str,
    causal: bool = True,
) -> None:
    """`plan_cascade` into `out`: what ``torch.ops.pagedcore.plan_cascade`` is. ``seq_len - shared_tokens`` tokens are a
    sequence's own; a negative number, which padding has, is 0.
    """
    # What the second plan would refuse: by then the first is written.
    num_seqs = require_sequences(seq_lens, query_start_loc)
    max_query_len = whole("max_query_len", max_query_len, 0)
    if causal not in (True, False):
        refuse("causal", "a bool", repr(causal))
    sizes = (num_tokens, num_seqs, num_heads, num_kv_heads, head_dim, v_head_dim)
    places = plan_places(*sizes, dtype, device_of(seq_lens))
    require_bytes("out", out, places["end"], "seq_lens", seq_lens)
    parts = parts_of(out, places, num_seqs)
    fill(parts.shared_len, shared_tokens)
    fill(parts.starts[:1], 0)
    fill(parts.starts[1:], num_tokens)
    subtract(seq_lens, shared_tokens, parts.own_lens)
    if parts.own is None:
        return
    shape: dict[str, Any] = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "v_head_dim": v_head_dim,
        "num_tokens": num_tokens,
        "dtype": dtype,
        "shared_tokens": shared_tokens,
    }
    _kernels.plan_attention(
        parts.shared_len, parts.starts, parts.shared, max_query_len=num_tokens, causal=False, **shape
    )
    _kernels.plan_attention(
        parts.own_lens, query_start_loc, parts.own, max_query_len=max_query_len, causal=causal, **shape
    )


@functools.lru_cache(maxsize=256)  # the layers of a step ask for the same
def plan_places(
    num_tokens: int,
    num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    dtype: str,
    device: int,
) -> dict[str, int]:
    """Where each part of a plan begins, in bytes; ``end`` is its size."""
    from pagedcore import ops

    def plan(seqs: int) -> int:
        heads = (num_heads, num_kv_heads, head_dim)
        return ops.attention_plan_size(num_tokens, seqs, *heads, v_head_dim=v_head_dim, dtype=dtype, device=device)

    own = plan(num_seqs)  # which refuses wrong sizes
    sizes = {"length": 4, "starts": 8, "own lengths": 4 * num_seqs, "shared plan": plan(1), "own plan": own}
    return place(sizes)


def place(sizes: Mapping[str, int]) -> dict[str, int]:
    """Offsets of parts of these many bytes one after another, each aligned; ``end`` is behind the last."""
    places, at = {}, 0
    for name, size in sizes.items():
        places[name] = at
        at += -(-size // ALIGNMENT) * ALIGNMENT
    places["end"] = at
    return places

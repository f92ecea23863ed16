"""Attention of sequences that begin with the same blocks: the shared keys are read once for all of them.

Three calls make it. One pass attends over the shared blocks as if all query rows were one sequence's, without a causal
mask, since every query comes after them. A second attends over what each sequence has for itself. `merge_states` makes
one result of both, and adds the sinks.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagedcore import _kernels
from pagedcore.cascade_plan import parts_of, place, plan_places, require_lengths, write_plan
from pagedcore.errors import UnsupportedError
from pagedcore.layout import ITEM_SIZES, dtype_name
from pagedcore.tensors import (
    carve,
    device_index,
    device_of,
    dtype_of,
    hide,
    name_of_dtype,
    new_bytes,
    new_lse,
    new_out,
    refuse,
    require_axes,
    require_bytes,
    require_sequences,
    sliceable,
    whole,
)


def cascade_attention(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    query_start_loc: Any,
    *,
    num_shared_blocks: int,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    block_table_rows: Any = None,
    split_size: int | None = None,
    plan: Any = None,
    workspace: Any = None,
    num_threads: int | None = None,
) -> Any:
    """`paged_attention` of sequences whose first `num_shared_blocks` blocks are the same, which are read once.

    Arguments and result are those of `paged_attention`. Every sequence has all its queries of this call behind the
    shared blocks (seq_len - query_len >= num_shared_blocks * block_size), or is padding: seq_len 0, which gives 0 with
    lse -inf. On the CPU that is checked, and where padding stands does not matter; a GPU takes the shared blocks from
    the first sequence's row of the table, so that there padding comes last. 0 shared blocks: `paged_attention` itself.

    The two passes round their outputs to the query's dtype before they are merged: one rounding more than
    `paged_attention` has.

    plan: of `plan_cascade`, which all layers of a step share that agree in what it is made from. What is absent is
    planned for this call. One of other lengths, or of another number of shared tokens, is refused on the CPU. A GPU
    follows it in lengths; of another number of shared tokens it is flagged (`device_errors`), and nothing is attended
    to.

    workspace: uint8 ``[cascade_workspace_size(...)]`` of one's own, of the query's library and device, that begins on
    16 bytes. All that lies between the passes is kept in it: with it, `out`, and `lse` if one is wanted, nothing is
    allocated. It belongs to one stream.

    Raises UnsupportedError for a window (unless it is no shorter than max_seq_len), ALiBi and a split_size: a bias and
    a window would need positions that the shared pass does not have, and results do depend on who shares.
    """
    from pagedcore import ops

    _refuse_options(window, max_seq_len, alibi_slopes, split_size)
    if out is None:
        out = new_out(query, v_cache)
    if lse is None and return_lse:
        lse = new_lse(query, "query", "head_dim")
    tensors = (query, k_cache, v_cache, block_table, seq_lens, query_start_loc, out, lse, sinks, k_scale, v_scale)
    traced = ops.is_compiling() or ops.any_subclass(*tensors, block_table_rows, plan, workspace)
    attend = sys.modules["torch"].ops.pagedcore.cascade_attention if traced else attend_in_parts
    attend(
        query,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        query_start_loc,
        out,
        lse,
        num_shared_blocks=num_shared_blocks,
        scale=scale,
        causal=causal,
        softcap=softcap,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        block_table_rows=block_table_rows,
        plan=plan,
        workspace=workspace,
        num_threads=num_threads,
    )
    return out if lse is None else (out, lse)


def cascade_workspace_size(
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
    """Bytes of a workspace for every `cascade_attention` of at most these sizes, from shapes alone."""
    dim = head_dim if v_head_dim is None else v_head_dim
    sizes = (max_num_tokens, max_num_seqs, num_heads, num_kv_heads, head_dim, dim)
    return _places(*sizes, dtype_name(dtype), device_index(device))["end"]


def attend_in_parts(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    query_start_loc: Any,
    out: Any,
    lse: Any = None,
    *,
    num_shared_blocks: int,
    scale: float | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    block_table_rows: Any = None,
    plan: Any = None,
    workspace: Any = None,
    num_threads: int | None = None,
) -> None:
    """`cascade_attention` into `out`, and `lse` if it is given: what ``torch.ops.pagedcore.cascade_attention`` is."""
    from pagedcore import ops

    block_table, block_table_rows = sliceable(block_table), sliceable(block_table_rows)
    num_shared_blocks = whole("num_shared_blocks", num_shared_blocks)
    max_seq_len = None if max_seq_len is None else whole("max_seq_len", max_seq_len)
    num_tokens, num_heads, head_dim = require_axes("query", query, "num_tokens", "num_heads", "head_dim")
    num_kv_heads, block_size = require_axes("k_cache", k_cache, "num_blocks", "num_kv_heads", "block_size", "dim")[1:3]
    v_head_dim = require_axes("v_cache", v_cache, "num_blocks", "num_kv_heads", "block_size", "v_head_dim")[3]
    options: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "num_threads": num_threads,
    }
    call = _Call.checked(
        block_table, seq_lens, query_start_loc, block_table_rows, num_shared_blocks, block_size, max_seq_len
    )
    device, dtype = device_of(query), dtype_name(dtype_of(query))
    sizes = (num_tokens, call.num_seqs, num_heads, num_kv_heads, head_dim, v_head_dim)
    places = _places(*sizes, dtype, device)
    if workspace is not None:
        workspace = sliceable(workspace)
        require_bytes("workspace", workspace, places["end"], "query", query)
    if call.donor is None:  # nothing is shared, or nobody is there
        ops.paged_attention(
            query,
            k_cache,
            v_cache,
            block_table,
            seq_lens,
            query_start_loc,
            causal=causal,
            sinks=sinks,
            out=out,
            lse=lse,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            block_table_rows=block_table_rows,
            workspace=workspace,
            **options,
        )
        return
    options["shared_tokens"] = shared_tokens = num_shared_blocks * block_size
    in_plan = plan_places(*sizes, dtype, device)
    if workspace is None:
        workspace = new_bytes(query, places["end"])

    def part(name: str, dtype: Any, *shape: int) -> Any:
        return carve(workspace, places[name], shape, dtype)

    states = [part(name, dtype_of(query), num_tokens, num_heads, v_head_dim) for name in ("shared", "own")]
    lses = [part(name, "float32", num_tokens, num_heads) for name in ("shared lse", "own lse")]
    if plan is None:
        plan = part("plan", "uint8", in_plan["end"])
        write_plan(
            seq_lens,
            query_start_loc,
            plan,
            shared_tokens=shared_tokens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            num_tokens=num_tokens,
            max_query_len=num_tokens if max_query_len is None else max_query_len,
            dtype=dtype,
            causal=causal,
        )
    else:
        plan = sliceable(plan)
        require_bytes("plan", plan, in_plan["end"], "query", query)
    parts = parts_of(plan, in_plan, call.num_seqs)
    if device < 0:
        require_lengths(parts, seq_lens, shared_tokens)
    # The passes run one after the other, so they share what memory they need themselves.
    memory = carve(workspace, places["attention"], (places["end"] - places["attention"],), "uint8")
    first = slice(call.donor, call.donor + 1)
    _kernels.paged_attention(
        query,
        k_cache,
        v_cache,
        block_table[:, :num_shared_blocks] if block_table_rows is not None else block_table[first, :num_shared_blocks],
        parts.shared_len,
        parts.starts,
        states[0],
        lses[0],
        causal=False,
        max_query_len=num_tokens,
        block_table_rows=None if block_table_rows is None else block_table_rows[first],
        plan=parts.shared,
        workspace=memory,
        **options,
    )
    _kernels.paged_attention(
        query,
        k_cache,
        v_cache,
        block_table[:, num_shared_blocks:],
        parts.own_lens,
        query_start_loc,
        states[1],
        lses[1],
        causal=causal,
        max_query_len=max_query_len,
        block_table_rows=block_table_rows,
        plan=parts.own,
        workspace=memory,
        **options,
    )
    hide(lses[0], lses[1], part("mask", "bool", num_tokens, num_heads))
    merged = part("lse", "float32", num_tokens, num_heads) if lse is None else lse
    ops.merge_states(states[0], lses[0], states[1], lses[1], sinks, out=out, lse=merged, num_threads=num_threads)


# ------------------------------------------------------------------------------------------------------------ checks


def _refuse_options(window: int | None, max_seq_len: int | None, alibi_slopes: Any, split_size: int | None) -> None:
    name, got, expected, reason = "", "", "none", ""
    if window is not None:
        window = whole("window", window)
        max_seq_len = None if max_seq_len is None else whole("max_seq_len", max_seq_len)
    if window is not None and (max_seq_len is None or window < max_seq_len):
        limit = "max_seq_len" if max_seq_len is not None else "max_seq_len, which was not given"
        name, got, expected = "window", str(window), f"none, or one no shorter than {limit}"
        reason = "the shared blocks are seen whole"
    elif alibi_slopes is not None:
        name, got, reason = "alibi_slopes", "slopes", "the shared blocks are seen without positions"
    elif split_size is not None:
        name, got, reason = "split_size", str(split_size), "the result depends on who shares"
    if name:
        raise UnsupportedError(
            f"{name}: expected {expected}, got {got}: {reason} in cascade attention",
            hint="use paged_attention",
            argument=name,
            got=got,
            expected=expected,
        )


@dataclass(frozen=True)
class _Call:
    """What is known of a call once it is checked."""

    num_seqs: int
    donor: int | None  # the sequence whose row of the table has the shared blocks; None: nothing to share

    @classmethod
    def checked(
        cls,
        block_table: Any,
        seq_lens: Any,
        query_start_loc: Any,
        block_table_rows: Any,
        num_shared_blocks: int,
        block_size: int,
        max_seq_len: int | None,
    ) -> _Call:
        """Shapes; and, of index tensors in the host's memory, what they hold."""
        table_rows, max_blocks = require_axes("block_table", block_table, "num_seqs", "max_blocks")
        num_seqs = require_sequences(seq_lens, query_start_loc)
        num_rows = table_rows
        if block_table_rows is not None:
            (num_rows,) = require_axes("block_table_rows", block_table_rows, "num_seqs")
        if num_rows != num_seqs:
            refuse(
                "block_table" if block_table_rows is None else "block_table_rows", f"num_seqs = {num_seqs}", num_rows
            )
        tables = {"block_table": block_table}
        if block_table_rows is not None:
            tables["block_table_rows"] = block_table_rows
        for name, tensor in tables.items():
            if (dtype := name_of_dtype(tensor)) != "int32":
                refuse(name, "dtype int32", dtype)
        if not 0 <= num_shared_blocks < max(max_blocks, 1):
            refuse("num_shared_blocks", f"0 or more, and fewer than the {max_blocks} columns", num_shared_blocks)
        if num_shared_blocks == 0 or num_seqs == 0:
            return cls(num_seqs, None)
        if any(device_of(tensor) >= 0 for tensor in (seq_lens, *tables.values())):
            return cls(num_seqs, 0)
        lens, starts, table, *rows = (np.asarray(tensor) for tensor in (seq_lens, query_start_loc, *tables.values()))
        live = np.flatnonzero(lens)
        if not live.size:
            return cls(num_seqs, None)
        shared_tokens = num_shared_blocks * block_size
        behind = lens - np.diff(starts)
        if (short := live[behind[live] < shared_tokens]).size:
            seq = int(short[0])
            expected = (
                f"{shared_tokens} tokens or more before the sequence's queries, {num_shared_blocks} shared blocks"
            )
            refuse(f"seq_lens[{seq}]", expected, int(behind[seq]))
        limit = max_blocks * block_size if max_seq_len is None else min(max_seq_len, max_blocks * block_size)
        if (long := live[lens[live] > limit]).size:
            refuse(f"seq_lens[{int(long[0])}]", f"at most {limit}", int(lens[long[0]]))
        of = rows[0][live] if rows else live
        if rows and (wrong := (of < 0) | (of >= table_rows)).any():
            seq = int(live[wrong.argmax()])
            refuse(f"block_table_rows[{seq}]", f"a row in [0, {table_rows})", int(rows[0][seq]))
        other = table[of, :num_shared_blocks] != table[of[0], :num_shared_blocks]
        if other.any():
            at, index_of_block = (int(i[0]) for i in other.nonzero())
            refuse(
                "block_table",
                f"the same first {num_shared_blocks} blocks for all sequences",
                f"another at index {index_of_block} of sequence {int(live[at])}",
            )
        return cls(num_seqs, int(live[0]))


# --------------------------------------------------------------------------------------------------------- workspace


@functools.lru_cache(maxsize=256)  # the layers of a step ask for the same
def _places(
    num_tokens: int,
    num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    dtype: str,
    device: int,
) -> dict[str, int]:
    """Where each part of a workspace begins, in bytes; ``end`` is its size."""
    from pagedcore import ops

    heads = (num_heads, num_kv_heads, head_dim)
    plan = plan_places(num_tokens, num_seqs, *heads, v_head_dim, dtype, device)["end"]  # which refuses wrong sizes
    rows = num_tokens * num_heads
    state = rows * v_head_dim * ITEM_SIZES[dtype]
    sizes = {"shared": state, "own": state, "shared lse": 4 * rows, "own lse": 4 * rows, "lse": 4 * rows, "mask": rows}
    sizes["plan"] = plan
    sizes["attention"] = ops.attention_workspace_size(
        num_tokens, num_seqs, *heads, v_head_dim=v_head_dim, dtype=dtype, device=device
    )
    return place(sizes)

"""Level 4: what is done to tensors. Write K and V to the cache, attend to it, copy and clear its blocks.

Tensors are torch tensors or NumPy arrays on the CPU (anything with DLPack's C exchange API or the buffer protocol).
Axis order is fixed, strides are not: the last axis must be contiguous, all others may have any stride, so a cache in
another order is passed as a transposed view. Index tensors are int32, ``slot_mapping`` int64.

Every call checks its arguments first; on an error nothing has been written. The GIL is released while it works: until
it returns, no other thread may write to what it reads (an index that changes after its check is followed unchecked) or
read what it writes.
"""

from __future__ import annotations

import sys
from typing import Any

from pagedcore import _kernels
from pagedcore.errors import InvalidArgumentError, UnsupportedError
from pagedcore.layout import KVCache


def needs_dispatcher(*tensors: Any) -> bool:
    """Whether a call on these must go through ``torch.ops``. `pagedcore.torch` puts its own function in this place."""
    if "torch" not in sys.modules:
        return False
    import pagedcore.torch

    return pagedcore.torch.needs_dispatcher(*tensors)


def _torch_ops() -> Any:
    return sys.modules["torch"].ops.pagedcore


def _unsupported(argument: str, got: Any, expected: str) -> UnsupportedError:
    return UnsupportedError(
        f"{argument}: expected {expected}, got {got!r}", argument=argument, got=got, expected=expected
    )


def _refuse_given(**arguments: Any) -> None:
    """Refuses the first argument that was given."""
    for name, value in arguments.items():
        if value is not None:
            raise _unsupported(name, value, "None")


def reshape_and_cache(
    key: Any,
    value: Any,
    k_cache: Any,
    v_cache: Any,
    slot_mapping: Any,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    num_threads: int | None = None,
) -> None:
    """Writes this step's K and V to their slots.

    key ``[num_tokens, num_kv_heads, head_dim]``, value ``[num_tokens, num_kv_heads, v_head_dim]``, caches
    ``[num_blocks, num_kv_heads, block_size, dim]``, slot_mapping int64 ``[num_tokens]`` = block * block_size + offset;
    a negative slot is padding and is skipped. A slot past the cache is an error, and nothing is written. Of two tokens
    with the same slot the later one is kept, however many threads run.
    """
    if not (k_scale is v_scale is None):
        _refuse_given(k_scale=k_scale, v_scale=v_scale)
    traced = needs_dispatcher(key, value, k_cache, v_cache, slot_mapping)
    write = _torch_ops().reshape_and_cache if traced else _kernels.reshape_and_cache
    write(key, value, k_cache, v_cache, slot_mapping, num_threads=num_threads)


def paged_attention(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    query_start_loc: Any,
    *,
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
    """Attention of this step's queries over the paged cache: decode, chunked prefill and mixed batches in one call.

    query ``[num_tokens, num_heads, head_dim]``, all sequences' queries one after another; query_start_loc int32
    ``[num_seqs + 1]`` their cumulative lengths; seq_lens int32 ``[num_seqs]`` the tokens in the cache, this step's
    included; block_table int32 ``[num_seqs, max_blocks]``. Query i of a sequence has position seq_len - query_len + i.

    Returns out ``[num_tokens, num_heads, v_head_dim]``, or ``(out, lse)`` if an lse is asked for: float32
    ``[num_tokens, num_heads]``, natural log. A row that sees no key (seq_len 0, padding) is 0, with lse -inf.
    """
    if not (k_scale is v_scale is plan is workspace is None):
        _refuse_given(k_scale=k_scale, v_scale=v_scale, plan=plan, workspace=workspace)
    if out is None:
        out = _new_out(query, v_cache)
    if lse is None and return_lse:
        lse = _new_lse(query)
    traced = needs_dispatcher(
        query,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        query_start_loc,
        out,
        lse,
        alibi_slopes,
        sinks,
        block_table_rows,
    )
    attend = _torch_ops().paged_attention if traced else _kernels.paged_attention
    attend(
        query,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        query_start_loc,
        out,
        lse,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        block_table_rows=block_table_rows,
        split_size=split_size,
        num_threads=num_threads,
    )
    return out if lse is None else (out, lse)


def require_axes(name: str, tensor: Any, *axes: str) -> tuple[int, ...]:
    """The shape of a tensor that must have these axes."""
    shape = getattr(tensor, "shape", None)
    if shape is None:
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if len(shape) != len(axes):
        raise InvalidArgumentError(
            f"{name}: expected shape [{', '.join(axes)}], got {list(shape)}",
            argument=name,
            got=tuple(shape),
            expected=len(axes),
        )
    return tuple(shape)


def _new_out(query: Any, v_cache: Any) -> Any:
    """[num_tokens, num_heads, v_head_dim] in the library and dtype of `query`."""
    num_tokens, num_heads, _ = require_axes("query", query, "num_tokens", "num_heads", "head_dim")
    v_head_dim = require_axes("v_cache", v_cache, "num_blocks", "num_kv_heads", "block_size", "v_head_dim")[3]
    if hasattr(query, "new_empty"):  # torch
        return query.new_empty((num_tokens, num_heads, v_head_dim))
    import numpy as np

    # A memoryview has no dtype, and NumPy none for it that it did not make itself.
    return np.empty((num_tokens, num_heads, v_head_dim), getattr(query, "dtype", None) or np.asarray(query).dtype)


def _new_lse(query: Any) -> Any:
    """[num_tokens, num_heads] float32 in the library of `query`."""
    num_tokens, num_heads, _ = require_axes("query", query, "num_tokens", "num_heads", "head_dim")
    if hasattr(query, "new_empty"):  # torch
        return query.new_empty((num_tokens, num_heads), dtype=sys.modules["torch"].float32)
    import numpy as np

    return np.empty((num_tokens, num_heads), np.float32)


def _block_tensors(kv: Any) -> list[Any]:
    if isinstance(kv, KVCache):
        return kv.block_tensors()
    if isinstance(kv, (list, tuple)):
        return [tensor for item in kv for tensor in _block_tensors(item)]
    return [kv]


def copy_blocks(kv: Any, pairs: Any, *, num_threads: int | None = None) -> None:
    """Copies whole blocks, all layers: for each row (src, dst) of `pairs`, in order, block dst becomes a copy of src.

    kv is a `KVCache`, or a tensor whose first axis is the block, or a list of these. pairs int32 ``[num_pairs, 2]``.
    """
    caches = _block_tensors(kv)
    copy = _torch_ops().copy_blocks if needs_dispatcher(*caches, pairs) else _kernels.copy_blocks
    copy(caches, pairs, num_threads=num_threads)


def zero_blocks(kv: Any, blocks: Any, *, num_threads: int | None = None) -> None:
    """Clears whole blocks, all layers. kv as in `copy_blocks`; blocks int32 ``[count]``."""
    caches = _block_tensors(kv)
    zero = _torch_ops().zero_blocks if needs_dispatcher(*caches, blocks) else _kernels.zero_blocks
    zero(caches, blocks, num_threads=num_threads)


if "torch" in sys.modules:
    import pagedcore.torch  # noqa: F401  # registers the operators; else the first call after torch was imported does

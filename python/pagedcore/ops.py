"""Level 4: what is done to tensors. Write K and V to the cache, attend to it, copy, clear and move its blocks.

Tensors are torch tensors, NumPy arrays or CuPy arrays (anything with DLPack's C exchange API, the buffer protocol or
``__cuda_array_interface__``), all of one call on the CPU or on one CUDA device; there the ops are put on the library's
current stream, and return before they are done.
Axis order is fixed, strides are not: the last axis must be contiguous, all others may have any stride, so a cache in
another order is passed as a transposed view. Index tensors are int32, ``slot_mapping`` int64.

Every call checks its arguments first; on an error nothing has been written. What indices hold is checked on the CPU;
on a GPU what is out of range is masked and flagged (`device_errors`). The GIL is released while it works: until it
returns, no other thread may write to what it reads (an index that changes after its check is followed unchecked) or
read what it writes.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any, ParamSpec

from pagedcore import _kernels
from pagedcore.cascade import cascade_attention as cascade_attention
from pagedcore.cascade import cascade_workspace_size as cascade_workspace_size
from pagedcore.cascade_plan import cascade_plan_size as cascade_plan_size
from pagedcore.cascade_plan import plan_cascade as plan_cascade
from pagedcore.layout import dtype_name
from pagedcore.tensors import (
    block_tensors,
    device_index,
    device_of,
    new_bytes,
    new_like,
    new_lse,
    new_out,
    query_tokens,
    require_axes,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_Arguments = ParamSpec("_Arguments")


def is_compiling() -> bool:
    """Whether torch compiles this call. `pagedcore.torch` puts torch's own function in this place."""
    if "torch" not in sys.modules:
        return False
    import pagedcore.torch  # noqa: F401

    return is_compiling()  # what is there now


#: Whether one of these is of a subclass of torch's tensors; False while nobody has imported torch.
any_subclass = _kernels.any_torch_subclass

# The two ops of every layer ask the kernels to try: these look for subclasses by themselves, and take all arguments by
# position, since Python makes a dict of so many keywords.


def _torch_ops() -> Any:
    return sys.modules["torch"].ops.pagedcore


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

    Caches of float8_e4m3fn, or of uint8, hold codes (docs/quantisation.md). k_scale and v_scale, float32, say what a
    code is multiplied by: ``[1]`` or ``[num_kv_heads]`` are used as they are, and ``[num_blocks, num_kv_heads,
    block_size]`` are made of each row and written. None is 1.
    """
    if is_compiling() or not _kernels.try_reshape_and_cache(
        key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale, num_threads
    ):
        _torch_ops().reshape_and_cache(
            key, value, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale, num_threads=num_threads
        )


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
    Caches of float8_e4m3fn or uint8 hold codes, with their scales as `reshape_and_cache` has them.

    scale: of q · k, 1 / sqrt(head_dim) where absent. window W: position i sees j if i - W < j <= i. softcap c > 0:
    c * tanh(score / c). alibi_slopes float32 ``[num_heads]``. sinks float32 ``[num_heads]``: logits that take their
    share of the softmax and of the lse. block_table_rows int32 ``[num_seqs]``: the table's row of each sequence, row i
    of sequence i where absent. max_query_len, max_seq_len: tokens that no sequence exceeds. split_size: None, the work
    is cut as fits; 0, not at all; n, at every n keys, so that a result does not depend on the batch.

    Raises InvalidArgumentError, BlockError or UnsupportedError, which name the argument; then nothing was written.

    Returns out ``[num_tokens, num_heads, v_head_dim]``, or ``(out, lse)`` if an lse is asked for: float32
    ``[num_tokens, num_heads]``, natural log. A row that sees no key (seq_len 0, padding) is 0, with lse -inf.

    On a GPU a plan says how the work is cut: `plan_attention` makes one, which all layers of a step share that agree in
    what it is made from. workspace is memory of `attention_workspace_size` bytes. What is absent is planned and
    allocated for this call. Both belong to one stream; the CPU needs neither.
    """
    if out is None:
        out = new_out(query, v_cache)
    if lse is None and return_lse:
        lse = new_lse(query, "query", "head_dim")
    if is_compiling() or not _kernels.try_paged_attention(
        query,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        query_start_loc,
        out,
        lse,
        scale,
        causal,
        window,
        softcap,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
        max_query_len,
        max_seq_len,
        block_table_rows,
        split_size,
        plan,
        workspace,
        num_threads,
        None,  # shared_tokens, which a cascade's passes have
    ):
        _torch_ops().paged_attention(
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
            k_scale=k_scale,
            v_scale=v_scale,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            block_table_rows=block_table_rows,
            split_size=split_size,
            plan=plan,
            workspace=workspace,
            num_threads=num_threads,
        )
    return out if lse is None else (out, lse)


def explain_attention(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    *,
    num_seqs: int,
    max_query_len: int | None = None,
    split_size: int | None = None,
) -> str:
    """Which kernel `paged_attention` runs for these tensors (arguments as it has them), and why it is not a faster one.

    On a GPU "decode", "mixed" or "prefill", which use tensor cores, or "generic: " and what keeps them from it. Without
    max_query_len one query there may have all tokens, as `paged_attention` has to take it; where that made the choice
    it is said. On the CPU "streaming" or "packed", by each sequence's own query, and the instruction set. Nothing is
    run, and no contents are read.
    """
    kernel, reason = _kernels.explain_attention(query, k_cache, v_cache, num_seqs, max_query_len, split_size)
    return kernel if reason is None else f"{kernel}: {reason}"


def merge_states(
    o_a: Any,
    lse_a: Any,
    o_b: Any,
    lse_b: Any,
    sinks: Any = None,
    *,
    out: Any = None,
    lse: Any = None,
    num_threads: int | None = None,
) -> tuple[Any, Any]:
    """Two outputs of attention over disjoint keys as the one over all of them: split keys, a prefix that many share.

    o_a, o_b ``[num_tokens, num_heads, v_head_dim]`` with their lse float32 ``[num_tokens, num_heads]``, natural log, as
    `paged_attention` returns them without sinks. sinks float32 ``[num_heads]`` are logits that join here, once. out and
    lse are written in place if given.

    Returns ``(out, lse)``. A row that neither saw a key for (lse -inf) is 0 with lse -inf, whatever o_a and o_b hold.
    """
    if out is None:
        out = new_like(o_a, require_axes("o_a", o_a, "num_tokens", "num_heads", "v_head_dim"))
    if lse is None:
        lse = new_lse(o_a, "o_a", "v_head_dim")
    traced = is_compiling() or any_subclass(o_a, lse_a, o_b, lse_b, out, lse, sinks)
    merge = _torch_ops().merge_states if traced else _kernels.merge_states
    merge(o_a, lse_a, o_b, lse_b, out, lse, sinks, num_threads=num_threads)
    return out, lse


def plan_attention(
    seq_lens: Any,
    query_start_loc: Any,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_query_len: int,
    causal: bool = True,
    window: int | None = None,
    split_size: int | None = None,
    v_head_dim: int | None = None,
    num_tokens: int | None = None,
    dtype: Any = "bfloat16",
    out: Any = None,
) -> Any:
    """The plan of one step's attention, for `paged_attention`: how its work is cut over a GPU. Made on the device from
    what the lengths hold then, without waiting for it, so that a captured graph plans anew at each replay.

    seq_lens int32 ``[num_seqs]`` and query_start_loc int32 ``[num_seqs + 1]`` are those of `paged_attention`.

    The calls that use it must have these same lengths, heads, head sizes, dtype (of the queries), mask, split_size and
    max_query_len, and num_tokens query tokens (rows of `query`, padding included). num_tokens can be left out where
    max_query_len is 1 alone, for a token a sequence: how many there are is known to the device, which nobody asks.

    Returns `out`: uint8 ``[attention_plan_size(...)]``, allocated if absent. On the CPU there is nothing to plan, and
    it has no elements.
    """
    (num_seqs,) = require_axes("seq_lens", seq_lens, "num_seqs")
    if v_head_dim is None:
        v_head_dim = head_dim
    num_tokens = query_tokens(num_tokens, num_seqs, max_query_len)
    dtype = dtype_name(dtype)
    if out is None:
        sizes = {
            "num_tokens": num_tokens,
            "num_seqs": num_seqs,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "max_query_len": max_query_len,
        }
        out = new_bytes(seq_lens, _memory_of(sizes, device_of(seq_lens), dtype, split_size)[0])
    traced = is_compiling() or any_subclass(seq_lens, query_start_loc, out)
    make = _torch_ops().plan_attention if traced else _kernels.plan_attention
    make(
        seq_lens,
        query_start_loc,
        out,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        num_tokens=num_tokens,
        max_query_len=max_query_len,
        dtype=dtype,
        window=window,
        causal=causal,
        split_size=split_size,
    )
    return out


def _attention_memory(
    max_num_tokens: int,
    max_num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    v_head_dim: int | None = None,
    max_query_len: int | None = None,
    split_size: int | None = None,
    dtype: Any = "bfloat16",
    device: Any = "cuda",
) -> tuple[int, int]:
    """(bytes of a plan, bytes of a workspace) at most."""
    sizes = {
        "max_num_tokens": max_num_tokens,
        "max_num_seqs": max_num_seqs,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "v_head_dim": head_dim if v_head_dim is None else v_head_dim,
        "max_query_len": max_num_tokens if max_query_len is None else max_query_len,
    }
    return _memory_of(sizes, device_index(device), dtype_name(dtype), split_size)


def _memory_of(sizes: dict[str, Any], device: int, dtype: str, split_size: int | None) -> tuple[int, int]:
    """The same, of sizes by the names that the caller knows them by, in the order of the kernels'."""
    tokens, seqs, heads, kv_heads, dim, v_dim, query_len = (whole(name, size) for name, size in sizes.items())
    return _kernels.attention_memory(device, tokens, seqs, heads, kv_heads, dim, v_dim, query_len, dtype, split_size)


def _taking_arguments_of(
    other: Callable[_Arguments, Any],
) -> Callable[[Callable[_Arguments, int]], Callable[_Arguments, int]]:
    """For a function that hands all of its arguments on to `other`: shows them as its own."""

    def shown(function: Callable[_Arguments, int]) -> Callable[_Arguments, int]:
        function.__signature__ = inspect.signature(other).replace(return_annotation="int")  # type: ignore[attr-defined]
        return function

    return shown


@_taking_arguments_of(_attention_memory)
def attention_workspace_size(*sizes: Any, **options: Any) -> int:
    """Bytes of a workspace for every `paged_attention` of at most these sizes, with room for a plan where a call has
    none. From shapes alone: no length is looked at. 0 on the CPU.
    """
    plan, workspace = _attention_memory(*sizes, **options)
    return plan + workspace


@_taking_arguments_of(_attention_memory)
def attention_plan_size(*sizes: Any, **options: Any) -> int:
    """Bytes of the `out` of every `plan_attention` of at most these sizes. 0 on the CPU."""
    return _attention_memory(*sizes, **options)[0]


def warmup(device: Any = "cuda") -> None:
    """Loads every kernel onto a GPU, so that a CUDA graph can capture any op. Nothing to do on the CPU."""
    index = device_index(device)
    if index >= 0:
        _kernels.warm_up(index)


#: What `device_errors` says of each word that kernels set.
_DEVICE_FAULTS = (
    "a block id outside of [0, num_blocks)",
    "a sequence longer than its row of the block table, or a row that the table does not have",
    "a slot past the cache",
    "a change of a block table outside of it",
    "a plan that was made for a call of other sizes or lengths, or was not made: what it did not fit was left out",
    "query starts that do not rise from 0 to num_tokens at most, or lengths below 0 or past max_query_len, max_seq_len",
)


def device_errors(device: Any = "cuda") -> list[str]:
    """What the ops met on a GPU since the last call that is an error on the CPU, each kind once.

    Nothing on the host reads the indices of a GPU op: kernels mask what is out of range, and flag it here. Does not
    wait for the device: synchronise first to hear of the last ops too. Always empty for the CPU, where they are raised.
    """
    index = device_index(device)
    return [_DEVICE_FAULTS[kind] for kind in _kernels.take_device_faults(index)] if index >= 0 else []


def copy_blocks(kv: Any, pairs: Any, *, num_threads: int | None = None) -> None:
    """Copies whole blocks, all layers: for each row (src, dst) of `pairs`, in order, block dst becomes a copy of src.

    kv is a `KVCache`, or a tensor whose first axis is the block, or a list of these. pairs int32 ``[num_pairs, 2]``.
    On a GPU pairs go in any order: there no dst may be another pair's src or dst.
    """
    caches = block_tensors(kv)
    copy = _torch_ops().copy_blocks if is_compiling() or any_subclass(*caches, pairs) else _kernels.copy_blocks
    copy(caches, pairs, num_threads=num_threads)


def zero_blocks(kv: Any, blocks: Any, *, num_threads: int | None = None) -> None:
    """Clears whole blocks, all layers. kv as in `copy_blocks`; blocks int32 ``[count]``."""
    caches = block_tensors(kv)
    zero = _torch_ops().zero_blocks if is_compiling() or any_subclass(*caches, blocks) else _kernels.zero_blocks
    zero(caches, blocks, num_threads=num_threads)


def gather_blocks(kv: Any, blocks: Any, out: Any, *, num_threads: int | None = None) -> None:
    """Copies whole blocks, all layers, into one staging buffer: for offload, export, compaction.

    kv as in `copy_blocks`; blocks int32 ``[count]``; out any tensor without gaps whose bytes are exactly those of the
    blocks. It gets, tensor of kv after tensor, ``[count, bytes of a block]``, a block's bytes in memory order: what
    `scatter_blocks` takes for a cache of the same layout.
    """
    caches = block_tensors(kv)
    gather = (
        _torch_ops().gather_blocks if is_compiling() or any_subclass(*caches, blocks, out) else _kernels.gather_blocks
    )
    gather(caches, blocks, out, num_threads=num_threads)


def scatter_blocks(kv: Any, blocks: Any, src: Any, *, num_threads: int | None = None) -> None:
    """The way back of `gather_blocks`: block ``blocks[i]`` becomes what is i-th in src. Of two entries with one block
    the later is kept on the CPU; on a GPU there must be none.
    """
    caches = block_tensors(kv)
    scatter = (
        _torch_ops().scatter_blocks if is_compiling() or any_subclass(*caches, blocks, src) else _kernels.scatter_blocks
    )
    scatter(caches, blocks, src, num_threads=num_threads)


def update_block_table(table: Any, updates: Any) -> None:
    """``table[row, index] = block`` for each (row, index, block) of `updates`, int32 ``[num_updates, 3]``: what changed
    in a table that is kept on a device. table int32 ``[rows, max_blocks]``. Of two updates of one entry the later holds
    on the CPU; on a GPU there must be none.
    """
    update = (
        _torch_ops().update_block_table
        if is_compiling() or any_subclass(table, updates)
        else _kernels.update_block_table
    )
    update(table, updates)


if "torch" in sys.modules:
    import pagedcore.torch  # noqa: F401  # registers the operators; else the first call after torch was imported does

"""The ops as torch operators: ``torch.ops.pagedcore.*``, for `torch.compile` and anything else that traces.

They write into the outputs they are given (``out``, ``lse``, the caches) and return nothing; `pagedcore.ops` allocates
what is absent and takes this way by itself while torch compiles, and for tensor subclasses. Outside of tracing
`pagedcore.ops` calls the kernels directly, which is quicker.

Importing this module registers the operators; `pagedcore.ops` imports it at the first torch tensor it sees. Import it
yourself if the first call happens inside a compiled function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pagedcore import _kernels, ops

if TYPE_CHECKING:
    from collections.abc import Sequence

_LIBRARY = torch.library.Library("pagedcore", "DEF")

_SCHEMAS = {
    "reshape_and_cache": (
        "(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, *,"
        " int? num_threads=None)"
    ),
    "paged_attention": (
        "(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor query_start_loc,"
        " Tensor(a!) out, Tensor(b!)? lse=None, *, float? scale=None, bool causal=True, int? window=None,"
        " int? max_query_len=None, int? max_seq_len=None, Tensor? block_table_rows=None, int? split_size=None,"
        " int? num_threads=None)"
    ),
    "copy_blocks": "(Tensor(a!)[] caches, Tensor pairs, *, int? num_threads=None)",
    "zero_blocks": "(Tensor(a!)[] caches, Tensor blocks, *, int? num_threads=None)",
}


def _reshape_and_cache(
    key: Any, value: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, *, num_threads: int | None = None
) -> None:
    _kernels.reshape_and_cache(key, value, k_cache, v_cache, slot_mapping, num_threads)


def _paged_attention(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    query_start_loc: Any,
    out: Any,
    lse: Any = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    block_table_rows: Any = None,
    split_size: int | None = None,
    num_threads: int | None = None,
) -> None:
    _kernels.paged_attention(
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
        max_query_len,
        max_seq_len,
        block_table_rows,
        split_size,
        num_threads,
    )


def _copy_blocks(caches: Sequence[Any], pairs: Any, *, num_threads: int | None = None) -> None:
    _kernels.copy_blocks(caches, pairs, num_threads)


def _zero_blocks(caches: Sequence[Any], blocks: Any, *, num_threads: int | None = None) -> None:
    _kernels.zero_blocks(caches, blocks, num_threads)


def _fake(*_args: Any, **_kwargs: Any) -> None:
    """Nothing is returned and no shape changes, so there is nothing to say about a call without data."""


def _register() -> None:
    implementations = {
        "reshape_and_cache": _reshape_and_cache,
        "paged_attention": _paged_attention,
        "copy_blocks": _copy_blocks,
        "zero_blocks": _zero_blocks,
    }
    for name, schema in _SCHEMAS.items():
        _LIBRARY.define(f"{name}{schema} -> ()")
        # For every device: a tensor that the kernels cannot take is refused by them, in words, not by the dispatcher.
        _LIBRARY.impl(name, implementations[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"pagedcore::{name}", _fake, lib=_LIBRARY)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def needs_dispatcher(tensor: Any) -> bool:
    """Whether a call on `tensor` must go through torch's dispatcher: while compiling, and for tensor subclasses."""
    return torch.compiler.is_compiling() or (isinstance(tensor, torch.Tensor) and type(tensor) not in _PLAIN)


_register()
ops.needs_dispatcher = needs_dispatcher

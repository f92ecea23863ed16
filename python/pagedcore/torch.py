"""The ops as torch operators: ``torch.ops.pagedcore.*``, for `torch.compile` and anything else that traces.

They write into the outputs they are given (``out``, ``lse``, the caches) and return nothing; `pagedcore.ops` allocates
what is absent and takes this way by itself while torch compiles, and for tensor subclasses. Outside of tracing
`pagedcore.ops` calls the kernels directly, which is quicker.

Importing this module registers the operators. `pagedcore.ops` does so when torch is there before it, else at its first
call with torch in the process; import it yourself if that call is inside a compiled function.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from pagedcore import _kernels, ops
from pagedcore.cascade import attend_in_parts
from pagedcore.cascade_plan import write_plan
from pagedcore.errors import InvalidArgumentError
from pagedcore.tensors import require_axes

if TYPE_CHECKING:
    from collections.abc import Callable

_LIBRARY = torch.library.Library("pagedcore", "DEF")

OPERATORS = {  # by name, the schemas of those that are one kernel each
    "reshape_and_cache": (
        "(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, *,"
        " Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, int? num_threads=None)"
    ),
    "paged_attention": (
        "(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor query_start_loc,"
        " Tensor(a!) out, Tensor(b!)? lse=None, *, float? scale=None, bool causal=True, int? window=None,"
        " float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? k_scale=None,"
        " Tensor? v_scale=None, int? max_query_len=None, int? max_seq_len=None, Tensor? block_table_rows=None,"
        " int? split_size=None, Tensor? plan=None, Tensor(c!)? workspace=None, int? num_threads=None)"
    ),
    "plan_attention": (
        "(Tensor seq_lens, Tensor query_start_loc, Tensor(a!) out, *, int num_heads, int num_kv_heads, int head_dim,"
        " int v_head_dim, int num_tokens, int max_query_len, str dtype, int? window=None, bool causal=True,"
        " int? split_size=None)"
    ),
    "merge_states": (
        "(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b, Tensor(a!) out, Tensor(b!) lse, Tensor? sinks=None, *,"
        " int? num_threads=None)"
    ),
    "copy_blocks": "(Tensor(a!)[] caches, Tensor pairs, *, int? num_threads=None)",
    "zero_blocks": "(Tensor(a!)[] caches, Tensor blocks, *, int? num_threads=None)",
    "gather_blocks": "(Tensor[] caches, Tensor blocks, Tensor(a!) out, *, int? num_threads=None)",
    "scatter_blocks": "(Tensor(a!)[] caches, Tensor blocks, Tensor src, *, int? num_threads=None)",
    "update_block_table": "(Tensor(a!) table, Tensor updates)",
}

# Made of the others, and one operator each all the same: what a call's indices hold is checked when it runs.
COMPOSED: dict[str, tuple[str, Callable[..., None]]] = {  # by name, schema and function
    "cascade_attention": (
        (
            "(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens,"
            " Tensor query_start_loc, Tensor(a!) out, Tensor(b!)? lse=None, *, int num_shared_blocks,"
            " float? scale=None, bool causal=True, float softcap=0.0, Tensor? sinks=None, Tensor? k_scale=None,"
            " Tensor? v_scale=None, int? max_query_len=None, int? max_seq_len=None, Tensor? block_table_rows=None,"
            " Tensor? plan=None, Tensor(c!)? workspace=None, int? num_threads=None)"
        ),
        attend_in_parts,
    ),
    "plan_cascade": (
        (
            "(Tensor seq_lens, Tensor query_start_loc, Tensor(a!) out, *, int shared_tokens, int num_heads,"
            " int num_kv_heads, int head_dim, int v_head_dim, int num_tokens, int max_query_len, str dtype,"
            " bool causal=True)"
        ),
        write_plan,
    ),
}


# What can be checked of a call without its data: dtypes, and the names of axes, each of which has one size in a call.
_AXES = {
    "query": ("num_tokens", "num_heads", "head_dim"),
    "key": ("num_tokens", "num_kv_heads", "head_dim"),
    "value": ("num_tokens", "num_kv_heads", "v_head_dim"),
    "k_cache": ("num_blocks", "num_kv_heads", "block_size", "head_dim"),
    "v_cache": ("num_blocks", "num_kv_heads", "block_size", "v_head_dim"),
    "slot_mapping": ("num_tokens",),
    "seq_lens": ("num_seqs",),
    "block_table": ("num_seqs", "max_blocks"),
    "block_table_rows": ("num_seqs",),
    "query_start_loc": ("num_seqs + 1",),
    "alibi_slopes": ("num_heads",),
    "sinks": ("num_heads",),
    "out": ("num_tokens", "num_heads", "v_head_dim"),
    "lse": ("num_tokens", "num_heads"),
    "o_a": ("num_tokens", "num_heads", "v_head_dim"),
    "lse_a": ("num_tokens", "num_heads"),
    "o_b": ("num_tokens", "num_heads", "v_head_dim"),
    "lse_b": ("num_tokens", "num_heads"),
    "pairs": ("num_pairs", "2"),
    "blocks": ("count",),
    "k_scale": ("num_blocks", "num_kv_heads", "block_size"),
    "v_scale": ("num_blocks", "num_kv_heads", "block_size"),
    "table": ("table_rows", "max_blocks"),
    "updates": ("num_updates", "3"),
}
_INT32 = ("seq_lens", "block_table", "block_table_rows", "query_start_loc", "pairs", "blocks", "table", "updates")
_FLOAT32 = ("lse", "lse_a", "lse_b", "alibi_slopes", "sinks", "k_scale", "v_scale")
_FIXED_DTYPES = {
    **dict.fromkeys(_INT32, torch.int32),
    **dict.fromkeys(_FLOAT32, torch.float32),
    "slot_mapping": torch.int64,
}
_CODES = (torch.uint8, torch.float8_e4m3fn)  # of a quantised cache
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _require(holds: Any, name: str, expected: str, got: Any) -> None:
    """`holds` is a bool, or a symbolic one, which becomes a guard or a check at run time."""
    message = f"{name}: expected {expected}, got {got}"
    if isinstance(holds, bool):
        if not holds:
            raise InvalidArgumentError(message, argument=name, expected=expected, got=got)
    else:
        torch._check_value(holds, lambda: message)  # noqa: SLF001  # public in spite of its name


def _check_call(tensors: dict[str, Any]) -> None:
    """What the kernels would refuse about ranks, sizes and dtypes."""
    kind: torch.dtype | None = None
    sizes: dict[str, Any] = {"1": 1, "2": 2, "3": 3}
    quantised = all(name in tensors and tensors[name].dtype in _CODES for name in ("k_cache", "v_cache"))
    for name, tensor in tensors.items():
        axes = _AXES[name]
        if name == "block_table" and "block_table_rows" in tensors:
            axes = ("table_rows", "max_blocks")
        if name in ("k_scale", "v_scale") and getattr(tensor, "ndim", 3) == 1:
            axes = ("1",) if tensor.shape[0] == 1 else ("num_kv_heads",)
        for axis, size in zip(axes, require_axes(name, tensor, *axes), strict=True):
            known = sizes.setdefault(axis, size)
            _require(known == size, name, f"{axis} = {known}", size)
        if name in _FIXED_DTYPES:
            _require(tensor.dtype == _FIXED_DTYPES[name], name, f"dtype {_FIXED_DTYPES[name]}", tensor.dtype)
        elif quantised and name in ("k_cache", "v_cache"):
            continue
        elif kind is None:
            _require(tensor.dtype in _FLOATS, name, "dtype float32, float16 or bfloat16", tensor.dtype)
            kind = tensor.dtype
        else:
            _require(tensor.dtype == kind, name, f"dtype {kind}", tensor.dtype)
    if "query_start_loc" in tensors:
        starts = sizes["num_seqs + 1"]
        _require(starts == sizes["num_seqs"] + 1, "query_start_loc", "one entry more than seq_lens has", starts)
    if "query" in tensors:
        heads, kv_heads = sizes["num_heads"], sizes["num_kv_heads"]
        _require(heads % kv_heads == 0, "query", f"num_heads that is a multiple of num_kv_heads = {kv_heads}", heads)


def _fake(names: list[str]) -> Callable[..., None]:
    """Nothing is returned and no shape changes, so all there is to do without data is to refuse what cannot work."""

    def check(*args: Any, **options: Any) -> None:
        given = {**dict(zip(names, args, strict=False)), **options}
        for cache in given.get("caches", ()):
            _require(cache.ndim >= 2, "kv", "[num_blocks, ...]", f"{cache.ndim} dimension(s)")
        # A plan and a staging buffer are bytes, whatever their shape.
        known = _AXES.keys() if given.keys() & {"query", "o_a"} else _AXES.keys() - {"out"}
        _check_call({name: tensor for name, tensor in given.items() if name in known and tensor is not None})

    return check


def _register() -> None:
    for name, schema in OPERATORS.items():
        _register_one(name, schema, getattr(_kernels, name))
    for name, (schema, function) in COMPOSED.items():
        _register_one(name, schema, function)


def _register_one(name: str, schema: str, function: Callable[..., None]) -> None:
    _LIBRARY.define(f"{name}{schema} -> ()")
    # For every device: a tensor that the kernels cannot take is refused by them, in words, not by the dispatcher.
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    names = list(inspect.signature(function).parameters)
    torch.library.register_fake(f"pagedcore::{name}", _fake(names), lib=_LIBRARY)


_register()
_kernels.set_torch_types(torch.Tensor, torch.nn.Parameter)
# Whoever traces without dynamo does so with tensors of a subclass, which the ops look for anyway.
ops.is_compiling = is_dynamo_compiling

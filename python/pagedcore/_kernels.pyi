# Private: `pagedcore.ops` is the public face of these functions and documents their arguments.

from collections.abc import Sequence
from typing import Any

def paged_attention(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    query_start_loc: Any,
    out: Any,
    lse: Any | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any | None = None,
    sinks: Any | None = None,
    k_scale: Any | None = None,
    v_scale: Any | None = None,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    block_table_rows: Any | None = None,
    split_size: int | None = None,
    plan: Any | None = None,
    workspace: Any | None = None,
    num_threads: int | None = None,
    shared_tokens: int | None = None,
) -> None: ...
def try_paged_attention(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    query_start_loc: Any,
    out: Any,
    lse: Any | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float,
    alibi_slopes: Any | None,
    sinks: Any | None,
    k_scale: Any | None,
    v_scale: Any | None,
    max_query_len: int | None,
    max_seq_len: int | None,
    block_table_rows: Any | None,
    split_size: int | None,
    plan: Any | None,
    workspace: Any | None,
    num_threads: int | None,
    shared_tokens: int | None,
    /,
) -> bool: ...
def plan_attention(
    seq_lens: Any,
    query_start_loc: Any,
    out: Any,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    num_tokens: int,
    max_query_len: int,
    dtype: str,
    window: int | None = None,
    causal: bool = True,
    split_size: int | None = None,
    shared_tokens: int | None = None,
) -> None: ...
def attention_memory(
    device: int,
    num_tokens: int,
    num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    max_query_len: int,
    dtype: str,
    split_size: int | None,
) -> tuple[int, int]: ...
def explain_attention(
    query: Any, k_cache: Any, v_cache: Any, num_seqs: int, max_query_len: int | None, split_size: int | None
) -> tuple[str, str | None]: ...
def merge_states(
    o_a: Any,
    lse_a: Any,
    o_b: Any,
    lse_b: Any,
    out: Any,
    lse: Any,
    sinks: Any | None = None,
    *,
    num_threads: int | None = None,
) -> None: ...
def reshape_and_cache(
    key: Any,
    value: Any,
    k_cache: Any,
    v_cache: Any,
    slot_mapping: Any,
    *,
    k_scale: Any | None = None,
    v_scale: Any | None = None,
    num_threads: int | None = None,
) -> None: ...
def try_reshape_and_cache(
    key: Any,
    value: Any,
    k_cache: Any,
    v_cache: Any,
    slot_mapping: Any,
    k_scale: Any | None,
    v_scale: Any | None,
    num_threads: int | None,
    /,
) -> bool: ...
def copy_blocks(caches: Sequence[Any], pairs: Any, *, num_threads: int | None = None) -> None: ...
def zero_blocks(caches: Sequence[Any], blocks: Any, *, num_threads: int | None = None) -> None: ...
def gather_blocks(caches: Sequence[Any], blocks: Any, out: Any, *, num_threads: int | None = None) -> None: ...
def scatter_blocks(caches: Sequence[Any], blocks: Any, src: Any, *, num_threads: int | None = None) -> None: ...
def update_block_table(table: Any, updates: Any) -> None: ...
def read_range(tensor: Any, *, num_threads: int | None = None) -> None: ...
def read_blocks(tensor: Any, blocks: Any, *, num_threads: int | None = None) -> None: ...
def set_torch_types(tensor: type, parameter: type) -> None: ...
def any_torch_subclass(*objects: Any) -> bool: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def select_cpu_isa(name: str) -> None: ...
def thread_runtime() -> str: ...
def max_threads() -> int: ...
def gpu_facts() -> dict[str, Any]: ...
def warm_up(device: int) -> None: ...
def take_device_faults(device: int) -> list[int]: ...

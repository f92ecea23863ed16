"""A GPU for the tests of `pagedcore.ops`, which is the host shim where none is meant, and calls of ops on it."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import gpus
import torch
from cuda_gpu import CudaGpu, settled_errors
from gpus import ShimGpu, TorchGpu
from pagedcore import ops, tensors
from reference import Batch, make_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest


def make_gpu(shim: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShimGpu]:
    """The shim, or the GPU that is in its place, which has the same methods."""
    if isinstance(shim, CudaGpu):
        settled_errors(0)
        monkeypatch.setattr(ops, "device_errors", partial(settled_errors, device_errors=ops.device_errors))
        yield TorchGpu()  # type: ignore[misc]
        return
    gpu = ShimGpu(shim, way)
    monkeypatch.setattr(ops, "_kernels", gpu.kernels)
    monkeypatch.setattr(tensors, "array_module", lambda like: SimpleNamespace(empty=empty_like_cupy(gpu)))
    # Where no API tells the current stream, these are asked.
    torch_cuda, cupy_cuda = ModuleType("torch.cuda"), ModuleType("cupy.cuda")
    torch_cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=0x7000 + device)  # type: ignore[attr-defined]
    cupy_cuda.get_current_stream = lambda: SimpleNamespace(ptr=0x8000)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.cuda", torch_cuda)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy_cuda)
    ops.device_errors(0)
    ops.device_errors(1)
    shim.set_stream(0)
    shim.set_seed(0)
    yield gpu
    gpu.close()


def empty_like_cupy(gpu: ShimGpu) -> Any:
    return lambda shape, dtype: gpu.empty(shape, getattr(torch, dtype), gpus.CupyDevice.current)


def arguments(gpu: ShimGpu, batch: Batch, device: int = 0) -> list[Any]:
    """The positional arguments of attention, on the GPU."""
    sources = (batch.query, batch.k_cache, batch.v_cache, batch.block_table, batch.seq_lens, batch.query_start_loc)
    return [gpu.upload(source, device) for source in sources]


def small_batch(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Batch:
    return make_batch([5, 40, 0, 17], [1, 3, 1, 1], dtype=dtype, **options)


def step(batch: Batch) -> dict[str, Any]:
    """What a plan is made from."""
    num_tokens, num_heads, head_dim = batch.query.shape
    return {
        "num_heads": num_heads,
        "num_kv_heads": batch.k_cache.shape[1],
        "head_dim": head_dim,
        "max_query_len": 3,
        "num_tokens": num_tokens,
        "dtype": batch.query.dtype,
    }


def calls(gpu: ShimGpu, device: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every op with tensors for all of its arguments, by name."""
    batch = small_batch()
    names = ("query", "k_cache", "v_cache", "block_table", "seq_lens", "query_start_loc")
    attention: dict[str, Any] = dict(zip(names, arguments(gpu, batch, device), strict=True))
    rows = torch.arange(4, dtype=torch.int32)
    attention |= {
        "out": gpu.empty((6, 4, 64), torch.bfloat16, device),
        "lse": gpu.empty((6, 4), torch.float32, device),
        "block_table_rows": gpu.upload(rows, device),
        "alibi_slopes": gpu.upload(torch.zeros(4), device),
        "sinks": gpu.upload(torch.zeros(4), device),
        "workspace": gpu.empty((1 << 20,), torch.uint8, device),
        "plan": gpu.empty((1 << 12,), torch.uint8, device),
    }
    cache = torch.randn(5, 2, 4, 8)
    write = {
        "key": gpu.upload(torch.randn(3, 2, 8), device),
        "value": gpu.upload(torch.randn(3, 2, 8), device),
        "k_cache": gpu.upload(cache, device),
        "v_cache": gpu.upload(cache, device),
        "slot_mapping": gpu.upload(torch.tensor([4, -1, 9]), device),
    }
    kv = gpu.upload(cache, device)
    ids = gpu.upload(torch.tensor([1, 3], dtype=torch.int32), device)
    staged = gpu.empty((2, cache[0].nbytes), torch.uint8, device)
    return {
        "paged_attention": (ops.paged_attention, attention),
        "plan_attention": (
            ops.plan_attention,
            {name: attention[name] for name in ("seq_lens", "query_start_loc")}
            | {"out": gpu.empty((1 << 12,), torch.uint8, device)}
            | step(batch),
        ),
        "reshape_and_cache": (ops.reshape_and_cache, write),
        "merge_states": (
            ops.merge_states,
            {name: gpu.upload(torch.randn(3, 2, 8), device) for name in ("o_a", "o_b")}
            | {name: gpu.upload(torch.randn(3, 2), device) for name in ("lse_a", "lse_b")}
            | {"sinks": gpu.upload(torch.zeros(2), device)},
        ),
        "copy_blocks": (
            ops.copy_blocks,
            {"kv": kv, "pairs": gpu.upload(torch.tensor([[1, 2]], dtype=torch.int32), device)},
        ),
        "zero_blocks": (ops.zero_blocks, {"kv": kv, "blocks": ids}),
        "gather_blocks": (ops.gather_blocks, {"kv": kv, "blocks": ids, "out": staged}),
        "scatter_blocks": (ops.scatter_blocks, {"kv": kv, "blocks": ids, "src": staged}),
        "update_block_table": (
            ops.update_block_table,
            {
                "table": gpu.upload(torch.zeros(4, 3, dtype=torch.int32), device),
                "updates": gpu.upload(torch.tensor([[1, 2, 7]], dtype=torch.int32), device),
            },
        ),
    }


OPS = (
    "paged_attention",
    "plan_attention",
    "reshape_and_cache",
    "merge_states",
    "copy_blocks",
    "zero_blocks",
    "gather_blocks",
    "scatter_blocks",
    "update_block_table",
)

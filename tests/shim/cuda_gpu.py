"""Attention by `pagedcore.ops` on a GPU's torch tensors, in the place of the host shim: the same tests run on both.

A test that needs what only the shim has (its memory, its recordings, its faults) has the marker `shim_only`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import Batch


class CudaGpu:
    """The current CUDA device. Its order is its own: a seed and a number of multiprocessors mean nothing to it."""

    __file__ = "cuda"  # what the sweep loads in the place of the shim's module

    def attend(
        self,
        batch: Batch,
        kernel: str,
        *,
        launches: int = 1,
        block_stride: int | None = None,
        max_query_len: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) on the CPU; "generic" by a query that no tiled kernel takes, as it does not start on 16 bytes."""
        from pagedcore import ops  # the shim's own runs need no package

        query, k_cache, v_cache, *index = map(_to_gpu, batch.args)
        if kernel == "generic":
            query = _off_by_one(query)
        if block_stride is not None:
            k_cache, v_cache = _apart(k_cache, block_stride), _apart(v_cache, block_stride)
        options = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        plan = None
        num_tokens, num_heads, head_dim = query.shape
        longest = max_query_len or max([1, *batch.query_start_loc.diff().tolist()])
        if launches > 1:
            plan = ops.plan_attention(
                index[1],
                index[2],
                num_heads=num_heads,
                num_kv_heads=k_cache.shape[1],
                head_dim=head_dim,
                v_head_dim=v_cache.shape[3],
                max_query_len=longest,
                num_tokens=num_tokens,
                dtype=query.dtype,
                **{name: options[name] for name in ("causal", "window", "split_size") if name in options},
            )
        for _ in range(launches):
            out = query.new_full((num_tokens, num_heads, v_cache.shape[3]), float("nan"))
            lse = torch.full((num_tokens, num_heads), float("nan"), device="cuda")
            ops.paged_attention(
                query, k_cache, v_cache, *index, out=out, lse=lse, plan=plan, max_query_len=longest, **options
            )
        torch.cuda.synchronize()
        ops.device_errors()  # what tests of bad indices left there
        return out.cpu(), lse.cpu()


def _to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole storage, so that its strides stay true."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _off_by_one(tensor: torch.Tensor) -> torch.Tensor:
    """The same a single element further on in memory."""
    room = tensor.new_empty(tensor.numel() + 1)
    moved = room[1:].view(tensor.shape)
    moved.copy_(tensor)
    return moved


def _apart(cache: torch.Tensor, block_stride: int) -> torch.Tensor:
    """The cache with its blocks so many elements apart."""
    size = (len(cache) - 1) * block_stride + cache[0].numel()
    if 2.2 * size * cache.element_size() > torch.cuda.mem_get_info()[0]:
        pytest.skip(f"two caches of {size * cache.element_size() >> 30} GiB do not fit")
    dense = cache.contiguous()
    apart = torch.empty(size, dtype=cache.dtype, device="cuda").as_strided(
        cache.shape, (block_stride, *dense.stride()[1:])
    )
    return apart.copy_(dense)

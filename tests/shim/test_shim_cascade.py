"""Cascade attention on a GPU, which here is the host shim: two passes, of a GPU's own work plans, and their merge.

What the tensor library does between them (`cascade.fill` and its like) is done on the host.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pagedcore import cascade, ops
from reference import SHARED, Batch, check, features, sharing
from test_shim_binding import arguments, make_gpu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpus import ShimGpu


@pytest.fixture
def gpu(plain_shim: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShimGpu]:
    for device in make_gpu(plain_shim, "exchange api", monkeypatch):
        monkeypatch.setattr(cascade, "carve", partial(carve, device))
        monkeypatch.setattr(cascade, "_address_of", lambda memory: memory.pointer)
        for name in ("fill", "subtract", "hide"):
            monkeypatch.setattr(cascade, name, on_host(device, getattr(cascade, name)))
        cascade._places.cache_clear()  # what it holds of a device 0 is another's
        yield device
        cascade._places.cache_clear()


def carve(gpu: ShimGpu, memory: Any, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """As that of torch: the tensor begins `offset` bytes into the memory."""
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert offset + torch.Size(shape).numel() * kind.itemsize <= memory.shape[0]
    return gpu.tensor_class(memory.pointer + offset, torch.empty(shape, dtype=kind), 0)


def on_host(gpu: ShimGpu, function: Any) -> Any:
    """The function on copies in host memory, which are written back."""

    def call(*args: Any) -> None:
        copies = [gpu.download(a) if hasattr(a, "like") else a for a in args]
        function(*copies)
        for tensor, copy in zip(args, copies, strict=True):
            if hasattr(tensor, "like"):
                gpu.shim.copy_to_device(tensor.pointer, copy.data_ptr(), copy.nbytes)

    return call


def attend(gpu: ShimGpu, batch: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = {name: gpu.upload(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out, lse = ops.cascade_attention(
        *arguments(gpu, batch), num_shared_blocks=SHARED, return_lse=True, max_query_len=3, **options
    )
    assert ops.device_errors(0) == []
    return gpu.download(out), gpu.download(lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_padding_comes_last(gpu: ShimGpu, dtype: torch.dtype) -> None:
    """Tiled and plain kernels, more shared rows than a decode tile has, and rows of a graph that are not used."""
    batch = sharing([1, 40, 17, 0, 0], [1, 3, 1, 1, 2], dtype=dtype, heads=(8, 2))
    sinks = features("sinks")
    check(batch, *attend(gpu, batch, **sinks), row_factor=5, whole_references=True, **sinks)


def test_a_table_that_lives_on_the_device(gpu: ShimGpu) -> None:
    batch = sharing([5, 33, 0], [1, 1, 1], dtype=torch.bfloat16)
    rows = torch.tensor([3, 1, 0], dtype=torch.int32)
    table = torch.zeros(4, batch.block_table.shape[1], dtype=torch.int32)
    table[rows[:2].long()] = batch.block_table[:2].clamp(min=0)
    of_rows = Batch(*batch.args[:3], table, *batch.args[4:])
    out, lse = attend(gpu, of_rows, block_table_rows=rows)
    check(batch, out, lse, row_factor=5, whole_references=True)


def test_memory_of_ones_own(gpu: ShimGpu) -> None:
    """A workspace for larger calls; with it nothing is allocated."""
    batch = sharing([5, 33], [1, 1], dtype=torch.float16)
    size = ops.cascade_workspace_size(9, 7, 4, 2, 64, dtype="float16", device=0)
    own = [gpu.empty((2, 4, 64), torch.float16), gpu.empty((2, 4), torch.float32), gpu.empty((size,), torch.uint8)]
    args = arguments(gpu, batch)
    before = len(gpu.addresses)
    ops.cascade_attention(*args, num_shared_blocks=SHARED, out=own[0], lse=own[1], workspace=own[2])
    assert len(gpu.addresses) == before
    check(batch, gpu.download(own[0]), gpu.download(own[1]), row_factor=5, whole_references=True)

"""Tensors on the shim's device, and attention over them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import torch
from cuda_gpu import CudaGpu
from reference import check

if TYPE_CHECKING:
    from types import TracebackType

    from reference import Batch

# What kernels flag, in the order of faults.h.
FAULTS = ("block", "length", "slot", "update", "plan", "sequence")
ELEMENT = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Device:
    """Copies of tensors in the shim's memory, freed at the end of the block."""

    def __init__(self, shim: Any) -> None:
        self.shim = shim
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of NaN."""
        address: int = self.shim.allocate(size)
        self._stack.callback(self.shim.release, address)
        return address

    def upload(self, tensor: torch.Tensor) -> int:
        """Address of the tensor's first element in a copy of its whole storage, so that its strides stay true."""
        storage = tensor.untyped_storage()
        address = self.allocate(storage.nbytes())
        self.shim.copy_to_device(address, storage.data_ptr(), storage.nbytes())
        return address + tensor.storage_offset() * tensor.element_size()

    def upload_blocks(self, cache: torch.Tensor, block_stride: int) -> int:
        """Address of `cache` with its blocks `block_stride` elements apart and nothing between them."""
        size = cache.element_size()
        address: int = self.shim.reserve(((len(cache) - 1) * block_stride + cache[0].numel()) * size)
        self._stack.callback(self.shim.release, address)
        for index, block in enumerate(cache.contiguous()):
            self.shim.copy_to_device(address + index * block_stride * size, block.data_ptr(), block.numel() * size)
        return address

    def download_view(self, address: int, like: torch.Tensor) -> torch.Tensor:
        """What `upload(like)`, which gave the address, holds by now: shape and strides of `like`."""
        storage = like.untyped_storage()
        copy = torch.empty(storage.nbytes() // like.element_size(), dtype=like.dtype)
        start = address - like.storage_offset() * like.element_size()
        self.shim.copy_to_host(copy.data_ptr(), start, storage.nbytes())
        return copy.as_strided(like.shape, like.stride(), like.storage_offset())

    def download(self, address: int, like: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor of the shape and dtype of `like`."""
        result = torch.empty(like.shape, dtype=like.dtype)
        self.shim.copy_to_host(result.data_ptr(), address, result.numel() * result.element_size())
        return result


def scale_strides(scale: torch.Tensor) -> tuple[int, ...]:
    """Over (block, head, token), 0 where one scale serves several."""
    if scale.ndim == 3:
        return tuple(scale.stride())
    return (0, 0 if len(scale) == 1 else 1, 0)


class Attention:
    """One call's arguments on the device, and its outputs.

    `block_stride` puts the blocks of both caches that many elements apart. `max_query_len` is the longest query unless
    given: what it says beside num_tokens and num_seqs chooses the kernel.
    """

    def __init__(
        self,
        device: Device,
        batch: Batch,
        *,
        window: int | None = None,
        causal: bool = True,
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        split_size: int | None = None,
        block_table_rows: torch.Tensor | None = None,
        block_stride: int | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        max_query_len: int | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        self.device = device
        num_tokens, num_heads, head_dim = batch.query.shape
        num_blocks, num_kv_heads, block_size, v_head_dim = batch.v_cache.shape
        self.out_like = torch.empty(num_tokens, num_heads, v_head_dim, dtype=batch.query.dtype)
        self.lse_like = torch.empty(num_tokens, num_heads)

        def pages(cache: torch.Tensor) -> tuple[int, ...]:
            if block_stride is None:
                return (device.upload(cache), *cache.stride()[:3])
            return (device.upload_blocks(cache, block_stride), block_stride, *cache.contiguous().stride()[1:3])

        self.fields: dict[str, Any] = {
            "query": device.upload(batch.query),
            "k": pages(batch.k_cache),
            "v": pages(batch.v_cache),
            "block_table": device.upload(batch.block_table),
            "seq_lens": device.upload(batch.seq_lens),
            "query_start_loc": device.upload(batch.query_start_loc),
            "faults": device.upload(torch.zeros(len(FAULTS), dtype=torch.int32)),
            **self._outputs(),
            "query_token_stride": batch.query.stride(0),
            "query_head_stride": batch.query.stride(1),
            "block_table_stride": batch.block_table.stride(0),
            "out_token_stride": num_heads * v_head_dim,
            "out_head_stride": v_head_dim,
            "lse_token_stride": num_heads,
            "lse_head_stride": 1,
            "num_tokens": num_tokens,
            "num_blocks": num_blocks,
            "max_blocks": batch.block_table.shape[1],
            "num_seqs": len(batch.seq_lens),
            "table_rows": len(batch.block_table),
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "block_size": block_size,
            "max_query_len": max([1, *batch.query_start_loc.diff().tolist()])
            if max_query_len is None
            else max_query_len,
            "window": window or 0,
            "scale": head_dim**-0.5,
            "causal": causal,
            "softcap": softcap,
            "split_size": -1 if split_size is None else split_size,
            "dtype": ELEMENT[batch.query.dtype],
        }
        if batch.k_cache.dtype != batch.query.dtype:
            self.fields["kv_dtype"] = "float8_e4m3fn"
        if max_seq_len is not None:
            self.fields["max_seq_len"] = max_seq_len
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is not None:
                self.fields[name] = (device.upload(scale), *scale_strides(scale))
        optional = {"block_table_rows": block_table_rows, "alibi_slopes": alibi_slopes, "sinks": sinks}
        self.fields |= {name: device.upload(tensor) for name, tensor in optional.items() if tensor is not None}

    def launch(self, kernel: str, grid: int = 6, launches: int = 1) -> None:
        """By "generic", or "tiled" or "any" on a device of `grid` multiprocessors, by layers that share a plan."""
        shim = self.device.shim
        if kernel == "generic":
            shim.attention_generic(self.fields)
            return
        assert kernel == "any" or shim.why_not_tiled(self.fields) is None
        shim.set_multiprocessors(grid)
        plan, workspace = (self.device.allocate(size(self.fields)) for size in (shim.plan_bytes, shim.workspace_bytes))
        for layer in range(launches):
            self.fields |= self._outputs()  # of its own, so that a launch that writes nothing is seen
            shim.paged_attention(self.fields, plan, workspace, planned=layer > 0)

    def faults(self) -> set[str]:
        """What the kernels flagged."""
        words = self.device.download(self.fields["faults"], torch.empty(len(FAULTS), dtype=torch.int32))
        return {name for name, word in zip(FAULTS, words.tolist(), strict=True) if word}

    def _outputs(self) -> dict[str, int]:
        return {
            name: self.device.allocate(like.nbytes) for name, like in (("out", self.out_like), ("lse", self.lse_like))
        }

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse)."""
        download = self.device.download
        return download(self.fields["out"], self.out_like), download(self.fields["lse"], self.lse_like)


def attend(
    shim: Any, batch: Batch, kernel: str, *, grid: int = 6, launches: int = 1, seed: int = 0, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `batch` by one of the kernels, "generic" or "tiled", on the shim or a GPU.

    Options as `Attention` has them.
    """
    if isinstance(shim, CudaGpu):
        return shim.attend(batch, kernel, launches=launches, **options)
    shim.set_seed(seed)
    with Device(shim) as device:
        attention = Attention(device, batch, **options)
        attention.launch(kernel, grid, launches)
        return attention.result()


def check_tiled(batch: Batch, out: torch.Tensor, lse: torch.Tensor, **options: Any) -> None:
    """As `reference.check`, for kernels whose softmax has whole references."""
    check(batch, out, lse, whole_references=True, **options)

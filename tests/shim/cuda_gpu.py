"""A GPU by torch's tensors and `pagedcore.ops`, in the place of the host shim's module: the same tests run on both.

A test that needs what only the shim has (its faults, its order of threads, sizes of plans) has the marker `shim_only`.
"""

from __future__ import annotations

import ctypes
import fcntl
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from reference import Batch

# Files whose tests are about the shim and not about kernels.
OF_THE_SHIM = ("test_shim", "test_shim_address")


class CudaGpu:
    """The current CUDA device. Its order is its own: a seed and a number of multiprocessors mean nothing to it.

    Memory is told by addresses, as the shim's is; `fields` and the like are what the shim's functions take.
    """

    __file__ = "cuda"  # what the sweep loads in the place of the shim's module

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}  # bytes, by their address

    # ---------------------------------------------------------------------------------------------------------- memory

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of NaN."""
        memory = torch.full((-(-max(size, 1) // 16) * 16,), 0xFF, dtype=torch.uint8, device="cuda")
        self._memory[memory.data_ptr()] = memory
        return memory.data_ptr()

    def release(self, address: int) -> None:
        del self._memory[address]

    def copy_to_device(self, address: int, source: int, size: int) -> None:
        self._tensor(address, (size,), (1,), torch.uint8).copy_(_host_bytes(source, size))

    def copy_to_host(self, target: int, address: int, size: int) -> None:
        _host_bytes(target, size).copy_(self._tensor(address, (size,), (1,), torch.uint8))

    def _tensor(self, address: int, shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
        """What lies at an address; strides in elements."""
        for start, memory in self._memory.items():
            if start <= address < start + len(memory) or address == start:
                return memory.view(dtype).as_strided(shape, strides, (address - start) // dtype.itemsize)
        raise KeyError(f"no memory at {address:#x}")

    def _dense(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._tensor(address, shape, torch.empty(shape, device="meta").stride(), dtype)

    # ------------------------------------------------------------------------------------------------------- cache ops

    def reshape_and_cache(self, fields: dict[str, Any]) -> None:
        from pagedcore import ops

        tokens, heads, block_size = (fields[name] for name in ("num_tokens", "num_kv_heads", "block_size"))
        dtype = getattr(torch, fields.get("dtype", {4: "float32", 2: "bfloat16"}[fields["element_size"]]))
        sides, scales = [], {}
        for name, page in (("key", "k"), ("value", "v")):
            dim = fields[f"{name}_bytes"] // dtype.itemsize
            strides = (fields[f"{name}_token_stride"], fields[f"{name}_head_stride"], 1)
            rows = self._tensor(fields[name], (tokens, heads, dim), strides, dtype)
            address, *strides = fields[page]
            kept = torch.uint8 if "kv_dtype" in fields else dtype
            cache = self._tensor(address, (fields["num_blocks"], heads, block_size, dim), (*strides, 1), kept)
            sides.append((rows, cache))
            if f"{page}_scale" in fields:
                address, *strides = fields[f"{page}_scale"]
                if fields[f"makes_{page}_scale"]:
                    scale = self._tensor(address, (fields["num_blocks"], heads, block_size), strides, torch.float32)
                else:
                    scale = self._dense(address, (heads if strides[1] else 1,), torch.float32)
                scales[f"{page}_scale"] = scale
        (key, k_cache), (value, v_cache) = sides
        slots = self._dense(fields["slot_mapping"], (tokens,), torch.int64)
        ops.reshape_and_cache(key, value, k_cache, v_cache, slots, **scales)
        settled_errors()  # of slots past the cache

    def move_blocks(self, op: str, region: tuple[Any, ...], ids: int, count: int, staging: int = 0) -> None:
        """`region`: address, blocks, and in bytes stride, (sizes and strides of two axes), contiguous size."""
        from pagedcore import ops

        address, blocks, stride, sizes, strides, width = region
        kv = self._tensor(address, (blocks, *sizes, width), (stride, *strides, 1), torch.uint8)
        index = self._dense(ids, (count, 2) if op == "copy" else (count,), torch.int32)
        if staging:
            # The shim's function stages a block's axes in the order of `sizes`, the op in the order of memory.
            staged = self._dense(staging, (count, *sizes, width), torch.uint8)
            in_memory = staged if strides[0] >= strides[1] else staged.transpose(1, 2)
            rows = in_memory.contiguous().clone()
            getattr(ops, f"{op}_blocks")(kv, index, rows)
            if op == "gather":
                in_memory.copy_(rows)
        else:
            getattr(ops, f"{op}_blocks")(kv, index)
        settled_errors()  # of ids out of range

    def update_block_table(
        self, address: int, stride: int, rows: int, columns: int, updates: int, num_updates: int
    ) -> None:
        from pagedcore import ops

        table = self._tensor(address, (rows, columns), (stride, 1), torch.int32)
        ops.update_block_table(table, self._dense(updates, (num_updates, 3), torch.int32))
        settled_errors()  # of changes outside of it

    def merge_states(self, fields: dict[str, Any]) -> None:
        from pagedcore import ops

        tokens, heads, dim = (fields[name] for name in ("num_tokens", "num_heads", "v_head_dim"))
        states = []
        for name in ("a", "b", "total"):
            address, *strides, lse_address, lse_token_stride, lse_head_stride = fields[name]
            states.append(self._tensor(address, (tokens, heads, dim), (*strides, 1), getattr(torch, fields["dtype"])))
            lse_strides = (lse_token_stride, lse_head_stride)
            states.append(self._tensor(lse_address, (tokens, heads), lse_strides, torch.float32))
        sinks = self._dense(fields["sinks"], (heads,), torch.float32) if "sinks" in fields else None
        ops.merge_states(*states[:4], sinks, out=states[4], lse=states[5])

    # ------------------------------------------------------------------------------------------------------- attention

    def attend(
        self, batch: Batch, kernel: str, *, block_stride: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) on the CPU; "generic" by a query that no tiled kernel takes, as it does not start on 16 bytes.

        `block_stride`: so many elements, or a few more, lie between the first block and the last one that is used. All
        blocks so far apart, as under the shim, which backs no memory between them, would be more than a GPU has.
        """
        query, k_cache, v_cache, *index = map(_to_gpu, batch.args)
        if kernel == "generic":
            query = _off_by_one(query)
        options = {
            name: _to_gpu(value) if isinstance(value, torch.Tensor) else value for name, value in options.items()
        }
        if block_stride is None:
            return _attend(batch, [query, k_cache, v_cache, *index], **options)
        with _far_memory():
            used = _last_used(batch) + 1
            far = (_apart(cache[:used], block_stride) for cache in (k_cache, v_cache))
            for name in ("k_scale", "v_scale"):
                if (scale := options.get(name)) is not None and scale.ndim == 3:  # of each block too
                    options[name] = scale[:used]
            return _attend(batch, [query, *far, *index], **options)


def _attend(
    batch: Batch, args: list[torch.Tensor], *, launches: int = 1, max_query_len: int | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    from pagedcore import ops  # the shim's own runs need no package

    query, k_cache, v_cache, _, seq_lens, query_start_loc = args
    num_tokens, num_heads, head_dim = query.shape
    longest = max_query_len or max([1, *batch.query_start_loc.diff().tolist()])
    plan = None
    if launches > 1:
        plan = ops.plan_attention(
            seq_lens,
            query_start_loc,
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
        ops.paged_attention(*args, out=out, lse=lse, plan=plan, max_query_len=longest, **options)
    settled_errors()  # what tests of bad indices left there
    return out.cpu(), lse.cpu()


def settled_errors(device: Any = "cuda", *, device_errors: Callable[..., list[str]] | None = None) -> list[str]:
    """`ops.device_errors`, or what stands in its place, of all that was launched: by itself it does not wait."""
    from pagedcore import ops

    if device != "cpu":
        torch.cuda.synchronize(device)
    return (device_errors or ops.device_errors)(device)


def _host_bytes(address: int, size: int) -> torch.Tensor:
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


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


@contextmanager
def _far_memory() -> Iterator[None]:
    """For one process at a time: a cache takes 4 GiB in 16 bits. torch does not keep it for later ones."""
    with (Path(tempfile.gettempdir()) / "pagedcore-far-blocks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            torch.cuda.empty_cache()


def _last_used(batch: Batch) -> int:
    """The largest id in the table of a block that there is."""
    ids = batch.block_table[(batch.block_table >= 0) & (batch.block_table < len(batch.k_cache))]
    return int(ids.max()) if ids.numel() else 0


def _apart(cache: torch.Tensor, distance: int) -> torch.Tensor:
    """The cache with its last block as many elements behind the first, or a few more; blocks start on 16 bytes."""
    dense = cache.contiguous()
    stride = max(-(-distance // max(len(cache) - 1, 1)), dense[0].numel())
    stride = -(-stride // 64) * 64
    size = (len(cache) - 1) * stride + dense[0].numel()
    needed, free = int(2.2 * size * cache.element_size()), torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(f"offsets past 2^31 elements need {needed >> 20} MiB of GPU memory, {free >> 20} are free")
    apart = torch.empty(size, dtype=cache.dtype, device="cuda")
    return apart.as_strided(cache.shape, (stride, *dense.stride()[1:])).copy_(dense)

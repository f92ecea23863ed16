"""What moves bytes of the cache on a GPU, run by the host shim, against the same in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import Device
from reference import empty_cache

SHAPE = (6, 3, 4)  # num_blocks, num_kv_heads, block_size
NAN = float("nan")


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["HND", "NHD", "strided", "heads first"])
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (24, 40), (7, 3)])
def test_reshape_and_cache(shim: Any, dtype: torch.dtype, order: str, dim: int, v_dim: int) -> None:
    num_blocks, num_kv_heads, block_size = SHAPE
    slots = torch.tensor([5, -1, 23, 0, num_blocks * block_size, 9, 2**40])  # padding, and past the cache: skipped
    written = [0, 2, 3, 5]
    sides = []
    with Device(shim) as device:
        fields: dict[str, Any] = {}
        for name, page, size in (("key", "k", dim), ("value", "v", v_dim)):
            rows = torch.randn(len(slots), num_kv_heads, size).to(dtype)
            cache = empty_cache(order, num_blocks, num_kv_heads, block_size, size, dtype, "cpu")
            address = device.upload(cache)
            fields[name] = device.upload(rows)
            fields[page] = (address, *cache.stride()[:3])
            fields[f"{name}_token_stride"], fields[f"{name}_head_stride"] = rows.stride()[:2]
            fields[f"{name}_bytes"] = size * rows.element_size()
            sides.append((rows, cache, address))
        fields.update(
            slot_mapping=device.upload(slots),
            num_tokens=len(slots),
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            element_size=dtype.itemsize,
            num_blocks=num_blocks,
        )
        shim.reshape_and_cache(fields)
        for rows, cache, address in sides:
            want = cache.clone()  # of the view alone
            for token in written:
                want[slots[token] // block_size, :, slots[token] % block_size] = rows[token]
            got = device.download_view(address, cache)
            assert same(got, want)


def region(cache: torch.Tensor, address: int) -> tuple[Any, ...]:
    """[num_blocks, a, b, contiguous] as the kernels take it."""
    size = cache.element_size()
    stride, *strides = (s * size for s in cache.stride()[:3])
    return (address, len(cache), stride, list(cache.shape[1:3]), strides, cache.shape[3] * size)


@pytest.mark.parametrize("order", ["HND", "NHD", "strided"])
@pytest.mark.parametrize("dim", [64, 6, 5])
def test_copy_and_zero(shim: Any, order: str, dim: int) -> None:
    cache = empty_cache(order, *SHAPE, dim, torch.bfloat16, "cpu")
    cache.copy_(torch.randn(cache.shape))
    pairs = torch.tensor([[1, 2], [1, 4], [3, 5], [-1, 0], [0, 6]], dtype=torch.int32)  # the last two are skipped
    blocks = torch.tensor([3, 99, -5], dtype=torch.int32)
    with Device(shim) as device:
        address = device.upload(cache)
        shim.move_blocks("copy", region(cache, address), device.upload(pairs), len(pairs))
        shim.move_blocks("zero", region(cache, address), device.upload(blocks), len(blocks))
        want = cache.clone()
        want[2], want[4], want[5], want[3] = cache[1], cache[1], cache[3], 0
        assert torch.equal(device.download_view(address, cache), want)


def test_copies_longer_than_a_chunk(plain_shim: Any) -> None:
    cache = torch.randn(4, 1, 1, 10_000)  # 40 kB a block
    with Device(plain_shim) as device:
        address = device.upload(cache)
        pairs = torch.tensor([[3, 0]], dtype=torch.int32)
        plain_shim.move_blocks("copy", region(cache, address), device.upload(pairs), 1)
        got = device.download_view(address, cache)
    assert torch.equal(got[0], cache[3])
    assert torch.equal(got[1:], cache[1:])


@pytest.mark.parametrize("order", ["HND", "NHD", "strided"])
def test_gather_and_scatter(shim: Any, order: str) -> None:
    cache = empty_cache(order, *SHAPE, 20, torch.float32, "cpu")
    cache.copy_(torch.randn(cache.shape))
    blocks = torch.tensor([4, 0, 2], dtype=torch.int32)
    back = torch.tensor([1, 3, 5], dtype=torch.int32)
    with Device(shim) as device:
        address = device.upload(cache)
        staged = torch.empty(3, *cache.shape[1:])
        staging = device.allocate(staged.nbytes)
        shim.move_blocks("gather", region(cache, address), device.upload(blocks), 3, staging)
        assert torch.equal(device.download(staging, staged), cache[blocks.long()])
        shim.move_blocks("scatter", region(cache, address), device.upload(back), 3, staging)
        want = cache.clone()
        want[back.long()] = cache[blocks.long()]
        assert torch.equal(device.download_view(address, cache), want)


def test_update_block_table(shim: Any) -> None:
    table = torch.arange(35, dtype=torch.int32).reshape(5, 7)  # the last column is not the table's
    updates = [[0, 0, 100], [4, 5, 101], [2, 3, 102], [5, 0, 1], [0, 6, 1], [-1, 2, 1], [1, -1, 1]]  # four outside
    with Device(shim) as device:
        address = device.upload(table)
        changes = device.upload(torch.tensor(updates, dtype=torch.int32))
        shim.update_block_table(address, table.stride(0), 5, 6, changes, len(updates))
        want = table.clone()
        want[0, 0], want[4, 5], want[2, 3] = 100, 101, 102
        assert torch.equal(device.download_view(address, table), want)

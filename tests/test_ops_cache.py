"""reshape_and_cache, copy_blocks and zero_blocks: what they write, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pagedcore import ops
from pagedcore.errors import BlockError, InvalidArgumentError
from pagedcore.layout import KVCacheLayout
from reference import empty_cache

ORDERS = ["HND", "NHD", "strided", "heads first"]


@pytest.fixture(params=["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_tokens_land_in_their_slots(device: str, dtype: torch.dtype, order: str, block_size: int) -> None:
    k_cache = empty_cache(order, 7, 3, block_size, 20, dtype, device)
    v_cache = empty_cache(order, 7, 3, block_size, 12, dtype, device)
    slots = torch.randperm(7 * block_size)[:5].to(device)
    slots[2] = -1
    key, value = torch.randn(5, 3, 20).to(dtype).to(device), torch.randn(5, 3, 12).to(dtype).to(device)
    ops.reshape_and_cache(key, value, k_cache, v_cache, slots)
    for source, cache in ((key, k_cache), (value, v_cache)):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert torch.equal(cache[slot // block_size, :, slot % block_size], source[token])
        assert cache.isnan().sum() == cache.numel() - 4 * source[0].numel()  # nothing else was touched


def test_strided_sources(device: str) -> None:
    """K and V as slices of one fused projection."""
    fused = torch.randn(6, 4, 3, 16, device=device)
    key, value = fused[:, 1], fused[:, 2]
    k_cache, v_cache = torch.zeros(2, 3, 4, 16, device=device), torch.zeros(2, 3, 4, 16, device=device)
    ops.reshape_and_cache(key, value, k_cache, v_cache, torch.arange(1, 7, device=device))
    flat = v_cache.transpose(1, 2).reshape(8, 3, 16)
    assert torch.equal(flat[1:7], value)
    assert (flat[[0, 7]] == 0).all()


def test_many_tokens_on_several_threads(device: str) -> None:
    key = torch.randn(3000, 4, 64, device=device)
    k_cache, v_cache = torch.zeros(200, 4, 16, 64), torch.zeros(200, 4, 16, 64)
    slots = torch.randperm(3200)[:3000]
    ops.reshape_and_cache(key, -key, k_cache, v_cache, slots, num_threads=4)
    assert torch.equal(k_cache.transpose(1, 2).reshape(3200, 4, 64)[slots], key)
    assert torch.equal(v_cache.transpose(1, 2).reshape(3200, 4, 64)[slots], -key)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_of_two_tokens_with_one_slot_the_later_is_kept(device: str, num_threads: int) -> None:
    """Whole, and whatever the number of threads: a row of one token, never parts of both."""
    key = torch.arange(4000.0)[:, None, None].expand(4000, 2, 128).contiguous()
    slots = torch.randint(0, 50, (4000,), generator=torch.Generator().manual_seed(0))
    last = {slot: token for token, slot in enumerate(slots.tolist())}
    for _ in range(10):
        k_cache, v_cache = torch.full((4, 2, 16, 128), -1.0), torch.full((4, 2, 16, 128), -1.0)
        ops.reshape_and_cache(key, -key, k_cache, v_cache, slots, num_threads=num_threads)
        for slot, token in last.items():
            assert (k_cache[slot // 16, :, slot % 16] == token).all()
            assert (v_cache[slot // 16, :, slot % 16] == -token).all()


def test_no_tokens(device: str) -> None:
    k_cache = torch.full((2, 3, 4, 16), 7.0)
    empty = torch.empty(0, 3, 16)
    ops.reshape_and_cache(empty, empty, k_cache, k_cache.clone(), torch.empty(0, dtype=torch.int64))
    assert (k_cache == 7).all()


def test_a_bad_slot_writes_nothing(device: str) -> None:
    k_cache, v_cache = torch.zeros(2, 3, 4, 16), torch.zeros(2, 3, 4, 16)
    key = torch.ones(3, 3, 16)
    for bad in (8, 2**40, 2**63 - 1):
        with pytest.raises(InvalidArgumentError, match=rf"slot_mapping\[2\]: expected a slot below 8 .*got {bad}"):
            ops.reshape_and_cache(key, key, k_cache, v_cache, torch.tensor([0, 1, bad]))
        assert (k_cache == 0).all()
        assert (v_cache == 0).all()


@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_copy_and_zero_whole_cache(order: str, library: str) -> None:
    kv = KVCacheLayout(6, 4, 3, 2, 24, "float32", order=order).allocate(library=library)
    data = torch.as_tensor(kv.data)
    data.random_()
    blocks = data if order == "block" else data.transpose(0, 1)
    before = blocks.clone()
    ops.copy_blocks(kv, np.array([[1, 2], [5, 0], [4, 4]], np.int32))
    assert torch.equal(blocks, before[[5, 1, 1, 3, 4, 5]])
    ops.zero_blocks(kv, np.array([3, 0], np.int32))
    assert torch.equal(blocks[[1, 2, 4, 5]], before[[1, 1, 4, 5]])
    assert (blocks[[0, 3]] == 0).all()


def test_copies_happen_in_order(device: str) -> None:
    cache = torch.arange(5.0)[:, None].expand(5, 100_000).contiguous()
    ops.copy_blocks([cache, cache.clone()], torch.tensor([[0, 1], [1, 2], [2, 3]], dtype=torch.int32), num_threads=4)
    assert cache[:, 0].tolist() == [0, 0, 0, 0, 4]
    assert torch.equal(cache, cache[:, :1].expand(5, 100_000))


@pytest.mark.parametrize(
    "shape",
    [(9, 100_000), (9, 99_999), (9, 70_001, 3), (9, 300, 5, 64), (9, 2, 60_000)],
    ids=["even", "odd", "odd rows", "many runs", "few runs"],
)
@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_large_blocks_are_copied_by_parts(shape: tuple[int, ...], num_threads: int) -> None:
    """A chain of copies through one cache, in contiguous blocks and in strided ones."""
    pairs = torch.tensor([[1, 2], [2, 3], [0, 1], [3, 8], [5, 5], [8, 0], [1, 7]], dtype=torch.int32)
    wide = torch.randn(*shape[:-1], shape[-1] + 1)
    for cache in (wide[..., 1:].contiguous(), wide[..., 1:]):
        want = cache.clone()
        for source, target in pairs.tolist():
            want[target] = want[source]
        outside = wide[..., 0].clone()
        ops.copy_blocks(cache, pairs, num_threads=num_threads)
        assert torch.equal(cache, want)
        assert torch.equal(wide[..., 0], outside)


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_foreign_tensors(device: str, order: str) -> None:
    """Any strides: only the elements of the view are copied or cleared, not what lies between them."""
    cache = empty_cache(order, 5, 3, 4, 20, torch.float32, device)
    cache.copy_(torch.randn(cache.shape))
    want = cache.clone()
    want[3] = want[1]
    want[2] = 0
    base = cache._base if cache._base is not None else cache
    others = int(base.isnan().sum())
    ops.copy_blocks(cache, torch.tensor([[1, 3]], dtype=torch.int32))
    ops.zero_blocks([cache], torch.tensor([2], dtype=torch.int32))
    assert torch.equal(cache, want)
    assert int(base.isnan().sum()) == others


def test_several_caches_of_different_shape(device: str) -> None:
    a, b = torch.randn(4, 10), torch.randn(4, 2, 3).to(torch.bfloat16)
    ops.copy_blocks([a, b], torch.tensor([[0, 3]], dtype=torch.int32))
    assert torch.equal(a[3], a[0])
    assert torch.equal(b[3], b[0])
    ops.copy_blocks([a, b], torch.empty(0, 2, dtype=torch.int32))


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, -(2**31)])
def test_bad_block_ids(device: str, bad: int) -> None:
    a = torch.randn(4, 10)
    before = a.clone()
    with pytest.raises(BlockError, match=rf"pairs: expected ids in \[0, 4\), got block {bad} at index 1") as caught:
        ops.copy_blocks(a, torch.tensor([[0, 1], [2, bad]], dtype=torch.int32))
    assert caught.value.block == bad
    assert caught.value.num_blocks == 4
    with pytest.raises(BlockError, match=f"got block {bad} at index 0"):
        ops.zero_blocks(a, torch.tensor([bad, 1], dtype=torch.int32))
    assert torch.equal(a, before)


def test_blocks_without_elements() -> None:
    """NumPy gives the axes of an empty array stride 0, which is no overlap."""
    ops.copy_blocks(np.zeros((3, 0), np.float32), np.array([[1, 2]], np.int32))
    ops.zero_blocks([np.zeros((3, 0, 4), np.float32)], np.array([2], np.int32))

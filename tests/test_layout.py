"""KVCacheLayout and KVCache: byte arithmetic, views, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from pagedcore.errors import InvalidArgumentError, UnsupportedError
from pagedcore.layout import KVCache, KVCacheLayout

GOOD = {"num_blocks": 5, "block_size": 4, "num_layers": 3, "num_kv_heads": 2, "head_dim": 24, "dtype": "float32"}


@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("v_head_dim", [None, 7])
def test_views_are_disjoint_and_inside(order: str, dtype: torch.dtype, v_head_dim: int | None) -> None:
    """Every element of every layer's K and V has an address of its own."""
    layout = KVCacheLayout(5, 4, 3, 2, 24, dtype, v_head_dim=v_head_dim, order=order)
    kv = layout.allocate()
    assert (kv.data == 0).all()
    seen = torch.zeros(layout.total_bytes // layout.item_size, dtype=torch.int32)
    base = kv.data.data_ptr()
    for i in range(3):
        k, v = kv.layer(i)
        assert k.shape == (5, 2, 4, 24)
        assert v.shape == (5, 2, 4, v_head_dim or 24)
        for view, page in ((k, layout.layers[i].k), (v, layout.layers[i].v)):
            assert view.dtype == dtype
            assert view.stride() == page.strides
            assert view.data_ptr() - base == page.offset
            assert view.data_ptr() % 64 == 0
            seen.as_strided(view.shape, view.stride(), page.offset // layout.item_size).add_(1)
    assert seen.max() == 1
    assert seen.sum() == 3 * 5 * 2 * 4 * (24 + (v_head_dim or 24))


def test_block_order_is_one_range_per_block() -> None:
    layout = KVCacheLayout(**GOOD)
    kv = layout.allocate()
    assert kv.data.shape == (5, layout.block_bytes)
    for i in range(3):
        for tensor in kv.layer(i):
            tensor[2] = 1
    assert (kv.data[2].view(torch.float32) == 1).all()
    assert (kv.data[[0, 1, 3, 4]] == 0).all()
    assert layout.total_bytes == 5 * layout.block_bytes == 5 * 3 * 2 * (2 * 4 * 24 * 4)


def test_layer_order_is_one_range_per_layer() -> None:
    layout = KVCacheLayout(**GOOD, order="layer")
    kv = layout.allocate()
    assert kv.data.shape == (3, 5, layout.layer_block_bytes)
    for tensor in kv.layer(1):
        tensor[:] = 1
    assert (kv.data[1].reshape(-1).view(torch.float32) == 1).all()
    assert (kv.data[[0, 2]] == 0).all()


def test_dtype_names() -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        assert KVCacheLayout(**{**GOOD, "dtype": dtype}).dtype == "bfloat16"
    for dtype in ("float32", torch.float32, np.float32, np.dtype("float32")):
        assert KVCacheLayout(**{**GOOD, "dtype": dtype}).dtype == "float32"


def test_layouts_are_values() -> None:
    layout = KVCacheLayout(**GOOD)
    assert layout == KVCacheLayout(**GOOD)
    assert layout != KVCacheLayout(**GOOD, order="layer")
    assert dataclasses.replace(layout, num_blocks=9).num_blocks == 9
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.num_blocks = 9  # type: ignore[misc]


def test_numpy_cache() -> None:
    kv = KVCacheLayout(**GOOD).allocate(library="numpy")
    assert isinstance(kv.data, np.ndarray)
    k, v = kv.layer(2)
    k[1] = 3
    assert k.shape == v.shape == (5, 2, 4, 24)
    assert (kv.data[1].view(np.float32) == 3).sum() == 2 * 4 * 24


def test_views_keep_the_memory_alive() -> None:
    k, _ = KVCacheLayout(**GOOD).allocate().layer(0)
    k[:] = 5
    assert (k == 5).all()


def test_without_torch_the_arrays_are_numpy() -> None:
    code = """
import sys
from pagedcore.layout import KVCacheLayout
kv = KVCacheLayout(3, 4, 1, 1, 8, "float16").allocate()
assert type(kv.data).__module__ == "numpy" and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "num_layers", "num_kv_heads", "head_dim", "v_head_dim"])
@pytest.mark.parametrize("value", [0, -1, 2**31, 2**70, 1.5, "4", True, [4]])
def test_bad_sizes(name: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{name}: expected") as caught:
        KVCacheLayout(**{**GOOD, name: value})
    assert caught.value.argument == name
    assert caught.value.got == value


@pytest.mark.parametrize("name", ["head_dim", "v_head_dim"])
def test_heads_wider_than_the_kernels_take(name: str) -> None:
    assert getattr(KVCacheLayout(**{**GOOD, name: 256}), name) == 256
    expected = f"^{name}: expected 1 to 256, the widest head that the kernels take, got 257$"
    with pytest.raises(InvalidArgumentError, match=expected):
        KVCacheLayout(**{**GOOD, name: 257})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("dtype", "int8", InvalidArgumentError),
        ("dtype", torch.float64, InvalidArgumentError),
        ("dtype", None, InvalidArgumentError),
        ("order", "token", InvalidArgumentError),
        ("order", 3, InvalidArgumentError),
        ("kv_format", "fp8", UnsupportedError),
        ("scale_granularity", "token", UnsupportedError),
    ],
)
def test_bad_choices(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name}: expected") as caught:
        KVCacheLayout(**{**GOOD, name: value})
    assert caught.value.argument == name


def test_products_that_overflow() -> None:
    with pytest.raises(InvalidArgumentError, match="at most 2\\*\\*62 bytes"):
        KVCacheLayout(2**31 - 1, 2**20, 2**20, 2**20, 256, "float32")


def test_more_memory_than_there_is() -> None:
    with pytest.raises(MemoryError, match="bytes of KV cache"):
        KVCacheLayout(2**20, 2**10, 2**10, 2**10, 256, "float32").allocate()


def test_bad_allocate() -> None:
    layout = KVCacheLayout(**GOOD)
    with pytest.raises(UnsupportedError, match="device: expected 'cpu' or 'cuda', got 'tpu'"):
        layout.allocate("tpu")
    with pytest.raises(UnsupportedError, match="device: expected 'cpu' for NumPy, got 'cuda'"):
        layout.allocate("cuda", library="numpy")
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="device: torch cannot use 'cuda': "):
            layout.allocate("cuda")
    with pytest.raises(InvalidArgumentError, match="library: expected"):
        layout.allocate(library="jax")


@pytest.mark.parametrize("i", [-1, 3, 1.0, "0", None, True])
def test_bad_layer(i: object) -> None:
    kv: KVCache = KVCacheLayout(**GOOD).allocate()
    with pytest.raises(InvalidArgumentError, match=r"i: expected a layer in \[0, 3\)"):
        kv.layer(i)  # type: ignore[arg-type]

"""Quantised KV on the GPU's kernels, run by the host shim: writing against the packer to the bit, reading against the
oracle.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codes import AWKWARD, GRANULARITIES, Quantized, caches, scales_of
from device import ELEMENT, Device, attend, scale_strides
from pagedcore.quantized import quantize
from reference import FEATURES, check, features, make_batch

DTYPES = pytest.mark.parametrize("dtype", list(ELEMENT), ids=str)


@DTYPES
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_codes_and_scales_are_the_packers(shim: Any, dtype: torch.dtype, granularity: str) -> None:
    """Whatever the rows hold; and nothing else is written, not for padding nor for a slot past the cache."""
    generator = torch.Generator().manual_seed(1)
    tokens, heads = 20, 3
    slots = torch.randperm(48, generator=generator)[:tokens]
    slots[7], slots[8] = -1, 48
    written = torch.tensor([i for i in range(tokens) if i not in (7, 8)])
    blocks, places = slots[written] // 8, slots[written] % 8
    untouched = torch.ones(6, 8, dtype=torch.bool)
    untouched[blocks, places] = False
    sides = []
    with Device(shim) as device:
        fields: dict[str, Any] = {"dtype": ELEMENT[dtype], "kv_dtype": "float8_e4m3fn", "num_blocks": 6}
        for seed, (name, page, dim) in enumerate((("key", "k", 37), ("value", "v", 64))):
            rows = (torch.randn(tokens, heads, dim, generator=generator) * 0.1**seed).to(dtype)
            rows[0, 0, : len(AWKWARD)] = torch.tensor(AWKWARD).to(dtype)
            rows[1] = 0
            rows[2, 1] = float("nan")
            cache = caches("strided", 6, heads, 8, dim)
            scale = scales_of(granularity, cache, seed)
            fields[name] = device.upload(rows)
            fields[page] = (device.upload(cache), *cache.stride()[:3])
            fields[f"{page}_scale"] = (device.upload(scale), *scale_strides(scale))
            fields[f"makes_{page}_scale"] = granularity == "token"
            fields[f"{name}_token_stride"], fields[f"{name}_head_stride"] = rows.stride()[:2]
            fields[f"{name}_bytes"] = dim * rows.element_size()
            sides.append((rows, cache, fields[page][0], scale, fields[f"{page}_scale"][0]))
        sizes = {"num_tokens": tokens, "num_kv_heads": heads, "block_size": 8, "element_size": dtype.itemsize}
        shim.reshape_and_cache({**fields, **sizes, "slot_mapping": device.upload(slots)})
        for rows, cache, address, before, scale_address in sides:
            own = None if granularity == "token" else before.numpy()
            codes, scales = quantize(rows.float().numpy(), own)
            got = device.download_view(address, cache)
            assert (got[blocks, :, places].numpy() == codes[written]).all()
            assert (got.transpose(1, 2)[untouched] == 0x55).all()
            scale = device.download_view(scale_address, before)
            if granularity == "token":
                assert (scale[blocks, :, places].numpy() == scales[written]).all()
                assert scale.transpose(1, 2)[untouched].isnan().all()
            else:
                assert torch.equal(scale, before)


def attend_codes(shim: Any, quantized: Quantized, kernel: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    k_scale, v_scale = quantized.scales
    return attend(shim, quantized.of_codes, kernel, k_scale=k_scale, v_scale=v_scale, **options)


@DTYPES
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_attention(shim: Any, dtype: torch.dtype, granularity: str) -> None:
    batch = make_batch([65, 2, 130, 3, 0], [1, 2, 4, 6, 1], dtype=dtype, heads=(8, 2), head_dim=72)
    quantized = Quantized(batch, granularity, "strided")
    check(quantized.exact, *attend_codes(shim, quantized, "generic"))


@pytest.mark.parametrize("options", FEATURES, ids="+".join)
def test_features(plain_shim: Any, options: dict[str, Any]) -> None:
    batch = make_batch([65, 20], [1, 3], dtype=torch.float16, heads=(8, 2), window=options.get("window"))
    quantized = Quantized(batch, "token")
    check(quantized.exact, *attend_codes(plain_shim, quantized, "generic", **options), **options)


@pytest.mark.parametrize("head_dim", [72, 80, 256])
def test_head_sizes_that_the_generic_kernel_takes(plain_shim: Any, head_dim: int) -> None:
    batch = make_batch([65, 20], [1, 3], dtype=torch.bfloat16, heads=(8, 2), head_dim=head_dim)
    quantized = Quantized(batch, "head")
    options = features("sinks")
    check(quantized.exact, *attend_codes(plain_shim, quantized, "any", **options), **options)

"""Quantised caches for the tests: codes in scattered strides, their scales, and what they stand for."""

from __future__ import annotations

from typing import Any

import torch
from pagedcore import ops
from pagedcore.quantized import dequantize
from reference import Batch

GRANULARITIES = ["tensor", "head", "token"]
NAN = float("nan")
# Values whose codes are easily got wrong: beyond the largest, halfway between two, subnormal, of both signs, and none.
AWKWARD = [0.0, -0.0, 448.0, -448.0, 449.0, 464.0, 1e30, float("inf"), -float("inf"), NAN, -NAN, 2.0**-9, 2.0**-10]
AWKWARD += [2.0**-11, -(2.0**-10) * 1.5, 2.0**-6, 2.0**-6 * 0.97, 17.0, 19.0, 1e-30, 1.4e-45, 0.3, -0.1]


def caches(layout: str, num_blocks: int, heads: int, block_size: int, dim: int) -> torch.Tensor:
    """uint8 codes of 0x55 with the strides that `layout` names."""
    if layout == "HND":
        return torch.full((num_blocks, heads, block_size, dim), 0x55, dtype=torch.uint8)
    return torch.full((num_blocks, block_size + 1, heads, dim + 3), 0x55, dtype=torch.uint8)[:, 1:, :, 2:-1].transpose(
        1, 2
    )


def scales_of(granularity: str, cache: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if granularity == "token":
        return torch.full(cache.shape[:3], NAN)
    return 0.01 + torch.rand(1 if granularity == "tensor" else cache.shape[1], generator=generator) / 100


class Quantized:
    """A batch whose cache holds codes, and the same one dequantised, for the oracle."""

    def __init__(self, batch: Batch, granularity: str, layout: str = "HND") -> None:
        blocks, heads, block_size, _ = batch.k_cache.shape
        self.batch = batch
        self.codes, self.scales, exact = [], [], []
        slots = torch.arange(blocks * block_size)
        for seed, cache in enumerate((batch.k_cache, batch.v_cache)):
            rows = cache.float().transpose(1, 2).reshape(-1, heads, cache.shape[3])
            scale = scales_of(granularity, cache, seed)
            codes = caches(layout, blocks, heads, block_size, cache.shape[3])
            ops.reshape_and_cache(rows, rows, codes, codes.clone(), slots, k_scale=scale)
            if granularity == "token":  # what nobody wrote
                scale[batch.k_cache[..., 0].isnan()] = NAN
            self.codes.append(codes)
            self.scales.append(scale)
            spread = scale if granularity == "token" else scale[None, :, None].expand(blocks, heads, block_size)
            exact.append(torch.from_numpy(dequantize(codes.numpy(), spread.numpy())))
        self.exact = Batch(batch.query, *exact, *batch.args[3:])
        self.of_codes = Batch(batch.query, *self.codes, *batch.args[3:])

    def attend(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        k_scale, v_scale = self.scales
        index = self.batch.args[3:]
        return ops.paged_attention(
            self.batch.query, *self.codes, *index, k_scale=k_scale, v_scale=v_scale, return_lse=True, **options
        )

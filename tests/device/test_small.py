"""Every kernel once, on small shapes: what compute-sanitizer has the time to look at, and the first look at a new GPU.

PAGEDCORE_TEST_DEVICE as in test_device.py.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from codes import GRANULARITIES, Quantized, caches, scales_of
from pagedcore import ops
from reference import SHARED, Batch, check, features, sharing
from small_shapes import KERNELS, OTHER_HEAD_DIMS, OTHER_KERNELS, SIZES, SPLITS, small_batch

DEVICE = os.environ.get("PAGEDCORE_TEST_DEVICE", "cpu")


def attend(batch: Batch, kernel: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), by that kernel where there is a GPU; no index was out of range."""
    args = [tensor.to(DEVICE) for tensor in batch.args]
    longest = int(batch.query_start_loc.diff().max())
    if DEVICE != "cpu":
        sizes = {"num_seqs": len(batch.seq_lens), "max_query_len": longest, "split_size": options.get("split_size")}
        assert ops.explain_attention(*args[:3], **sizes).startswith(kernel)
    options = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    out, lse = ops.paged_attention(*args, return_lse=True, max_query_len=longest, **options)
    result = out.cpu(), lse.cpu()
    assert ops.device_errors(DEVICE) == []  # of what has ended
    return result


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize(("head_dim", "dtype"), SIZES, ids=str)
@pytest.mark.parametrize("split_size", SPLITS)
def test_attention(kernel: str, head_dim: int, dtype: torch.dtype, split_size: int | None) -> None:
    """Cut by the planner, and in pieces that are merged."""
    batch = small_batch(kernel, head_dim, dtype)
    check(batch, *attend(batch, kernel, split_size=split_size), whole_references=kernel != "generic")


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize(("head_dim", "dtype"), SIZES, ids=str)
def test_attention_over_codes(kernel: str, head_dim: int, dtype: torch.dtype) -> None:
    quantized = Quantized(small_batch(kernel, head_dim, dtype), "token")
    k_scale, v_scale = quantized.scales
    out, lse = attend(quantized.of_codes, kernel, k_scale=k_scale, v_scale=v_scale)
    check(quantized.exact, out, lse, row_factor=4, whole_references=kernel != "generic")


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_attention_with_features(kernel: str) -> None:
    batch = small_batch(kernel, 64, torch.bfloat16)
    options = features("softcap", "alibi_slopes", "sinks", "window", num_heads=batch.query.shape[1])
    check(batch, *attend(batch, kernel, **options), whole_references=kernel != "generic", **options)


@pytest.mark.parametrize("head_dim", OTHER_HEAD_DIMS)
def test_other_head_sizes(head_dim: int) -> None:
    for kernel in OTHER_KERNELS:
        batch = small_batch(kernel, head_dim, torch.bfloat16)
        check(batch, *attend(batch, kernel), whole_references=True)


def test_float32() -> None:
    batch = small_batch("generic", 64, torch.float32)
    check(batch, *attend(batch, "generic"))


def test_a_plan_of_ones_own() -> None:
    batch = small_batch("mixed", 64, torch.bfloat16)
    args = [tensor.to(DEVICE) for tensor in batch.args]
    plan = ops.plan_attention(
        *args[4:],
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        max_query_len=20,
        num_tokens=len(batch.query),
        dtype=batch.query.dtype,
    )
    for _ in range(2):  # layers
        out = ops.paged_attention(*args, plan=plan, max_query_len=20)
        check(batch, out.cpu(), whole_references=True)


def test_a_shared_prefix() -> None:
    batch = sharing([1, 17, 0], [1, 1, 1], dtype=torch.bfloat16, heads=(8, 2))
    args = [tensor.to(DEVICE) for tensor in batch.args]
    out, lse = ops.cascade_attention(*args, num_shared_blocks=SHARED, return_lse=True, max_query_len=1)
    check(batch, out.cpu(), lse.cpu(), row_factor=5, whole_references=True)


def test_states_merge() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(5, 3, n, generator=generator).squeeze(-1) for n in (40, 1, 40, 1)]
    states.append(torch.randn(3, generator=generator))  # sinks
    got = ops.merge_states(*(tensor.to(DEVICE) for tensor in states))
    for one, other in zip(got, ops.merge_states(*states), strict=True):
        torch.testing.assert_close(one.cpu(), other)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", ["HND", "strided"])
def test_writing_codes(granularity: str, layout: str) -> None:
    """To the byte as on the CPU, scales too."""
    generator = torch.Generator().manual_seed(1)
    key = torch.randn(4, 2, 40, generator=generator).to(torch.bfloat16)
    slots = torch.tensor([3, -1, 17, 9])
    results = []
    for device in ("cpu", DEVICE):
        sides = [caches(layout, 3, 2, 8, 40) for _ in range(2)]
        scales = [scales_of(granularity, side, seed) for seed, side in enumerate(sides)]
        sides, scales = ([tensor.to(device) for tensor in tensors] for tensors in (sides, scales))
        ops.reshape_and_cache(
            *(key.to(device), key.to(device), *sides, slots.to(device)), k_scale=scales[0], v_scale=scales[1]
        )
        results.append([tensor.cpu() for tensor in (*sides, *scales)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize("dim", [64, 5])
def test_bytes_are_moved(dim: int) -> None:
    """Write, copy, zero, gather, scatter and a table's changes, in 16 bytes at a time and in fewer: as on the CPU."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 2, 4, dim, generator=generator).to(torch.bfloat16)
    key = torch.randn(3, 2, dim, generator=generator).to(torch.bfloat16)
    results = []
    for device in ("cpu", DEVICE):

        def ints(*values: Any, device: str = device) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        cache, other = start.to(device, copy=True), start.to(device, copy=True)
        ops.reshape_and_cache(key.to(device), key.to(device), cache, other, torch.tensor([1, -1, 22], device=device))
        ops.copy_blocks([cache, other], ints([1, 2], [4, 0]))
        ops.zero_blocks([cache, other], ints(3))
        staging = torch.empty(2, *start.shape[1:], dtype=start.dtype, device=device)
        ops.gather_blocks(cache, ints(5, 1), staging)
        ops.scatter_blocks(cache, ints(0, 4), staging)
        table = torch.zeros(2, 3, dtype=torch.int32, device=device)
        ops.update_block_table(table, ints([1, 2, 7], [0, 0, 5]))
        results.append([tensor.cpu() for tensor in (cache, other, staging, table)])
    assert ops.device_errors(DEVICE) == []
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)

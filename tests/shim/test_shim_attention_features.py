"""Soft cap, ALiBi and attention sinks on the GPU's kernels, run by the host shim, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import attend
from reference import FEATURES, check, features, make_batch

HEADS = (8, 2)
KERNELS = pytest.mark.parametrize("kernel", ["generic", "tiled"])
ALL = ("softcap", "alibi_slopes", "sinks")


@KERNELS
@pytest.mark.parametrize("options", FEATURES, ids="+".join)
def test_features(plain_shim: Any, kernel: str, options: dict[str, Any]) -> None:
    """Queries before the first token and a padding row among others."""
    batch = make_batch(
        [65, 2, 130, 3, 0], [1, 2, 4, 6, 1], dtype=torch.float16, heads=HEADS, window=options.get("window")
    )
    check(batch, *attend(plain_shim, batch, kernel, **options), whole_references=kernel == "tiled", **options)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_split_items_add_sinks_once(shim: Any, kernel: str, dtype: torch.dtype) -> None:
    """Over few blocks and many: whole items, and pieces merged by the last block to arrive."""
    options = features(*ALL)
    batch = make_batch([700, 3, 64, 300], [1, 1, 1, 2], dtype=dtype, heads=HEADS)
    for grid in (1, 7):
        result = attend(shim, batch, kernel, grid=grid, launches=2, **options)
        check(batch, *result, whole_references=kernel == "tiled", **options)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_head_sizes(plain_shim: Any, head_dim: int) -> None:
    options = features(*ALL)
    batch = make_batch([65, 130], [1, 3], dtype=torch.bfloat16, heads=HEADS, head_dim=head_dim, seed=1)
    check(batch, *attend(plain_shim, batch, "tiled", **options), whole_references=True, **options)


@KERNELS
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (28, 4), (71, 1)], ids=str)
def test_heads(plain_shim: Any, kernel: str, heads: tuple[int, int]) -> None:
    """Every head has its own slope and its own sink, however heads are packed."""
    options = features("alibi_slopes", "sinks", num_heads=heads[0])
    batch = make_batch([65, 20], [1, 3], dtype=torch.float16, heads=heads)
    check(batch, *attend(plain_shim, batch, kernel, **options), whole_references=kernel == "tiled", **options)


@pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_soft_caps(plain_shim: Any, softcap: float, dtype: torch.dtype) -> None:
    """From one that holds every score down to one that no score feels."""
    batch = make_batch([50, 130], [1, 3], dtype=dtype, heads=HEADS)
    kernel = "generic" if dtype == torch.float32 else "tiled"
    result = attend(plain_shim, batch, kernel, softcap=softcap)
    check(batch, *result, whole_references=kernel == "tiled", softcap=softcap)


def test_v_head_dim_differs(plain_shim: Any) -> None:
    options = features(*ALL)
    batch = make_batch([50, 70], [1, 3], heads=HEADS, head_dim=96, v_head_dim=33)
    check(batch, *attend(plain_shim, batch, "generic", **options), **options)


@KERNELS
def test_no_feature_by_its_neutral_value(plain_shim: Any, kernel: str) -> None:
    batch = make_batch([100, 64], [1, 3], dtype=torch.bfloat16, heads=HEADS)
    want = attend(plain_shim, batch, kernel)
    for name, value in (("alibi_slopes", 0.0), ("sinks", float("-inf"))):
        for a, b in zip(attend(plain_shim, batch, kernel, **{name: torch.full((8,), value)}), want, strict=True):
            assert torch.equal(a, b), name


@KERNELS
def test_constant_values_come_back(plain_shim: Any, kernel: str) -> None:
    batch = make_batch([100, 64], [1, 3], dtype=torch.bfloat16, heads=HEADS)
    batch.v_cache[:] = 1
    out, _ = attend(plain_shim, batch, kernel, **features("softcap", "alibi_slopes"))
    assert (out == 1).all()


@KERNELS
@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_nan_of_one_head_stays_there(plain_shim: Any, kernel: str, name: str) -> None:
    batch = make_batch([70, 30], [1, 3], dtype=torch.bfloat16, heads=HEADS)
    values = torch.zeros(8)
    values[3] = float("nan")
    out, _ = attend(plain_shim, batch, kernel, **{name: values})
    assert out[:, 3].isnan().all()
    assert out[:, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()

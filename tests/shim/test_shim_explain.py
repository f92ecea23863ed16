"""Which kernel attention takes, as `ops.explain_attention` tells it, on a GPU, which here is the host shim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from pagedcore import ops
from pagedcore.errors import InvalidArgumentError
from reference import make_batch
from small_shapes import KERNELS, OTHER_HEAD_DIMS, OTHER_KERNELS, SIZES, SPLITS, small_batch

if TYPE_CHECKING:
    from gpus import ShimGpu


def explain(gpu: ShimGpu, queries: list[int], max_query_len: int | None = None, **options: Any) -> str:
    """For sequences of these query lengths, of 8 heads over 2, in bfloat16 unless `options` of the batch say else."""
    split_size = options.pop("split_size", None)
    batch = make_batch(queries, queries, **{"dtype": torch.bfloat16, "heads": (8, 2), **options})
    tensors = (gpu.upload(t) for t in (batch.query, batch.k_cache, batch.v_cache))
    return ops.explain_attention(*tensors, num_seqs=len(queries), max_query_len=max_query_len, split_size=split_size)


@pytest.mark.parametrize(
    ("queries", "max_query_len", "options", "kernel"),
    [
        ([1, 1, 1], 1, {}, "decode"),
        ([4, 4], 4, {}, "decode"),  # 16 rows a KV head
        ([5, 1], 5, {}, "mixed"),
        ([32, 32], 32, {}, "prefill"),  # all alike, of 128 rows
        ([32, 1], 32, {}, "mixed"),
        ([300, 1], 300, {}, "prefill"),  # 602 rows a sequence on the average
        ([300, 1], 300, {"split_size": 0}, "mixed"),  # one that decodes has the tiles that it has alone
        ([32, 32], 32, {"split_size": 0}, "mixed"),  # as a replay with other query starts may have one
        ([300, 1], 300, {"split_size": 0, "heads": (17, 1)}, "prefill"),  # none has few rows
        ([300, 1], 300, {"head_dim": 128}, "prefill"),
        ([300, 1], 300, {"head_dim": 80}, "mixed"),
        ([300, 1], 300, {"head_dim": 192}, "mixed"),
        ([1, 1, 1], 1, {"head_dim": 256}, "decode"),
        ([1, 1, 1], 1, {"head_dim": 256, "split_size": 64}, "mixed"),
        ([20], None, {}, "mixed"),  # one query of all 20 tokens
        ([1, 1, 1], None, {}, "decode"),  # 12 rows, whosever they are
    ],
)
def test_kernels(
    gpu: ShimGpu, queries: list[int], max_query_len: int | None, options: dict[str, Any], kernel: str
) -> None:
    assert explain(gpu, queries, max_query_len, **options) == kernel


@pytest.mark.parametrize(
    ("kernel", "head_dim", "dtype", "split_size"),
    [
        *((kernel, *size, split_size) for kernel in KERNELS for size in SIZES for split_size in SPLITS),
        *((kernel, head_dim, torch.bfloat16, None) for kernel in OTHER_KERNELS for head_dim in OTHER_HEAD_DIMS),
    ],
)
def test_small_shapes(gpu: ShimGpu, kernel: str, head_dim: int, dtype: torch.dtype, split_size: int | None) -> None:
    """Each takes the kernel that it is named after: on a GPU the sanitizers see nothing else."""
    batch = small_batch(kernel, head_dim, dtype)
    tensors = [gpu.upload(t) for t in (batch.query, batch.k_cache, batch.v_cache)]
    sizes = {"num_seqs": len(batch.seq_lens), "max_query_len": int(batch.query_start_loc.diff().max())}
    assert ops.explain_attention(*tensors, split_size=split_size, **sizes).startswith(kernel)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "the dtype is not float16 or bfloat16"),
        ({"head_dim": 72}, "the head size is not 64, 80, 96, 112, 128, 192 or 256"),
        ({"v_head_dim": 80}, "K and V have different head sizes"),
    ],
)
def test_reasons(gpu: ShimGpu, options: dict[str, Any], reason: str) -> None:
    assert explain(gpu, [1, 1], 1, **options) == f"generic: {reason}"


@pytest.mark.parametrize(("queries", "kernel"), [([1] * 5, "mixed"), ([1] * 300, "mixed"), ([32, 32], "mixed")])
def test_a_choice_for_want_of_the_longest_query_is_told(gpu: ShimGpu, queries: list[int], kernel: str) -> None:
    told = f"{kernel}: max_query_len was not given, so that one query may have all {sum(queries)} tokens"
    assert explain(gpu, queries) == told


@pytest.mark.parametrize(
    ("queries", "options", "kernel"),
    [
        ([200, 200], {}, "prefill"),  # 400 tokens of two sequences: one has 200, which are as many tiles of 128 rows
        ([1] * 5, {"heads": (17, 1)}, "mixed"),  # a query of one token has 17 rows
        ([30, 1], {}, "mixed"),  # one has 16 tokens, of 64 rows
        ([], {}, "decode"),
    ],
)
def test_a_choice_that_no_longest_query_changes_is_told_alone(
    gpu: ShimGpu, queries: list[int], options: dict[str, Any], kernel: str
) -> None:
    assert explain(gpu, queries, **options) == kernel


def test_misaligned_rows(gpu: ShimGpu) -> None:
    batch = make_batch([1], [1], dtype=torch.bfloat16)
    moved = torch.empty(batch.query.numel() + 1, dtype=torch.bfloat16)[1:].view(batch.query.shape)
    tensors = (gpu.upload(t) for t in (moved, batch.k_cache, batch.v_cache))
    assert ops.explain_attention(*tensors, num_seqs=1) == "generic: rows of query do not start on 16 bytes"


def test_codes_at_other_head_sizes(gpu: ShimGpu) -> None:
    batch = make_batch([1], [1], dtype=torch.bfloat16, head_dim=80)
    codes = [torch.zeros(batch.k_cache.shape, dtype=torch.float8_e4m3fn) for _ in range(2)]
    tensors = (gpu.upload(t) for t in (batch.query, *codes))
    assert (
        ops.explain_attention(*tensors, num_seqs=1)
        == "generic: the cache holds codes and the head size is not 64 or 128"
    )


@pytest.mark.shim_only
def test_blocks_beyond_32_bits(gpu: ShimGpu) -> None:
    """Tokens of a block so far apart that the last is 2^31 elements from the first."""
    batch = make_batch([1], [1], dtype=torch.bfloat16, block_size=2, heads=(1, 1))
    query, k_cache, v_cache = gpu.upload(batch.query), gpu.upload(batch.k_cache), gpu.upload(batch.v_cache)
    strides = (1 << 32, 1 << 32, 1 << 30, 1)
    like = torch.empty_strided(batch.k_cache.shape, strides, dtype=torch.bfloat16, device="meta")
    far = gpu.tensor_class(k_cache.address, like, 0)
    assert ops.explain_attention(query, k_cache, v_cache, num_seqs=1) == "decode"
    for name in ("k_cache", "v_cache"):
        caches = {"k_cache": k_cache, "v_cache": v_cache} | {name: far}
        assert ops.explain_attention(query, **caches, num_seqs=1) == "generic: a block of one head spans 2^31 elements"


def test_bad_input(gpu: ShimGpu) -> None:
    batch = make_batch([3], [3], dtype=torch.bfloat16)
    query, k_cache, v_cache = (gpu.upload(t) for t in (batch.query, batch.k_cache, batch.v_cache))
    with pytest.raises(InvalidArgumentError, match="num_seqs"):
        ops.explain_attention(query, k_cache, v_cache, num_seqs=-1)
    for name, value in (("max_query_len", "40"), ("num_seqs", None), ("split_size", 1.5)):
        with pytest.raises(TypeError, match=f"^{name}: expected an int"):
            ops.explain_attention(query, k_cache, v_cache, **{"num_seqs": 1, name: value})
    with pytest.raises(InvalidArgumentError, match="split_size: expected None, 0 or a number of tokens, got -7"):
        ops.explain_attention(query, k_cache, v_cache, num_seqs=1, split_size=-7)
    with pytest.raises(InvalidArgumentError, match="v_cache"):
        ops.explain_attention(query, k_cache, batch.v_cache, num_seqs=1)

"""Plans of one's own, on a GPU, which here is the host shim: made from lengths alone, for calls of those sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from gpu_calls import arguments, step
from pagedcore import ops
from reference import check, make_batch

if TYPE_CHECKING:
    from gpus import ShimGpu
    from reference import Batch


def make_plan(gpu: ShimGpu, batch: Batch, **options: Any) -> Any:
    sizes = step(batch) | {"max_query_len": int(batch.query_start_loc.diff().max())} | options
    return ops.plan_attention(gpu.upload(batch.seq_lens), gpu.upload(batch.query_start_loc), **sizes)


BATCHES = {
    "decode": ([300, 5, 700, 0], [1, 3, 1, 1]),
    "mixed": ([300, 130, 5], [1, 30, 1]),
    "prompts": ([200, 130], [70, 70]),
}


@pytest.mark.parametrize("name", list(BATCHES))
@pytest.mark.parametrize("options", [{}, {"split_size": 0}, {"split_size": 128}, {"window": 90}], ids=str)
def test_sequences_of_many_units(gpu: ShimGpu, name: str, options: dict[str, Any]) -> None:
    """What the plan cuts, before there is a cache, is what attention walks: the same bits as of a plan of its own."""
    lengths, queries = BATCHES[name]
    batch = make_batch(lengths, queries, dtype=torch.bfloat16, window=options.get("window"))
    longest = max(queries)
    plan = make_plan(gpu, batch, **options)
    args = arguments(gpu, batch)
    out = ops.paged_attention(*args, plan=plan, max_query_len=longest, **options)
    alone = ops.paged_attention(*args, max_query_len=longest, **options)
    check(batch, gpu.download(out), whole_references=True, window=options.get("window"))
    assert torch.equal(gpu.download(out), gpu.download(alone))
    assert ops.device_errors(0) == []


@pytest.mark.parametrize(
    "changes",
    [{"num_tokens": 132}, {"max_query_len": 1}, {"split_size": 0}, {"window": 9}, {"causal": False}],
    ids=str,
)
def test_a_plan_for_another_call_is_flagged(gpu: ShimGpu, changes: dict[str, Any]) -> None:
    """And nothing is attended to: its arrays lie elsewhere, or cut other work."""
    batch = make_batch([300, 130], [1, 30], dtype=torch.bfloat16)
    room = gpu.empty((1 << 20,), torch.uint8)  # more than either call needs, so that no size tells
    plan = make_plan(gpu, batch, **changes, out=room)
    ops.paged_attention(*arguments(gpu, batch), plan=plan, max_query_len=30)
    errors = ops.device_errors(0)
    assert errors[0].startswith("a plan that was made for a call of other sizes or lengths")
    assert len(errors) == (2 if changes == {"max_query_len": 1} else 1)  # which is not true of these queries either


@pytest.mark.parametrize(
    ("planned", "lengths"),
    [
        ([300, 300], [20, 30]),  # the line is shorter now: what is past it would be heads that there are none of
        ([20, 30], [300, 300]),
        ([1000, 5], [5, 1000]),
        ([640, 640], [64, 640]),
    ],
    ids=str,
)
@pytest.mark.parametrize("split_size", [None, 128])
def test_a_plan_for_other_lengths_is_flagged(
    gpu: ShimGpu, planned: list[int], lengths: list[int], split_size: int | None
) -> None:
    """As in a recorded step that is replayed with its plan of before: nothing outside of the tensors is touched."""
    batch = make_batch(lengths, [1, 1], dtype=torch.bfloat16)
    stale = make_plan(gpu, make_batch(planned, [1, 1], dtype=torch.bfloat16), split_size=split_size)
    ops.paged_attention(*arguments(gpu, batch), plan=stale, max_query_len=1, split_size=split_size)
    (error,) = ops.device_errors(0)
    assert error.startswith("a plan that was made for a call of other sizes or lengths")


def test_a_plan_for_other_queries_is_flagged(gpu: ShimGpu) -> None:
    """Whose tiles are as long each as the planned ones, and not as many: not causal, all see all keys."""
    options: dict[str, Any] = {"causal": False, "max_query_len": 80}
    batch = make_batch([80, 80], [80, 40], dtype=torch.bfloat16)
    stale = make_plan(gpu, make_batch([80, 80], [40, 80], dtype=torch.bfloat16), **options)
    ops.paged_attention(*arguments(gpu, batch), plan=stale, **options)
    (error,) = ops.device_errors(0)
    assert error.startswith("a plan that was made for a call of other sizes or lengths")


def test_a_plan_never_outgrows_its_memory(gpu: ShimGpu) -> None:
    """Query starts that fall make sequences of the same tokens, which have more tiles than these tokens have room for:
    they are left out, and flagged.
    """
    tokens, seqs = 256, 64
    starts = torch.tensor([0, tokens] * (seqs // 2) + [0], dtype=torch.int32)
    lens = torch.full((seqs,), tokens, dtype=torch.int32)
    size = ops.attention_plan_size(tokens, seqs, 8, 2, 64, device=0)
    room = gpu.empty((size + (1 << 16),), torch.uint8)
    gpu.write(room, torch.full(room.shape, 85, dtype=torch.uint8))
    heads = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
    ops.plan_attention(gpu.upload(lens), gpu.upload(starts), **heads, num_tokens=tokens, max_query_len=tokens, out=room)
    assert ops.device_errors(0)[-1].startswith("query starts that do not rise")
    assert (gpu.download(room)[size:] == 85).all()


def test_memory_without_a_plan_is_flagged(gpu: ShimGpu) -> None:
    batch = make_batch([300, 130], [1, 30], dtype=torch.bfloat16)
    room = gpu.empty((1 << 20,), torch.uint8)
    ops.paged_attention(*arguments(gpu, batch), plan=room, max_query_len=30)
    assert len(ops.device_errors(0)) == 1


@pytest.mark.parametrize("split_size", [None, 0, 1 << 24])
def test_any_length_is_survived(gpu: ShimGpu, split_size: int | None) -> None:
    """A length that no table holds, up to the largest: what the table has is attended to, and it is flagged."""
    batch = make_batch([48], [1], dtype=torch.bfloat16)  # the blocks are full: what is past them is not there
    batch.seq_lens[0] = 2**31 - 1
    out = ops.paged_attention(*arguments(gpu, batch), max_query_len=1, split_size=split_size)
    assert gpu.download(out).isfinite().all()
    assert ops.device_errors(0)[-1].startswith("a sequence longer than its row of the block table")

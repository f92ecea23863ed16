"""Cascade attention on a GPU, which here is the host shim: two passes, of a GPU's own work plans, and their merge.

What the tensor library does between them (`cascade.fill` and its like) is done on the host.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from gpu_calls import arguments, make_gpu
from gpus import TorchGpu
from pagedcore import cascade, cascade_plan, ops, tensors
from pagedcore.errors import InvalidArgumentError
from reference import SHARED, Batch, check, features, sharing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpus import ShimGpu


@pytest.fixture
def gpu(plain_shim: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShimGpu]:
    for device in make_gpu(plain_shim, "exchange api", monkeypatch):
        if isinstance(device, TorchGpu):
            yield device
            continue
        for module in (cascade, cascade_plan):
            monkeypatch.setattr(module, "_kernels", device.kernels)
        monkeypatch.setattr(tensors, "_address_of", lambda memory: memory.pointer)
        for module, names in ((cascade, ("hide",)), (cascade_plan, ("fill", "subtract"))):
            monkeypatch.setattr(module, "carve", partial(carve, device))
            for name in names:
                monkeypatch.setattr(module, name, on_host(device, getattr(module, name)))
        caches = (cascade._places, cascade_plan.plan_places)
        for cache in caches:
            cache.cache_clear()  # what it holds of a device 0 is another's
        yield device
        for cache in caches:
            cache.cache_clear()


def carve(gpu: ShimGpu, memory: Any, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """As that of torch: the tensor begins `offset` bytes into the memory."""
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert offset + torch.Size(shape).numel() * kind.itemsize <= memory.shape[0]
    return gpu.tensor_class(memory.pointer + offset, torch.empty(shape, dtype=kind), 0)


def on_host(gpu: ShimGpu, function: Any) -> Any:
    """The function on copies in host memory, which are written back."""

    def work(*args: Any) -> None:
        copies = [gpu.download(a) if hasattr(a, "like") else a for a in args]
        function(*copies)
        for tensor, copy in zip(args, copies, strict=True):
            if hasattr(tensor, "like"):
                gpu.shim.copy_to_device(tensor.pointer, copy.data_ptr(), copy.nbytes)

    return lambda *args: gpu.between_launches(partial(work, *args))


def attend(gpu: ShimGpu, batch: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = {name: gpu.upload(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out, lse = ops.cascade_attention(
        *arguments(gpu, batch), num_shared_blocks=SHARED, return_lse=True, max_query_len=3, **options
    )
    assert ops.device_errors(0) == []
    return gpu.download(out), gpu.download(lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_padding_comes_last(gpu: ShimGpu, dtype: torch.dtype) -> None:
    """Tiled and plain kernels, more shared rows than a decode tile has, and rows of a graph that are not used."""
    batch = sharing([1, 40, 17, 0, 0], [1, 3, 1, 1, 2], dtype=dtype, heads=(8, 2))
    sinks = features("sinks")
    check(batch, *attend(gpu, batch, **sinks), row_factor=5, whole_references=True, **sinks)


def test_a_table_that_lives_on_the_device(gpu: ShimGpu) -> None:
    batch = sharing([5, 33, 0], [1, 1, 1], dtype=torch.bfloat16)
    rows = torch.tensor([3, 1, 0], dtype=torch.int32)
    table = torch.zeros(4, batch.block_table.shape[1], dtype=torch.int32)
    table[rows[:2].long()] = batch.block_table[:2].clamp(min=0)
    of_rows = Batch(*batch.args[:3], table, *batch.args[4:])
    out, lse = attend(gpu, of_rows, block_table_rows=rows)
    check(batch, out, lse, row_factor=5, whole_references=True)


@pytest.mark.parametrize("num_shared_blocks", [0, SHARED])
def test_memory_of_ones_own(gpu: ShimGpu, num_shared_blocks: int) -> None:
    """A workspace for larger calls; with it nothing is allocated."""
    batch = sharing([5, 33], [1, 1], dtype=torch.float16)
    size = ops.cascade_workspace_size(9, 7, 4, 2, 64, dtype="float16", device=0)
    own = [gpu.empty((2, 4, 64), torch.float16), gpu.empty((2, 4), torch.float32), gpu.empty((size,), torch.uint8)]
    args = arguments(gpu, batch)
    before = gpu.allocations()
    ops.cascade_attention(*args, num_shared_blocks=num_shared_blocks, out=own[0], lse=own[1], workspace=own[2])
    assert gpu.allocations() == before
    check(batch, gpu.download(own[0]), gpu.download(own[1]), row_factor=5, whole_references=True)


@pytest.mark.parametrize("planned", [False, True])
def test_a_recorded_step(gpu: ShimGpu, planned: bool) -> None:
    """Replayed with other lengths, and with padding; nothing is allocated."""
    batch = sharing([40, 33, 5], [1, 1, 1], dtype=torch.bfloat16, heads=(8, 2))
    sizes = (3, 3, 8, 2, 64)
    out, lse = gpu.empty((3, 8, 64), torch.bfloat16), gpu.empty((3, 8), torch.float32)
    workspace = gpu.empty((ops.cascade_workspace_size(*sizes, device=0),), torch.uint8)
    plan = gpu.empty((ops.cascade_plan_size(*sizes, device=0),), torch.uint8)
    args = arguments(gpu, batch)
    shapes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "num_tokens": 3, "max_query_len": 1}

    def step() -> None:
        if planned:
            ops.plan_cascade(*args[4:], num_shared_blocks=SHARED, block_size=16, out=plan, **shapes)
        more = {"plan": plan if planned else None, "workspace": workspace, "out": out, "lse": lse}
        ops.cascade_attention(*args, num_shared_blocks=SHARED, max_query_len=1, **more)

    step()
    before = gpu.allocations()
    replay = gpu.record(step)
    assert gpu.allocations() == before
    for own in ([40, 33, 5], [1, 17, 5], [32, 2, 0], [0, 0, 0]):
        batch.seq_lens = torch.tensor([16 * SHARED + n if n else 0 for n in own], dtype=torch.int32)
        gpu.write(args[4], batch.seq_lens)
        gpu.write(out, torch.full(out.shape, float("nan"), dtype=torch.bfloat16))
        replay()
        check(batch, gpu.download(out), gpu.download(lse), row_factor=5, whole_references=True)
    assert ops.device_errors(0) == []


def test_a_plan_for_all_layers(gpu: ShimGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share a plan plan nothing, and give the bits that they give alone."""
    planned: list[Any] = []
    kernels = cascade_plan._kernels

    def plan_attention(*args: Any, **options: Any) -> None:
        planned.append(kernels.plan_attention(*args, **options))

    monkeypatch.setattr(cascade_plan, "_kernels", SimpleNamespace(plan_attention=plan_attention))
    layers = [sharing([5, 33, 0], [1, 3, 1], dtype=torch.bfloat16, heads=(8, 2), seed=seed) for seed in range(2)]
    lens, starts = gpu.upload(layers[0].seq_lens), gpu.upload(layers[0].query_start_loc)
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "num_tokens": 5, "max_query_len": 3}
    shared = {"num_shared_blocks": SHARED, "block_size": 16}
    plan = ops.plan_cascade(lens, starts, **sizes, **shared)
    assert len(planned) == 2
    for batch in layers:
        planned.clear()
        out, lse = ops.cascade_attention(
            *arguments(gpu, batch), num_shared_blocks=SHARED, return_lse=True, max_query_len=3, plan=plan
        )
        assert not planned
        check(batch, gpu.download(out), gpu.download(lse), row_factor=5, whole_references=True)
        alone = attend(gpu, batch)
        assert len(planned) == 2
        assert torch.equal(gpu.download(out), alone[0])
        assert torch.equal(gpu.download(lse), alone[1])
    assert ops.device_errors(0) == []


STARTS = torch.tensor([0, 1, 4, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_query_len": -3}, "max_query_len: expected 0 or more, got -3"),
        ({"causal": "yes"}, "causal: expected a bool, got 'yes'"),
        ({"query_start_loc": lambda gpu: gpu.upload(STARTS[:3])}, "query_start_loc: expected 4 entries"),
        (
            {"query_start_loc": lambda gpu: gpu.upload(STARTS.repeat_interleave(2))[::2]},
            "query_start_loc: expected a contiguous",
        ),
        ({"query_start_loc": lambda _: STARTS}, "query_start_loc: expected the device of seq_lens, cuda:0"),
    ],
)
def test_plans_of_what_cannot_be(gpu: ShimGpu, changes: dict[str, Any], message: str) -> None:
    """Nothing was written: all is checked before the first of the two plans."""
    batch = sharing([5, 33, 20], [1, 3, 1], dtype=torch.bfloat16, heads=(8, 2))
    given = {"seq_lens": gpu.upload(batch.seq_lens), "query_start_loc": gpu.upload(STARTS)}
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "num_tokens": 5, "max_query_len": 3}
    plan = gpu.empty((ops.cascade_plan_size(5, 3, 8, 2, 64, device=0),), torch.uint8)
    gpu.write(plan, torch.full(plan.shape, 85, dtype=torch.uint8))
    given |= {name: change(gpu) if callable(change) else change for name, change in changes.items()}
    with pytest.raises(InvalidArgumentError, match=f"^{message}"):
        ops.plan_cascade(**{**sizes, **given}, num_shared_blocks=SHARED, block_size=16, out=plan)
    assert (gpu.download(plan) == 85).all()


def test_a_plan_of_another_step_attends_to_nothing(gpu: ShimGpu) -> None:
    """As with `paged_attention`: it is flagged."""
    batch = sharing([5, 33, 20], [1, 3, 1], dtype=torch.bfloat16, heads=(8, 2))
    plan = gpu.empty((ops.cascade_plan_size(5, 3, 8, 2, 64, device=0),), torch.uint8)
    gpu.write(plan, torch.zeros(plan.shape, dtype=torch.uint8))
    ops.cascade_attention(*arguments(gpu, batch), num_shared_blocks=SHARED, max_query_len=3, plan=plan)
    assert any("a plan that was made for a call of other sizes" in fault for fault in ops.device_errors(0))


@pytest.mark.parametrize("planned", [SHARED - 1, SHARED + 1])
def test_a_plan_of_other_shared_blocks_attends_to_nothing(gpu: ShimGpu, planned: int) -> None:
    """Neither pass: each would read keys of the other's, in pieces of as many units as the plan has."""
    batch = sharing([5, 33, 20], [1, 3, 1], dtype=torch.bfloat16, heads=(8, 2))
    sizes = (5, 3, 8, 2, 64)
    args = arguments(gpu, batch)
    shapes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "num_tokens": 5, "max_query_len": 3}
    workspace = gpu.empty((ops.cascade_workspace_size(*sizes, device=0),), torch.uint8)
    gpu.write(workspace, torch.full(workspace.shape, 85, dtype=torch.uint8))
    plan = ops.plan_cascade(*args[4:], num_shared_blocks=planned, block_size=16, **shapes)
    assert ops.device_errors(0) == []
    ops.cascade_attention(*args, num_shared_blocks=SHARED, max_query_len=3, plan=plan, workspace=workspace)
    (error,) = ops.device_errors(0)
    assert error.startswith("a plan that was made for a call of other sizes")
    left = gpu.download(workspace)
    for name in ("shared", "own"):
        at = cascade._places(*sizes, 64, "bfloat16", 0)[name]
        assert (left[at : at + 5 * 8 * 64 * 2] == 85).all()

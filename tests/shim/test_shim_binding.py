"""pagedcore.ops on a GPU, which here is the host shim: results are those of the CPU, which device and stream a call
takes, what is refused, and what is flagged. What tensors may be: test_shim_tensors.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from gpu_calls import OPS, arguments, calls, small_batch, step
from pagedcore import ops
from pagedcore.errors import InvalidArgumentError
from reference import Batch, check, features, make_batch

if TYPE_CHECKING:
    from gpus import ShimGpu

# ------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_attention(any_gpu: ShimGpu, dtype: torch.dtype, order: str) -> None:
    """Outputs, plan and workspace are allocated where the query is, by its library."""
    batch = small_batch(dtype, order=order)
    out, lse = ops.paged_attention(*arguments(any_gpu, batch), return_lse=True)
    check(batch, any_gpu.download(out), any_gpu.download(lse))


def test_attention_options(gpu: ShimGpu) -> None:
    batch = small_batch(torch.float32, window=9)
    options = {"scale": 0.3, "window": 9}
    out = gpu.empty((6, 4, 64), torch.float32)
    rows = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    table = torch.zeros_like(batch.block_table)
    table[rows.long()] = batch.block_table
    args = arguments(gpu, batch)
    args[3] = gpu.upload(table)
    assert ops.paged_attention(*args, out=out, block_table_rows=gpu.upload(rows), **options) is out
    check(batch, gpu.download(out), **options)


def test_attention_features(gpu: ShimGpu) -> None:
    batch = small_batch(heads=(8, 2))
    options = features("softcap", "alibi_slopes", "sinks")
    on_device = {name: gpu.upload(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out, lse = ops.paged_attention(*arguments(gpu, batch), return_lse=True, **on_device)
    check(batch, gpu.download(out), gpu.download(lse), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_states(any_gpu: ShimGpu, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Outputs are allocated where the states are; the CPU's to the last bit but one."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(7, 3, n, generator=generator).squeeze(-1) for n in (40, 1, 40, 1)]
    states = [t.to(dtype) if t.ndim == 3 else t for t in states]
    sinks = torch.randn(3, generator=generator)
    got = ops.merge_states(*(any_gpu.upload(t) for t in states), any_gpu.upload(sinks))
    monkeypatch.undo()
    for a, b in zip(got, ops.merge_states(*states, sinks), strict=True):
        torch.testing.assert_close(any_gpu.download(a), b)


def workspace_size(batch: Batch, device: Any = 0) -> int:
    num_tokens, num_heads, head_dim = batch.query.shape
    return ops.attention_workspace_size(
        num_tokens, len(batch.seq_lens), num_heads, batch.k_cache.shape[1], head_dim, dtype="bfloat16", device=device
    )


def test_plan_and_workspace_of_ones_own(any_gpu: ShimGpu) -> None:
    """One plan for two layers; the same bits as when they are left out."""
    gpu = any_gpu
    layers = [small_batch(seed=seed) for seed in range(2)]
    plan = ops.plan_attention(gpu.upload(layers[0].seq_lens), gpu.upload(layers[0].query_start_loc), **step(layers[0]))
    workspace = gpu.empty((workspace_size(layers[0]),), torch.uint8)
    for batch in layers:
        args = arguments(gpu, batch)
        out = ops.paged_attention(*args, plan=plan, workspace=workspace, max_query_len=3)
        alone = ops.paged_attention(*args, max_query_len=3)
        check(batch, gpu.download(out))
        assert torch.equal(gpu.download(out), gpu.download(alone))


def test_workspace_has_room_for_a_plan(gpu: ShimGpu) -> None:
    batch = small_batch()
    workspace = gpu.empty((workspace_size(batch),), torch.uint8)
    check(batch, gpu.download(ops.paged_attention(*arguments(gpu, batch), workspace=workspace)))


def test_sizes_come_from_shapes(gpu: ShimGpu) -> None:
    assert ops.attention_workspace_size(64, 64, 8, 2, 128, device="cpu") == 0
    assert ops.attention_plan_size(64, 64, 8, 2, 128, device="cpu") == 0
    sizes = [ops.attention_plan_size(n, n, 8, 2, 128) for n in (1, 64, 4096)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]
    assert ops.attention_workspace_size(64, 64, 8, 2, 128) > ops.attention_plan_size(64, 64, 8, 2, 128) > 0
    assert ops.attention_workspace_size(64, 64, 8, 2, 100) == 0  # the generic kernel needs none


@pytest.mark.parametrize(
    ("name", "made", "expected"),
    [
        ("workspace", lambda gpu: gpu.empty((16,), torch.uint8), r"^workspace: expected \d+ bytes or more, got 16"),
        ("plan", lambda gpu: gpu.empty((4,), torch.int32), r"^plan: expected \d+ bytes or more, got 16"),
        (
            "workspace",
            lambda gpu: gpu.upload(torch.empty(1 << 20, dtype=torch.uint8)[8:]),
            "^workspace: expected memory on 16 bytes",
        ),
        (
            "workspace",
            lambda gpu: gpu.upload(torch.empty(1 << 10, 1 << 11, dtype=torch.uint8)[:, : 1 << 10]),
            "^workspace: expected contiguous memory, got stride 2048 on axis 0",
        ),
    ],
)
def test_memory_that_does_not_do(gpu: ShimGpu, name: str, made: Any, expected: str) -> None:
    with pytest.raises(InvalidArgumentError, match=expected):
        ops.paged_attention(*arguments(gpu, small_batch()), **{name: made(gpu)})


def test_memory_that_is_an_argument_too(gpu: ShimGpu) -> None:
    batch = small_batch()
    args, lse = arguments(gpu, batch), gpu.empty(tuple(batch.query.shape[:2]), torch.float32)
    with pytest.raises(InvalidArgumentError, match=r"^workspace: expected memory apart from k_cache"):
        ops.paged_attention(*args, workspace=args[1])
    for name in ("plan", "workspace"):
        with pytest.raises(InvalidArgumentError, match=f"^{name}: expected memory apart from lse"):
            ops.paged_attention(*args, lse=lse, **{name: lse})


def test_launches_are_captured_and_replayed(gpu: ShimGpu) -> None:
    """As a CUDA graph: planned and launched once, run at other lengths. No host read of device memory, or it faults."""
    batch = make_batch([200, 60, 90], [1, 1, 1], dtype=torch.bfloat16)
    args = arguments(gpu, batch)
    out = gpu.empty((3, 4, 64), torch.bfloat16)
    workspace = gpu.empty((workspace_size(batch),), torch.uint8)
    ops.warmup("cuda")
    replay = gpu.record(lambda: ops.paged_attention(*args, out=out, workspace=workspace, max_query_len=1))
    for lengths in ([200, 60, 90], [1, 0, 17], [0, 0, 0]):
        batch.seq_lens[:] = torch.tensor(lengths, dtype=torch.int32)
        gpu.write(args[4], batch.seq_lens)
        replay()
        check(batch, gpu.download(out))


# ----------------------------------------------------------------------------------------------- device and stream


@pytest.mark.shim_only
@pytest.mark.parametrize("op", OPS)
def test_its_own_device_and_stream(any_gpu: ShimGpu, op: str) -> None:
    """The tensors' device is current while an op is launched, and the library's stream is taken."""
    gpu = any_gpu
    if gpu.way == "exchange api":
        gpu.shim.set_stream(0x5000)
    streams = {"exchange api": 0x5000, "array interface": 1, "attributes": 0x7001}
    function, given = calls(gpu, 1)[op]
    for name in ("out", "lse", "workspace"):  # what an op allocates is on that device too
        if op != "gather_blocks":
            given.pop(name, None)
    function(**given)
    assert gpu.shim.last_device() == 1
    assert gpu.shim.current_device() == 0  # as before
    assert gpu.shim.last_stream() == streams[gpu.way]
    if gpu.way == "exchange api":
        assert gpu.shim.stream_asked_for() == 1


@pytest.mark.shim_only
@pytest.mark.parametrize("op", OPS)
def test_one_device_for_all(gpu: ShimGpu, op: str) -> None:
    """Each argument in turn on another device, or on the CPU: the message names it."""
    here, there = calls(gpu, 0)[op], calls(gpu, 1)[op]
    function, given = here
    names = [name for name, value in given.items() if isinstance(value, gpu.tensor_class)]
    assert len(names) > 1
    for name in names:
        host = torch.zeros(given[name].like.shape, dtype=given[name].like.dtype)
        for stranger, where in ((there[1][name], "cuda:1"), (host, "the CPU")):
            with pytest.raises(InvalidArgumentError, match=r"expected a tensor on .* \(as \w+ is\)") as caught:
                function(**{**given, name: stranger})
            message = str(caught.value)
            if name not in (
                "query",
                "seq_lens",
                "key",
                "kv",
                "table",
                "o_a",
            ):  # the first one of a call is what others follow
                assert message.startswith(f"{name}: expected a tensor on cuda:0")
                assert message.endswith(f"got one on {where}")
            else:
                assert where in message


# -------------------------------------------------------------------------------------------------- moving bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache_ops_do_what_they_do_on_the_cpu(any_gpu: ShimGpu, dtype: torch.dtype) -> None:
    gpu = any_gpu
    torch.manual_seed(0)
    caches = [torch.randn(6, 4, 2, 8).to(dtype).transpose(1, 2) for _ in range(2)]  # tokens before heads
    key, value = torch.randn(5, 2, 8).to(dtype), torch.randn(5, 2, 8).to(dtype)
    slots = torch.tensor([0, 7, -1, 23, 12])
    pairs = torch.tensor([[1, 2], [4, 5]], dtype=torch.int32)
    blocks = torch.tensor([4, 0, 3], dtype=torch.int32)
    table = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    updates = torch.tensor([[0, 3, 70], [2, 0, 71]], dtype=torch.int32)
    size = blocks.numel() * 2 * caches[0][0].nbytes

    def run(kv: list[Any], put: Any, staging: Any) -> tuple[Any, Any]:
        on = put(table)
        ops.reshape_and_cache(put(key), put(value), *kv, put(slots))
        ops.copy_blocks(kv, put(pairs))
        ops.gather_blocks(kv, put(blocks), staging)
        ops.zero_blocks(kv, put(blocks))
        ops.scatter_blocks(kv[:1], put(blocks.flip(0).contiguous()), put(torch.ones(size // 2, dtype=torch.uint8)))
        ops.update_block_table(on, put(updates))
        return staging, on

    theirs = [gpu.upload(cache) for cache in caches]
    staging, on = run(theirs, gpu.upload, gpu.empty((size,), torch.uint8))
    with pytest.MonkeyPatch.context() as on_the_cpu:
        on_the_cpu.setattr(ops, "_kernels", gpu.kernels)
        host_staging, host_table = run(caches, lambda tensor: tensor.clone(), torch.empty(size, dtype=torch.uint8))
    for got, want in zip(theirs, caches, strict=True):
        assert torch.equal(gpu.download(got), want)
    assert torch.equal(gpu.download(staging), host_staging)
    assert torch.equal(gpu.download(on), host_table)


# ------------------------------------------------------------------------------------------------- indices out of range


def test_bad_indices_are_masked_and_flagged(gpu: ShimGpu) -> None:
    batch = small_batch()
    assert ops.device_errors("cuda:0") == []
    args = arguments(gpu, batch)
    ops.paged_attention(*args)
    assert ops.device_errors(0) == []

    batch.block_table[1, 0] = 1 << 20
    gpu.write(args[3], batch.block_table)
    ops.paged_attention(*args)
    assert ops.device_errors(0) == ["a block id outside of [0, num_blocks)"]
    assert ops.device_errors(0) == []  # told once
    assert all(ops.device_errors(other) == [] for other in range(1, gpu.num_devices))
    assert ops.device_errors("cpu") == []

    batch.block_table[1, 0] = 0
    gpu.write(args[3], batch.block_table)
    batch.seq_lens[0] = 1 << 16
    gpu.write(args[4], batch.seq_lens)
    ops.paged_attention(*args)
    assert ops.device_errors(0)[-1].startswith("a sequence longer than its row of the block table")

    batch.seq_lens[0] = 1
    gpu.write(args[4], batch.seq_lens)
    batch.query_start_loc[-1] += 1
    gpu.write(args[5], batch.query_start_loc)
    ops.paged_attention(*args)
    assert ops.device_errors(0)[-1].startswith("query starts")


def test_every_op_flags(gpu: ShimGpu) -> None:
    device = gpu.num_devices - 1

    def flagged(op: str, name: str, value: torch.Tensor) -> list[str]:
        function, given = calls(gpu, device)[op]
        function(**{**given, name: gpu.upload(value, device)})
        return ops.device_errors(f"cuda:{device}")

    assert flagged("reshape_and_cache", "slot_mapping", torch.tensor([4, -1, 20])) == ["a slot past the cache"]
    ids = torch.tensor([1, 5], dtype=torch.int32)
    for op in ("zero_blocks", "gather_blocks", "scatter_blocks"):
        assert flagged(op, "blocks", ids) == ["a block id outside of [0, num_blocks)"]
    assert flagged("copy_blocks", "pairs", torch.tensor([[1, -1]], dtype=torch.int32)) == [
        "a block id outside of [0, num_blocks)"
    ]
    assert flagged("update_block_table", "updates", torch.tensor([[4, 0, 1]], dtype=torch.int32)) == [
        "a change of a block table outside of it"
    ]

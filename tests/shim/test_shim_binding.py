"""pagedcore.ops on a GPU, which here is the host shim: how tensors come in, which device and stream a call takes, what
is refused, and that results are those of the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import gpus
import pytest
import torch
from cuda_gpu import CudaGpu, settled_errors
from gpus import ShimGpu, TorchGpu
from pagedcore import ops, tensors
from pagedcore.errors import InvalidArgumentError, UnsupportedError
from reference import Batch, check, features, make_batch


def make_gpu(shim: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShimGpu]:
    """The shim, or the GPU that is in its place, which has the same methods."""
    if isinstance(shim, CudaGpu):
        settled_errors(0)
        monkeypatch.setattr(ops, "device_errors", partial(settled_errors, device_errors=ops.device_errors))
        yield TorchGpu()  # type: ignore[misc]
        return
    gpu = ShimGpu(shim, way)
    monkeypatch.setattr(ops, "_kernels", gpu.kernels)
    monkeypatch.setattr(tensors, "array_module", lambda like: SimpleNamespace(empty=empty_like_cupy(gpu)))
    # Where no API tells the current stream, these are asked.
    torch_cuda, cupy_cuda = ModuleType("torch.cuda"), ModuleType("cupy.cuda")
    torch_cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=0x7000 + device)  # type: ignore[attr-defined]
    cupy_cuda.get_current_stream = lambda: SimpleNamespace(ptr=0x8000)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.cuda", torch_cuda)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy_cuda)
    ops.device_errors(0)
    ops.device_errors(1)
    shim.set_stream(0)
    shim.set_seed(0)
    yield gpu
    gpu.close()


def empty_like_cupy(gpu: ShimGpu) -> Any:
    return lambda shape, dtype: gpu.empty(shape, getattr(torch, dtype), gpus.CupyDevice.current)


@pytest.fixture
def gpu(plain_shim: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShimGpu]:
    yield from make_gpu(plain_shim, "exchange api", monkeypatch)


@pytest.fixture(params=gpus.WAYS)
def any_gpu(plain_shim: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[ShimGpu]:
    yield from make_gpu(plain_shim, request.param, monkeypatch)


def arguments(gpu: ShimGpu, batch: Batch, device: int = 0) -> list[Any]:
    """The positional arguments of attention, on the GPU."""
    sources = (batch.query, batch.k_cache, batch.v_cache, batch.block_table, batch.seq_lens, batch.query_start_loc)
    return [gpu.upload(source, device) for source in sources]


def small_batch(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Batch:
    return make_batch([5, 40, 0, 17], [1, 3, 1, 1], dtype=dtype, **options)


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


def step(batch: Batch) -> dict[str, Any]:
    """What a plan is made from."""
    num_tokens, num_heads, head_dim = batch.query.shape
    return {
        "num_heads": num_heads,
        "num_kv_heads": batch.k_cache.shape[1],
        "head_dim": head_dim,
        "max_query_len": 3,
        "num_tokens": num_tokens,
        "dtype": batch.query.dtype,
    }


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
    args = arguments(gpu, small_batch())
    with pytest.raises(InvalidArgumentError, match=r"^workspace: expected memory apart from k_cache"):
        ops.paged_attention(*args, workspace=args[1])


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


def calls(gpu: ShimGpu, device: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every op with tensors for all of its arguments, by name."""
    batch = small_batch()
    names = ("query", "k_cache", "v_cache", "block_table", "seq_lens", "query_start_loc")
    attention: dict[str, Any] = dict(zip(names, arguments(gpu, batch, device), strict=True))
    rows = torch.arange(4, dtype=torch.int32)
    attention |= {
        "out": gpu.empty((6, 4, 64), torch.bfloat16, device),
        "lse": gpu.empty((6, 4), torch.float32, device),
        "block_table_rows": gpu.upload(rows, device),
        "alibi_slopes": gpu.upload(torch.zeros(4), device),
        "sinks": gpu.upload(torch.zeros(4), device),
        "workspace": gpu.empty((1 << 20,), torch.uint8, device),
        "plan": gpu.empty((1 << 12,), torch.uint8, device),
    }
    cache = torch.randn(5, 2, 4, 8)
    write = {
        "key": gpu.upload(torch.randn(3, 2, 8), device),
        "value": gpu.upload(torch.randn(3, 2, 8), device),
        "k_cache": gpu.upload(cache, device),
        "v_cache": gpu.upload(cache, device),
        "slot_mapping": gpu.upload(torch.tensor([4, -1, 9]), device),
    }
    kv = gpu.upload(cache, device)
    ids = gpu.upload(torch.tensor([1, 3], dtype=torch.int32), device)
    staged = gpu.empty((2, cache[0].nbytes), torch.uint8, device)
    return {
        "paged_attention": (ops.paged_attention, attention),
        "plan_attention": (
            ops.plan_attention,
            {name: attention[name] for name in ("seq_lens", "query_start_loc")}
            | {"out": gpu.empty((1 << 12,), torch.uint8, device)}
            | step(batch),
        ),
        "reshape_and_cache": (ops.reshape_and_cache, write),
        "merge_states": (
            ops.merge_states,
            {name: gpu.upload(torch.randn(3, 2, 8), device) for name in ("o_a", "o_b")}
            | {name: gpu.upload(torch.randn(3, 2), device) for name in ("lse_a", "lse_b")}
            | {"sinks": gpu.upload(torch.zeros(2), device)},
        ),
        "copy_blocks": (
            ops.copy_blocks,
            {"kv": kv, "pairs": gpu.upload(torch.tensor([[1, 2]], dtype=torch.int32), device)},
        ),
        "zero_blocks": (ops.zero_blocks, {"kv": kv, "blocks": ids}),
        "gather_blocks": (ops.gather_blocks, {"kv": kv, "blocks": ids, "out": staged}),
        "scatter_blocks": (ops.scatter_blocks, {"kv": kv, "blocks": ids, "src": staged}),
        "update_block_table": (
            ops.update_block_table,
            {
                "table": gpu.upload(torch.zeros(4, 3, dtype=torch.int32), device),
                "updates": gpu.upload(torch.tensor([[1, 2, 7]], dtype=torch.int32), device),
            },
        ),
    }


OPS = (
    "paged_attention",
    "plan_attention",
    "reshape_and_cache",
    "merge_states",
    "copy_blocks",
    "zero_blocks",
    "gather_blocks",
    "scatter_blocks",
    "update_block_table",
)


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


@pytest.mark.shim_only
def test_stream_of_an_array_interface(plain_shim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may name one; CuPy is asked where it does not."""
    for stream, taken in ((None, 0x8000), (0x6000, 0x6000)):
        for gpu in make_gpu(plain_shim, "array interface", monkeypatch):
            table = gpu.upload(torch.zeros(2, 2, dtype=torch.int32), stream=stream)
            ops.update_block_table(table, gpu.upload(torch.tensor([[0, 1, 5]], dtype=torch.int32)))
            assert gpu.shim.last_stream() == taken


# ----------------------------------------------------------------------------------------------------- what comes in


@pytest.mark.shim_only
def test_kinds_of_memory(gpu: ShimGpu) -> None:
    """Managed memory is its device's; pinned host memory is the CPU's; another vendor's is refused."""
    blocks = gpu.upload(torch.tensor([1], dtype=torch.int32), device_type=gpus.MANAGED)
    kv = gpu.upload(torch.ones(3, 8), device_type=gpus.MANAGED)
    ops.zero_blocks(kv, blocks)
    assert gpu.download(kv)[1].sum() == 0
    with pytest.raises(InvalidArgumentError, match=r"^blocks: expected a tensor on cuda:0 .*, got one on the CPU"):
        ops.zero_blocks(kv, gpu.upload(torch.tensor([1], dtype=torch.int32), device_type=gpus.CUDA_HOST))
    with pytest.raises(InvalidArgumentError, match=r"^kv: expected .* a CUDA device, got one on DLPack device type 10"):
        ops.zero_blocks(gpu.upload(torch.ones(3, 8), device_type=gpus.ROCM), blocks)


@pytest.mark.shim_only
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": object()}, "expected an array without a mask"),
        ({"typestr": ">f4"}, "expected dtype .*, got typestr '>f4'"),
        ({"typestr": "<f8"}, "expected dtype .*, got typestr '<f8'"),
        ({"typestr": "<c8"}, "expected dtype .*, got typestr '<c8'"),
        ({"strides": (30, 4)}, "expected strides that are multiples of the element size, got 30 bytes"),
        ({"shape": (-1, 8)}, "expected sizes of 0 or more, got -1"),
        ({"shape": (1,) * 7}, "expected at most 6 dimensions, got 7"),
        ({"data": (0, False)}, "expected a tensor with memory behind it"),
        ({"data": (4099, False)}, "expected memory aligned to its element size"),
    ],
)
def test_array_interfaces_that_do_not_do(
    plain_shim: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    for gpu in make_gpu(plain_shim, "array interface", monkeypatch):
        with pytest.raises(InvalidArgumentError, match=f"^kv: {message}"):
            ops.zero_blocks(gpu.upload(torch.ones(3, 8), **changes), gpu.upload(torch.ones(1, dtype=torch.int32)))


@pytest.mark.shim_only
def test_read_only_arrays(plain_shim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu in make_gpu(plain_shim, "array interface", monkeypatch):
        kv = gpu.upload(torch.ones(3, 8))
        kv.changes["data"] = (kv.pointer, True)
        with pytest.raises(InvalidArgumentError, match=r"^kv: expected writable memory"):
            ops.zero_blocks(kv, gpu.upload(torch.ones(1, dtype=torch.int32)))


@pytest.mark.shim_only
def test_other_devices_of_torch(plain_shim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu in make_gpu(plain_shim, "attributes", monkeypatch):
        kv = gpu.upload(torch.ones(3, 8), device_type="xpu")
        with pytest.raises(
            InvalidArgumentError, match=r"^kv: expected a tensor on the CPU or a CUDA device, got .* xpu"
        ):
            ops.zero_blocks(kv, gpu.upload(torch.ones(1, dtype=torch.int32)))
        doubles = gpu.upload(torch.ones(3, 8))
        doubles.dtype = torch.float64
        with pytest.raises(InvalidArgumentError, match=r"^kv: expected dtype .*, got dtype torch\.float64"):
            ops.zero_blocks(doubles, gpu.upload(torch.ones(1, dtype=torch.int32)))


def test_what_only_the_cpu_does(gpu: ShimGpu) -> None:
    with pytest.raises(UnsupportedError, match=r"^tensor: expected a tensor on the CPU, got one on cuda:0"):
        gpu.kernels.read_range(gpu.upload(torch.ones(64)))


def test_blocks_of_too_many_runs(gpu: ShimGpu) -> None:
    kv = gpu.upload(torch.zeros(4, 3, 2, 5, 2, 8)[:, :, :, 1:3, :, 1:5])
    with pytest.raises(InvalidArgumentError, match=r"^kv: expected blocks whose memory is at most two axes"):
        ops.zero_blocks(kv, gpu.upload(torch.ones(1, dtype=torch.int32)))


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


@pytest.mark.shim_only
def test_facts(gpu: ShimGpu) -> None:
    facts = gpu.kernels.gpu_facts()
    assert facts["images"] == "shim"
    assert [device["name"] for device in facts["devices"]] == ["host shim", "host shim"]


@pytest.mark.parametrize("device", ["cuda:x", "tpu", "cuda:-1", None, torch.device("meta")])
def test_devices_that_are_none(gpu: ShimGpu, device: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^device: expected 'cpu', 'cuda' or 'cuda:N'"):
        ops.warmup(device)


def test_names_of_devices(gpu: ShimGpu) -> None:
    for device, index in (("cpu", -1), ("cuda", 0), ("cuda:3", 3), (2, 2), (torch.device("cuda", 1), 1)):
        assert tensors.device_index(device) == index
    assert tensors.device_index(SimpleNamespace(id=4)) == 4
    beyond = gpu.num_devices + 5
    with pytest.raises(RuntimeError, match=rf"device {beyond}|invalid device ordinal"):  # as the shim says it, and CUDA
        ops.warmup(f"cuda:{beyond}")

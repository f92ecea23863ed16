"""How tensors of a GPU library come into `pagedcore.ops`, here of the host shim: kinds of memory, what they say of
themselves, and how devices are named.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gpus
import pytest
import torch
from gpu_calls import make_gpu
from pagedcore import ops, tensors
from pagedcore.errors import InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from gpus import ShimGpu


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


@pytest.mark.shim_only
def test_stream_of_an_array_interface(plain_shim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may name one; CuPy is asked where it does not."""
    for stream, taken in ((None, 0x8000), (0x6000, 0x6000)):
        for gpu in make_gpu(plain_shim, "array interface", monkeypatch):
            table = gpu.upload(torch.zeros(2, 2, dtype=torch.int32), stream=stream)
            ops.update_block_table(table, gpu.upload(torch.tensor([[0, 1, 5]], dtype=torch.int32)))
            assert gpu.shim.last_stream() == taken


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

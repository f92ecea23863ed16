"""GPUs that the tests of the binding run on, and tensors on them.

`ShimGpu` is the host shim: its module holds the ops of pagedcore._kernels over its own device memory, and tensors that
are told like a GPU library's, in each of the ways that the binding knows. `TorchGpu` is a real one, with torch's own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

CODES = {  # DLPack's type code, bits, and the typestr of __cuda_array_interface__
    torch.float32: (2, 32, "<f4"),
    torch.float16: (2, 16, "<f2"),
    torch.bfloat16: (4, 16, "<V2"),
    torch.int32: (0, 32, "<i4"),
    torch.int64: (0, 64, "<i8"),
    torch.uint8: (1, 8, "|u1"),
    torch.bool: (6, 8, "|b1"),
    torch.float8_e4m3fn: (10, 8, "|V1"),
}
WAYS = ("exchange api", "array interface", "attributes")
CUDA, CUDA_HOST, ROCM, MANAGED = 2, 3, 10, 13  # DLPack's device types


class ShimGpu:
    """Tensors are shown in one of `WAYS`. Memory is freed by `close`."""

    num_devices = 2

    def __init__(self, shim: Any, way: str = "exchange api") -> None:
        self.shim = shim
        self.kernels = shim.kernels
        self.way = way
        self.addresses: list[int] = []
        self._parts: Any = None  # of a recording under way
        self._recording: Any = None
        self.tensor_class = {
            "exchange api": exchange_tensor_class(self),
            "array interface": interface_tensor_class(self),
            "attributes": attributes_tensor_class(self),
        }[way]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: int = 0, **options: Any) -> Any:
        """Full of NaN. `options` go to the class of tensors."""
        like = torch.empty(shape, dtype=dtype)
        address = self.shim.allocate(max(like.nbytes, 1))
        self.addresses.append(address)
        return self.tensor_class(address, like, device, **options)

    def upload(self, tensor: torch.Tensor, device: int = 0, **options: Any) -> Any:
        """A copy of the tensor's whole storage, so that its strides stay true."""
        storage = tensor.untyped_storage()
        address = self.shim.allocate(max(storage.nbytes(), 1))
        self.addresses.append(address)
        self.shim.copy_to_device(address, storage.data_ptr(), storage.nbytes())
        return self.tensor_class(address, tensor, device, **options)

    def write(self, to: Any, tensor: torch.Tensor) -> None:
        """Replaces the elements of a dense tensor on the device."""
        self.shim.copy_to_device(to.address, tensor.contiguous().data_ptr(), tensor.nbytes)

    def download(self, tensor: Any) -> torch.Tensor:
        like = tensor.like
        storage = torch.empty(like.untyped_storage().nbytes() // like.element_size(), dtype=like.dtype)
        self.shim.copy_to_host(storage.data_ptr(), tensor.address, storage.nbytes)
        return storage.as_strided(like.shape, like.stride(), like.storage_offset())

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Records the launches of a step, which are not run; the result runs them, with what is in memory then."""
        parts: list[Callable[[], None]] = []
        self._parts = parts
        self._recording = self.shim.Recording()
        step()
        self._end_part()
        self._parts = None

        def replay() -> None:
            for part in parts:
                part()

        return replay

    def between_launches(self, work: Callable[[], None]) -> None:
        """Runs what a tensor library does on its device, or records it."""
        if self._parts is None:
            work()
        else:
            self._end_part()
            self._parts.append(work)
            self._recording = self.shim.Recording()

    def _end_part(self) -> None:
        self._recording.stop()
        self._parts.append(self._recording.replay)

    def allocations(self) -> int:
        """How often memory was taken so far."""
        return len(self.addresses)

    def close(self) -> None:
        for address in self.addresses:
            self.shim.release(address)
        self.addresses.clear()


class TorchGpu:
    """The current CUDA device, with the same methods."""

    way = WAYS[0]
    tensor_class = torch.Tensor

    def __init__(self) -> None:
        from pagedcore import _kernels  # the shim's own runs need no package

        self.kernels = _kernels
        self.num_devices = torch.cuda.device_count()
        self._own = 0  # allocations that torch makes to begin a recording: its generator's state, for one

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: int = 0) -> torch.Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        return torch.full((count,), 0xFF, dtype=torch.uint8, device=f"cuda:{device}").view(dtype).view(shape)

    def upload(self, tensor: torch.Tensor, device: int = 0) -> torch.Tensor:
        flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return flat.cuda(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def write(self, to: torch.Tensor, tensor: torch.Tensor) -> None:
        to.copy_(tensor)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        before = self.allocations()
        with torch.cuda.graph(graph):
            self._own += self.allocations() - before
            step()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay

    def allocations(self) -> int:
        count: int = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
        return count - self._own

    def close(self) -> None:
        """Nothing is kept."""


class TensorFacts:
    """What tests and allocation ask of every tensor here."""

    gpu: ShimGpu
    address: int  # of the storage
    like: torch.Tensor  # on the CPU, with the same shape, strides, storage offset and dtype

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """In bytes, as CuPy's arrays have them."""
        return tuple(stride * self.like.element_size() for stride in self.like.stride())

    @property
    def pointer(self) -> int:
        return self.address + self.like.storage_offset() * self.like.element_size()


def exchange_tensor_class(gpu: ShimGpu) -> type:
    class ExchangeTensor(gpu.shim.DeviceTensor, TensorFacts):  # type: ignore[misc, name-defined]
        def __init__(self, address: int, like: torch.Tensor, device: int, device_type: int = CUDA) -> None:
            code, bits, _ = CODES[like.dtype]
            first = address + like.storage_offset() * like.element_size()
            super().__init__(first, list(like.shape), list(like.stride()), code, bits, device_type, device)
            self.gpu, self.address, self.like = gpu, address, like
            self.dtype, self.device = like.dtype, SimpleNamespace(type="cuda", index=device)

        def __getitem__(self, slices: Any) -> Any:
            return ExchangeTensor(self.address, self.like[slices], self.device.index)

        def new_empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Any:
            return gpu.empty(shape, dtype or self.dtype, self.device.index)

    return ExchangeTensor


class CupyDevice:
    """A device of CuPy: a context in which it is current."""

    current = 0

    def __init__(self, number: int) -> None:
        self.id = number

    def __enter__(self) -> None:
        self.earlier, CupyDevice.current = CupyDevice.current, self.id

    def __exit__(self, *error: object) -> None:
        CupyDevice.current = self.earlier


def interface_tensor_class(gpu: ShimGpu) -> type:
    class InterfaceTensor(TensorFacts):
        """As CuPy's arrays."""

        def __init__(
            self, address: int, like: torch.Tensor, device: int, stream: int | None = 1, **changes: Any
        ) -> None:
            self.gpu, self.address, self.like = gpu, address, like
            self.dtype, self.device = str(like.dtype).removeprefix("torch."), CupyDevice(device)
            self.changes = {"stream": stream, **changes}

        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            size = self.like.element_size()
            dense = self.like.is_contiguous()
            return {
                "shape": tuple(self.like.shape),
                "strides": None if dense else tuple(stride * size for stride in self.like.stride()),
                "typestr": CODES[self.like.dtype][2],
                "data": (self.pointer, False),
                "version": 3,
                **self.changes,
            }

    return InterfaceTensor


def attributes_tensor_class(gpu: ShimGpu) -> type:
    class AttributesTensor(TensorFacts):
        """As the tensors of a torch without the exchange API."""

        def __init__(self, address: int, like: torch.Tensor, device: int, device_type: str = "cuda") -> None:
            self.gpu, self.address, self.like = gpu, address, like
            self.dtype, self.device = like.dtype, SimpleNamespace(type=device_type, index=device)

        def data_ptr(self) -> int:
            return self.pointer

        def stride(self) -> tuple[int, ...]:
            return self.like.stride()

        def new_empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Any:
            return gpu.empty(shape, dtype or self.dtype, self.device.index)

    return AttributesTensor

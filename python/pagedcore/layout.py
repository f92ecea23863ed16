"""How KV data lies in memory: `KVCacheLayout` declares it, `KVCache` holds it.

A layout is plain arithmetic: for each layer the byte offset of its K and V from the start of the data, and their
strides over (block, head, token). Nothing guesses a layout from a shape, and kernels take any strides, so a pool of
another system is passed as a (transposed) view instead.

Two orders exist. ``"block"``: a block is one contiguous byte range over all layers, so that it moves in one copy.
``"layer"``: each layer has an array of its own, as most servers keep it. Inside, both are (K or V, head, token, dim),
and then, where a quantised cache has a scale for each token, the scales of K and those of V (head, token).
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pagedcore.errors import InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}  # every dtype that KV data and models may have
FP8 = "fp8_e4m3"  # the format of a cache of 8-bit codes
GRANULARITIES = ("tensor", "head", "token")  # what a scale of a quantised cache is of
MAX_HEAD_DIM = 256  # the widest head that the attention kernels take
_ALIGNMENT = 64  # bytes: K and V of every layer begin on a cache line
_MAX_BYTES = 2**62
_SCALE_SIZE = 4  # bytes of a float32


def dtype_name(dtype: Any) -> str:
    """The canonical name of a KV dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.

    Takes a name, a torch dtype or a NumPy dtype.
    """
    name = (
        dtype
        if isinstance(dtype, str)
        else getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    )
    name = name.removeprefix("torch.")
    if name not in ITEM_SIZES:
        raise InvalidArgumentError(
            f"dtype: expected one of {', '.join(ITEM_SIZES)}, got {dtype!r}",
            argument="dtype",
            got=dtype,
            expected=tuple(ITEM_SIZES),
        )
    return name


@dataclass(frozen=True)
class PageView:
    """Where the K (or V) of one layer lies: ``offset`` in bytes from the start of the data, strides in elements."""

    offset: int
    block_stride: int
    head_stride: int
    token_stride: int
    shape: tuple[int, int, int, int]  # [num_blocks, num_kv_heads, block_size, head_dim]

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Strides in elements over (block, head, token, dim)."""
        return (self.block_stride, self.head_stride, self.token_stride, 1)


@dataclass(frozen=True)
class ScaleView:
    """Where the scales of one layer's K (or V) lie, a float32 for each token: as in `PageView`."""

    offset: int
    block_stride: int
    head_stride: int
    token_stride: int
    shape: tuple[int, int, int]  # [num_blocks, num_kv_heads, block_size]

    @property
    def strides(self) -> tuple[int, int, int]:
        """Strides in elements over (block, head, token)."""
        return (self.block_stride, self.head_stride, self.token_stride)


@dataclass(frozen=True)
class LayerLayout:
    """K and V of one layer; and their scales, where these lie in the blocks' records."""

    k: PageView
    v: PageView
    k_scale: ScaleView | None = None
    v_scale: ScaleView | None = None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_size(name: str, value: Any, most: int = 2**31 - 1) -> None:
    if not _is_int(value):
        raise InvalidArgumentError(
            f"{name}: expected an int, got {value!r}", argument=name, got=value, expected="an int"
        )
    if not 1 <= value <= most:
        expected = "1 to 2**31 - 1" if most == 2**31 - 1 else f"1 to {most}, the widest head that the kernels take"
        raise InvalidArgumentError(
            f"{name}: expected {expected}, got {value}", argument=name, got=value, expected=expected
        )


@dataclass(frozen=True)
class KVCacheLayout:
    """The shape and byte layout of a KV cache; validated when made, immutable after.

    ``layers[i]`` gives offsets and strides of layer i. ``block_bytes`` is what one block takes over all layers,
    ``total_bytes`` what the whole cache takes. ``kv_format="fp8_e4m3"`` keeps 8-bit codes for models of ``dtype``, with
    a scale for a layer's K and V as a whole, for each KV head, or for each token and head (docs/quantisation.md). The
    default, ``"tensor"``, adds nothing to a block and is what a calibrated model brings; an engine, which knows no
    scales, has ``"token"`` for its default.
    """

    num_blocks: int
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
    v_head_dim: int = None  # type: ignore[assignment]  # None becomes head_dim when made
    kv_format: str = "auto"
    scale_granularity: str = "tensor"
    order: str = "block"
    layers: tuple[LayerLayout, ...] = field(init=False, repr=False, compare=False)
    block_bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "num_layers", "num_kv_heads"):
            _require_size(name, getattr(self, name))
        _require_size("head_dim", self.head_dim, MAX_HEAD_DIM)
        given: int | None = self.v_head_dim
        if given is None:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        _require_size("v_head_dim", self.v_head_dim, MAX_HEAD_DIM)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.kv_format not in ("auto", self.dtype, FP8):
            raise UnsupportedError(
                f"kv_format: expected 'auto' (as dtype) or {FP8!r}, got {self.kv_format!r}",
                argument="kv_format",
                got=self.kv_format,
                expected=("auto", FP8),
            )
        if self.scale_granularity not in (GRANULARITIES if self.quantized else ("tensor",)):
            expected = "'tensor', 'head' or 'token'" if self.quantized else f"'tensor' without kv_format={FP8!r}"
            raise UnsupportedError(
                f"scale_granularity: expected {expected}, got {self.scale_granularity!r}",
                argument="scale_granularity",
                got=self.scale_granularity,
                expected=GRANULARITIES if self.quantized else ("tensor",),
            )
        if self.order not in ("block", "layer"):
            raise InvalidArgumentError(
                f"order: expected 'block' or 'layer', got {self.order!r}",
                argument="order",
                got=self.order,
                expected=("block", "layer"),
            )
        parts = self._part_bytes()
        block_bytes = sum(parts) * self.num_layers
        if block_bytes * self.num_blocks > _MAX_BYTES:
            raise InvalidArgumentError(
                f"num_blocks: expected a cache of at most 2**62 bytes, got {block_bytes * self.num_blocks}",
                argument="num_blocks",
                got=self.num_blocks,
                expected=_MAX_BYTES // block_bytes,
            )
        object.__setattr__(self, "block_bytes", block_bytes)
        object.__setattr__(self, "layers", self._place(*parts))

    @property
    def quantized(self) -> bool:
        """Whether the cache holds codes."""
        return self.kv_format == FP8

    @property
    def item_size(self) -> int:
        """Bytes of one element of K or V as it is kept."""
        return 1 if self.quantized else ITEM_SIZES[self.dtype]

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.num_blocks * self.block_bytes

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block of one layer, K and V and what scales lie with them."""
        return self.block_bytes // self.num_layers

    def _part_bytes(self) -> tuple[int, ...]:
        """Bytes of K, of V, and of the scales of each in one layer's block, each up to a whole cache line."""
        elements = self.num_kv_heads * self.block_size
        scales = elements * _SCALE_SIZE if self.quantized and self.scale_granularity == "token" else 0
        parts = (elements * self.head_dim * self.item_size, elements * self.v_head_dim * self.item_size, scales, scales)
        return tuple(-(-size // _ALIGNMENT) * _ALIGNMENT for size in parts)

    def _place(self, k_bytes: int, v_bytes: int, k_scales: int, v_scales: int) -> tuple[LayerLayout, ...]:
        layer_bytes = k_bytes + v_bytes + k_scales + v_scales
        step = self.block_bytes if self.order == "block" else layer_bytes  # bytes from one block to the next
        layers = []
        for i in range(self.num_layers):
            start = i * layer_bytes if self.order == "block" else i * layer_bytes * self.num_blocks

            def page(offset: int, dim: int) -> PageView:
                return PageView(
                    offset=offset,
                    block_stride=step // self.item_size,
                    head_stride=self.block_size * dim,
                    token_stride=dim,
                    shape=(self.num_blocks, self.num_kv_heads, self.block_size, dim),
                )

            def scale(offset: int, size: int) -> ScaleView | None:
                shape = (self.num_blocks, self.num_kv_heads, self.block_size)
                return ScaleView(offset, step // _SCALE_SIZE, self.block_size, 1, shape) if size else None

            k, v = page(start, self.head_dim), page(start + k_bytes, self.v_head_dim)
            at = start + k_bytes + v_bytes
            layers.append(LayerLayout(k, v, scale(at, k_scales), scale(at + k_scales, v_scales)))
        return tuple(layers)

    def allocate(self, device: str = "cpu", library: str = "auto") -> KVCache:
        """Zeroed memory in this layout.

        ``library`` is ``"torch"`` or ``"numpy"``: what the tensors of the cache are. ``"auto"`` takes torch if the
        process has imported it, else NumPy (which has no bfloat16 of its own: the `ml_dtypes` package supplies it).
        ``device`` is ``"cpu"``, or a CUDA device of torch's (``"cuda"``, ``"cuda:1"``, a `torch.device`).
        Raises MemoryError if the memory is not there.
        """
        kind = str(device).partition(":")[0]
        if kind not in ("cpu", "cuda"):
            raise UnsupportedError(
                f"device: expected 'cpu' or 'cuda', got {str(device)!r}",
                argument="device",
                got=str(device),
                expected=("cpu", "cuda"),
            )
        if library == "auto":
            library = "torch" if "torch" in sys.modules else "numpy"
        if library not in ("torch", "numpy"):
            raise InvalidArgumentError(
                f"library: expected 'auto', 'torch' or 'numpy', got {library!r}",
                argument="library",
                got=library,
                expected=("auto", "torch", "numpy"),
            )
        if kind == "cuda":
            if library == "numpy":
                raise UnsupportedError(
                    f"device: expected 'cpu' for NumPy, got {str(device)!r}",
                    argument="device",
                    got=str(device),
                    expected=("cpu",),
                )
            return KVCache(self, _on_gpu(self.total_bytes, device), "torch")
        return KVCache(self, _map_zeroed(self.total_bytes), library)


def _on_gpu(size: int, device: Any) -> Any:
    """Zeroed memory of a GPU: a uint8 tensor."""
    torch = _torch()
    try:
        return torch.zeros(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{size} bytes of KV cache on {device}: {error}") from error
    except (AssertionError, RuntimeError) as error:  # no GPU, no driver, or a torch without CUDA
        raise UnsupportedError(
            f"device: torch cannot use {str(device)!r}: {error}", argument="device", got=str(device), expected=("cpu",)
        ) from error


def _map_zeroed(size: int) -> mmap.mmap:
    """Private zeroed memory, in huge pages where the system has them: fewer page walks per KV read."""
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise MemoryError(f"{size} bytes of KV cache: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages: slower, not wrong
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class KVCache:
    """The memory of a KV cache, and views of it.

    ``data`` is uint8 ``[num_blocks, block_bytes]`` (order ``"block"``) or
    ``[num_layers, num_blocks, layer_block_bytes]`` (order ``"layer"``). All views share the memory, which lives
    as long as any of them.
    """

    def __init__(self, layout: KVCacheLayout, memory: Any, library: str) -> None:
        self.layout = layout
        if layout.order == "block":
            shape: tuple[int, ...] = (layout.num_blocks, layout.block_bytes)
        else:
            shape = (layout.num_layers, layout.num_blocks, layout.layer_block_bytes)
        make = _torch_views if library == "torch" else _numpy_views
        self.data, self._layers, self._scales = make(layout, memory, shape)

    def layer(self, i: int) -> tuple[Any, Any]:
        """``(k_cache, v_cache)`` of layer i, each ``[num_blocks, num_kv_heads, block_size, head_dim]``.

        Of a quantised cache they are float8_e4m3fn with torch, and uint8 with NumPy, which has no such type.
        """
        self._require_layer(i)
        return self._layers[i]

    def scales(self, i: int) -> tuple[Any, Any]:
        """``(k_scale, v_scale)`` of layer i, to be given to the ops with its caches; ``(None, None)`` without codes.

        float32 ``[1]`` or ``[num_kv_heads]``, 1 until they are set, and not part of any block; or
        ``[num_blocks, num_kv_heads, block_size]``, which lie in the blocks.
        """
        self._require_layer(i)
        return self._scales[i]

    def _require_layer(self, i: int) -> None:
        if not _is_int(i) or not 0 <= i < self.layout.num_layers:
            raise InvalidArgumentError(
                f"i: expected a layer in [0, {self.layout.num_layers}), got {i!r}",
                argument="i",
                got=i,
                expected=self.layout.num_layers,
            )

    def block_tensors(self) -> list[Any]:
        """Tensors whose first axis is the block and which cover every byte once: what copying and zeroing work on."""
        return [self.data] if self.layout.order == "block" else list(self.data)

    def __repr__(self) -> str:
        return f"KVCache({self.layout!r}, {self.layout.total_bytes / 2**20:.1f} MiB)"


_Pairs = list[tuple[Any, Any]]


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError(
            "library: expected one that is installed, got 'torch'",
            argument="library",
            got="torch",
            hint="pip install 'pagedcore[torch]'",
        ) from error
    return torch


def _torch_views(layout: KVCacheLayout, memory: Any, shape: tuple[int, ...]) -> tuple[Any, _Pairs, _Pairs]:
    torch = _torch()
    flat = memory if isinstance(memory, torch.Tensor) else torch.frombuffer(memory, dtype=torch.uint8)
    elements = flat.view(torch.float8_e4m3fn if layout.quantized else getattr(torch, layout.dtype))

    def view(page: PageView) -> Any:
        return elements.as_strided(page.shape, page.strides, page.offset // layout.item_size)

    def scale(place: ScaleView | None) -> Any:
        if place is None:
            return _shared_scales(layout, lambda count: torch.ones(count, dtype=torch.float32, device=flat.device))
        return flat.view(torch.float32).as_strided(place.shape, place.strides, place.offset // _SCALE_SIZE)

    return flat.view(shape), *_pairs(layout, view, scale)


def _numpy_views(layout: KVCacheLayout, memory: mmap.mmap, shape: tuple[int, ...]) -> tuple[Any, _Pairs, _Pairs]:
    import numpy as np

    dtype: Any = layout.dtype
    if layout.quantized:
        dtype = np.uint8
    elif layout.dtype == "bfloat16":
        try:
            from ml_dtypes import bfloat16
        except ImportError as error:
            raise UnsupportedError(
                "dtype: expected float32 or float16 for NumPy without ml_dtypes, got 'bfloat16'",
                argument="dtype",
                got="bfloat16",
                expected=("float32", "float16"),
                hint="pip install ml_dtypes, or library='torch'",
            ) from error
        dtype = bfloat16

    def view(page: PageView | ScaleView, kind: Any = dtype, size: int = layout.item_size) -> Any:
        return np.ndarray(page.shape, kind, memory, page.offset, tuple(stride * size for stride in page.strides))

    def scale(place: ScaleView | None) -> Any:
        if place is None:
            return _shared_scales(layout, lambda count: np.ones(count, np.float32))
        return view(place, np.float32, _SCALE_SIZE)

    return np.ndarray(shape, np.uint8, memory), *_pairs(layout, view, scale)


def _shared_scales(layout: KVCacheLayout, ones: Callable[[int], Any]) -> Any:
    """Scales that are no block's: one, or one a head; None for a cache without codes."""
    if not layout.quantized:
        return None
    return ones(1 if layout.scale_granularity == "tensor" else layout.num_kv_heads)


def _pairs(
    layout: KVCacheLayout, view: Callable[[PageView], Any], scale: Callable[[ScaleView | None], Any]
) -> tuple[_Pairs, _Pairs]:
    """(K, V) of every layer, and their scales."""
    return (
        [(view(layer.k), view(layer.v)) for layer in layout.layers],
        [(scale(layer.k_scale), scale(layer.v_scale)) for layer in layout.layers],
    )

"""In which form an engine keeps K and V: the model's dtype, or 8-bit codes with their scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcore.errors import InvalidArgumentError
from pagedcore.layout import FP8, KVCacheLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedcore.layout import KVCache
    from pagedcore.models import LoadedModel


def make_layout(
    model: LoadedModel, num_blocks: int, block_size: int, kv_format: str, scale_granularity: str | None
) -> KVCacheLayout:
    """The layout of the model's KV cache. Without a granularity codes have a scale for each token and head: those are
    made as K and V are written, so that nothing need be known of the model.
    """
    shape = model.layers[0]
    return KVCacheLayout(
        num_blocks,
        block_size,
        len(model.layers),
        shape.num_kv_heads,
        shape.head_dim,
        model.dtype,
        v_head_dim=shape.v_head_dim,
        kv_format=kv_format,
        scale_granularity=scale_granularity or ("token" if kv_format == FP8 else "tensor"),
    )


def check_scales(layout: KVCacheLayout, kv_scales: Any) -> list[NDArray[np.float32]] | None:
    """The scales of K and of V, float32 ``[num_layers]`` (granularity "tensor") or ``[num_layers, num_kv_heads]``
    ("head"), which the caller gives as a pair; None where `reshape_and_cache` makes them, or there are none.
    """
    if not layout.quantized or layout.scale_granularity == "token":
        if kv_scales is not None:
            kind = "scales are made of each token" if layout.quantized else "the cache holds no codes"
            raise InvalidArgumentError(f"kv_scales: expected None, as {kind}, got a value", argument="kv_scales")
        return None
    shape = (layout.num_layers, *((layout.num_kv_heads,) if layout.scale_granularity == "head" else ()))
    expected = f"a pair, of K and of V, of positive finite scales {list(shape)}"
    if kv_scales is None:
        raise InvalidArgumentError(
            f"kv_scales: expected {expected} for scale_granularity={layout.scale_granularity!r}, got None",
            hint="scale_granularity='token' needs none",
            argument="kv_scales",
            expected=shape,
        )
    try:
        with np.errstate(over="ignore"):  # what float32 does not hold is not finite
            scales = [np.asarray(scale, np.float32) for scale in kv_scales]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgumentError(f"kv_scales: expected {expected}: {error}", argument="kv_scales") from error
    shapes = [scale.shape for scale in scales]
    if shapes != [shape, shape]:
        raise InvalidArgumentError(
            f"kv_scales: expected {expected}, got shapes {[list(s) for s in shapes]}",
            argument="kv_scales",
            got=shapes,
            expected=shape,
        )
    for scale in scales:
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise InvalidArgumentError(
                f"kv_scales: expected {expected}, got {scale.min()} to {scale.max()}", argument="kv_scales"
            )
    return scales


def set_scales(kv: KVCache, scales: list[NDArray[np.float32]] | None) -> None:
    """Puts what `check_scales` returned beside the cache."""
    if scales is None:
        return
    for layer in range(kv.layout.num_layers):
        for tensor, scale in zip(kv.scales(layer), scales, strict=True):
            tensor.copy_(tensor.new_tensor(scale[layer]))

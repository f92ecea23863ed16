"""The reference packer of quantised KV: how rows become codes and scales, in plain NumPy.

The kernels are compared with it bit for bit. It is written for reading and not for speed: it knows the 256 values of a
code and looks for the nearest one. ``docs/quantisation.md`` is the specification.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcore.errors import InvalidArgumentError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

#: The largest finite value of a code.
E4M3_MAX = 448.0
#: The code that any NaN becomes. Its negative, 0xff, is read as NaN too.
E4M3_NAN = 0x7F


def _magnitudes() -> NDArray[np.float32]:
    """Values of the codes 0 to 0x7e: 4 bits of exponent, biased by 7, over 3 of mantissa; exponent 0 is subnormal."""
    codes = np.arange(E4M3_NAN)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return values.astype(np.float32)


_MAGNITUDES = _magnitudes()
_MIDDLES = (_MAGNITUDES[:-1] + _MAGNITUDES[1:]) / np.float32(2)  # exact in float32
_VALUES = np.concatenate([_MAGNITUDES, [np.float32(np.nan)], -_MAGNITUDES, [np.float32(np.nan)]])


def decode_e4m3(codes: ArrayLike) -> NDArray[np.float32]:
    """The float32 value of every uint8 code."""
    return _VALUES[np.asarray(codes, np.uint8)]


def encode_e4m3(values: ArrayLike) -> NDArray[np.uint8]:
    """The code nearest to every float32 value, of two that are equally near the even one.

    What is larger than 448, infinity too, becomes 448; NaN of either sign becomes 0x7f.
    """
    x = np.asarray(values, np.float32)
    magnitude = np.minimum(np.abs(x), np.float32(E4M3_MAX))
    below = np.searchsorted(_MIDDLES, magnitude, side="left")  # middles under |x|: the code, a tie going down
    tie = np.append(_MIDDLES, np.float32(np.nan))[np.minimum(below, len(_MIDDLES))] == magnitude
    codes = below + (tie & (below % 2 == 1))
    codes = np.where(np.signbit(x), codes | 0x80, codes)
    return np.where(np.isnan(x), E4M3_NAN, codes).astype(np.uint8)


def row_scales(rows: ArrayLike) -> NDArray[np.float32]:
    """The scale of every row (the last axis) that is quantised on its own: its largest finite magnitude over 448.

    1 where that is 0.
    """
    x = np.abs(np.asarray(rows, np.float32))
    most = np.where(np.isfinite(x), x, np.float32(0)).max(-1, initial=0)
    scales = most / np.float32(E4M3_MAX)
    return np.where(scales > 0, scales, np.float32(1)).astype(np.float32)


def quantize(rows: ArrayLike, scale: ArrayLike | None = None) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes of K or V rows ``[num_tokens, num_kv_heads, dim]``, and their scales ``[num_tokens, num_kv_heads]``.

    ``scale`` float32 is ``[1]`` for the tensor or ``[num_kv_heads]`` for each head; None gives each token and head its
    own (`row_scales`). A code is that of the float32 quotient of value and scale.
    """
    x = np.asarray(rows, np.float32)
    if scale is None:
        scales = row_scales(x)
    else:
        given = np.asarray(scale, np.float32)
        if x.ndim != 3 or given.ndim != 1 or given.shape[0] not in (1, x.shape[1]):
            raise InvalidArgumentError(
                f"scale: expected [1] or [num_kv_heads] for rows {list(x.shape)}, got shape {list(given.shape)}",
                argument="scale",
                got=given.shape,
                expected=((1,), x.shape[1:2]),
            )
        scales = np.broadcast_to(given, x.shape[:-1]).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        return encode_e4m3(x / scales[..., None]), scales


def dequantize(codes: ArrayLike, scales: Any) -> NDArray[np.float64]:
    """What codes ``[..., dim]`` with scales ``[...]`` stand for, in float64: the products are exact."""
    return decode_e4m3(codes).astype(np.float64) * np.asarray(scales, np.float64)[..., None]

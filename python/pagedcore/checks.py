"""Checks of what users hand to the engine. Each raises InvalidArgumentError with the value and what is expected."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedcore.errors import InvalidArgumentError
from pagedcore.sampling import SamplingParams


def token_array(prompt: Any) -> np.ndarray:
    """Token ids from a list, or any array of integers, without trusting it."""
    if isinstance(prompt, (bytes, bytearray, dict, set)) or not hasattr(prompt, "__len__"):
        raise InvalidArgumentError(
            f"the prompt is {type(prompt).__name__}; text or token ids are needed",
            argument="prompt",
            got=type(prompt).__name__,
        )
    try:
        ids = np.asarray(prompt)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise InvalidArgumentError(
            f"the prompt is not a flat sequence of token ids: {error}", argument="prompt"
        ) from error
    if ids.size == 0 and ids.ndim == 1:
        return ids.astype(np.int64)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidArgumentError(
            f"the prompt is {ids.dtype} of shape {ids.shape}; token ids are integers of shape [length]",
            argument="prompt",
            got=(str(ids.dtype), ids.shape),
        )
    if ids.dtype == np.uint64 and (ids > np.iinfo(np.int64).max).any():
        ids = np.minimum(ids, np.uint64(np.iinfo(np.int64).max))  # still out of range, and representable
    return ids.astype(np.int64)


def check_count(name: str, value: Any, least: int) -> None:
    """An int in [least, 2**31)."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidArgumentError(f"{name} is {value!r}, not an integer", argument=name, got=value)
    if not least <= value < 2**31:
        raise InvalidArgumentError(
            f"{name} is {value}; it must be in [{least}, {2**31 - 1}]",
            argument=name,
            got=value,
            expected=(least, 2**31 - 1),
        )


def check_memory(memory: Any) -> None:
    """Bytes as an int, a share in (0, 1) as a float, or None."""
    if memory is None:
        return
    if isinstance(memory, bool) or not isinstance(memory, (int, float)):
        raise InvalidArgumentError(
            f"kv_cache_memory is {memory!r}; bytes (int) or a share (float) are needed",
            argument="kv_cache_memory",
            got=memory,
        )
    if isinstance(memory, float) and not 0.0 < memory < 1.0:
        raise InvalidArgumentError(
            f"kv_cache_memory is {memory}; as a float it is a share of the available memory, in (0, 1)",
            hint="give bytes as an int",
            argument="kv_cache_memory",
            got=memory,
        )
    if isinstance(memory, int) and memory <= 0:
        raise InvalidArgumentError(f"kv_cache_memory is {memory} bytes", argument="kv_cache_memory", got=memory)


def check_request_id(request_id: Any) -> None:
    """A str that is not empty."""
    if not isinstance(request_id, str) or not request_id:
        raise InvalidArgumentError(
            f"request_id is {request_id!r}, not a non-empty string", argument="request_id", got=request_id
        )


def check_params(params: Any) -> SamplingParams:
    """SamplingParams, which have checked their own values."""
    if not isinstance(params, SamplingParams):
        raise InvalidArgumentError(
            f"params is {type(params).__name__}, not SamplingParams", argument="params", got=params
        )
    return params

"""Checks of what users hand to the engine. Each raises InvalidArgumentError with the value and what is expected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcore.errors import InvalidArgumentError, TokenOutOfRangeError, UnsupportedError
from pagedcore.params import SamplingParams

if TYPE_CHECKING:
    from pagedcore.models import LoadedModel


def check_options(
    *,
    block_size: Any,
    max_num_seqs: Any,
    max_num_batched_tokens: Any,
    num_blocks: Any,
    kv_cache_memory: Any,
    max_model_len: Any,
) -> None:
    """What `Engine` is made with, as far as it can be told without the model."""
    check_count("block_size", block_size, 1)
    check_count("max_num_seqs", max_num_seqs, 1)
    check_count("max_num_batched_tokens", max_num_batched_tokens, 1)
    if num_blocks is not None:
        check_count("num_blocks", num_blocks, 2)
        if kv_cache_memory is not None:
            raise InvalidArgumentError(
                "num_blocks and kv_cache_memory are both given", hint="give one of them", argument="num_blocks"
            )
    if max_model_len is not None:
        check_count("max_model_len", max_model_len, 2)
    check_memory(kv_cache_memory)


def prompt_tokens(prompt: Any, model: LoadedModel) -> np.ndarray:
    """A prompt as a read-only int32 array of its own: text is tokenised, ids are checked. At least one, every one in
    the vocabulary. O(length).
    """
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise UnsupportedError(f"{model.name} has no tokenizer", hint="give token ids", argument="prompt")
        try:
            ids = np.asarray(model.tokenizer.encode(prompt), dtype=np.int64)
        except (TypeError, UnicodeError) as error:  # lone surrogates
            raise InvalidArgumentError(
                f"the prompt is not text that can be encoded: {error}", argument="prompt"
            ) from error
    else:
        ids = token_array(prompt)
    if ids.size == 0:
        raise InvalidArgumentError(
            "the prompt is empty: 0 tokens", hint="at least one token is needed", argument="prompt", got=0
        )
    check_tokens(ids, model.vocab_size, "prompt")
    tokens = ids.astype(np.int32)
    tokens.setflags(write=False)
    return tokens


def check_tokens(ids: np.ndarray, vocab_size: int, argument: str) -> None:
    """Every id in [0, vocab_size); else TokenOutOfRangeError names the first that is not."""
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if outside.size:
        position = int(outside[0])
        token = int(ids[position])
        raise TokenOutOfRangeError(
            f"{argument}: token {token} at position {position} is outside the vocabulary [0, {vocab_size})",
            argument=argument,
            token=token,
            position=position,
            vocab_size=vocab_size,
        )


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

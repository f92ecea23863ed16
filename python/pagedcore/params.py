"""How a request's answers are sampled, and where they end. Imports no torch: a server checks requests without it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pagedcore.errors import InvalidArgumentError

#: Temperatures below this one are greedy: the division would overflow float32 long before it changed a token.
GREEDY_BELOW = 1e-4


@dataclass(frozen=True)
class SamplingParams:
    """How a request's answers are sampled, and where they end. Checked when made: InvalidArgumentError names the field.

    Args:
        n: Answers to one prompt. They share the prompt's blocks until they differ.
        max_tokens: The most tokens an answer may have, a final stop token included.
        temperature: 0 takes the likeliest token (greedy, the default); higher is more varied.
        top_k: Sample from the k likeliest tokens only; 0 is all of them.
        top_p: Sample from the likeliest tokens whose probabilities add up to this, after top_k; 1.0 is all of them.
        seed: Same seed, same logits, same answer; None draws one.
        stop_token_ids: End the answer, besides the model's own end-of-text ids.
        ignore_eos: Do not end at the model's own end-of-text ids (for measurements).
        stop: Texts that end the answer, a string or several. The text stops before the first of them; the tokens that
            make it up are counted.
    """

    n: int = 1
    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, 1024)
        _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_float("temperature", self.temperature, 0.0, 1e4)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise InvalidArgumentError(
                "top_p is 0, which leaves no token",
                hint="use temperature=0 for greedy",
                argument="top_p",
                got=self.top_p,
            )
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**64 - 1)
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise InvalidArgumentError(
                f"ignore_eos is {self.ignore_eos!r}, not a bool", argument="ignore_eos", got=self.ignore_eos
            )
        object.__setattr__(self, "stop", _stop_strings(self.stop))

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise InvalidArgumentError(f"{name} is {value!r}, not a sequence of token ids", argument=name, got=value)
    ids = tuple(value)
    for token in ids:
        _check_int(name, token, 0, 2**31 - 1)
    return tuple(int(token) for token in ids)


def _stop_strings(value: Any) -> tuple[str, ...]:
    """One string, or several, as a tuple; none of them is empty."""
    if not isinstance(value, (str, Iterable)) or isinstance(value, bytes):
        raise InvalidArgumentError(f"stop is {value!r}, neither a string nor several", argument="stop", got=value)
    strings = (value,) if isinstance(value, str) else tuple(value)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InvalidArgumentError(
                f"stop has {string!r} in it, which is no text to stop at", argument="stop", got=string
            )
    return strings


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidArgumentError(f"{name} is {value!r}, not an integer", argument=name, got=value)
    if not low <= int(value) <= high:
        raise InvalidArgumentError(
            f"{name} is {value}; it must be in [{low}, {high}]", argument=name, got=value, expected=(low, high)
        )


def _check_float(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidArgumentError(f"{name} is {value!r}, not a number", argument=name, got=value)
    if not (math.isfinite(float(value)) and low <= float(value) <= high):
        raise InvalidArgumentError(
            f"{name} is {value}; it must be in [{low}, {high}]", argument=name, got=value, expected=(low, high)
        )

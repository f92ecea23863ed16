"""Choosing the next token of every sequence from its logits.

Random numbers are a function of (seed, answer index, position in the answer): there is no generator whose state could
depend on which requests share a step, on preemption, or on order. A row's token is decided by its own logits alone, up
to the last bits of sums over its vocabulary, which torch may round differently for other numbers of rows.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pagedcore.errors import InvalidArgumentError

#: Temperatures below this one are greedy: the division would overflow float32 long before it changed a token.
_GREEDY_BELOW = 1e-4

#: Top-k and top-p look at this many best tokens first, and sort the whole row only if these do not settle it. The same
#: for all rows, so that ties are broken alike whatever the step holds.
_CANDIDATES = 512

_UINT64 = 1 << 64


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
            _check_int("seed", self.seed, 0, _UINT64 - 1)
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise InvalidArgumentError(
                f"ignore_eos is {self.ignore_eos!r}, not a bool", argument="ignore_eos", got=self.ignore_eos
            )
        object.__setattr__(self, "stop", _stop_strings(self.stop))

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature < _GREEDY_BELOW or self.top_k == 1


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


class Sampler:
    """Per-row sampling settings of the running sequences, and the vectorised choice of their tokens.

    Rows are the scheduler's: stable while a sequence runs, in [0, max_num_seqs).
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._greedy = np.ones(max_num_seqs, dtype=bool)
        self._temperature = np.ones(max_num_seqs, dtype=np.float32)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self._top_p = np.ones(max_num_seqs, dtype=np.float64)
        self._key = np.zeros(max_num_seqs, dtype=np.uint64)
        self._prompt_len = np.zeros(max_num_seqs, dtype=np.int64)

    def assign(self, row: int, params: SamplingParams, key: int, prompt_len: int) -> None:
        """Gives the row to a sequence whose prompt has ``prompt_len`` tokens; ``key`` is from `sequence_key`."""
        self._greedy[row] = params.greedy
        self._temperature[row] = max(params.temperature, _GREEDY_BELOW)
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._key[row] = key
        self._prompt_len[row] = prompt_len

    def sample(self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One token for each row of ``logits`` (float [num_samples, vocab]); ``rows`` (int [num_samples], no repeats)
        says whose, ``positions`` (int [num_samples]) where in its sequence, prompt included, the token will stand.
        Nothing is remembered: a step that is computed again samples the same tokens.

        Returns (token ids int64 [num_samples], failed bool [num_samples]). A sample fails if its logits hold NaN or
        +inf, or nothing above -inf; its token id is 0 and means nothing. O(num_samples * vocab).
        """
        # On the CPU NumPy's argmax takes a tenth of the time of torch's. It takes NaN for the greatest, and the first
        # of equals.
        chosen = logits.float().numpy().argmax(axis=-1)
        best = logits.gather(1, torch.from_numpy(chosen)[:, None]).float()
        failed = ~torch.isfinite(best)[:, 0].numpy()
        chosen[failed] = 0
        random = np.flatnonzero(~self._greedy[rows] & ~failed)
        if random.size:
            of = rows[random]
            scaled = (logits[random].float() - best[random]) / torch.from_numpy(self._temperature[of])[:, None]
            u = uniform(self._key[of], (positions[random] - self._prompt_len[of]).astype(np.uint64))
            chosen[random] = draw(scaled, self._top_k[of], self._top_p[of], u)
        return chosen, failed


def draw(logits: torch.Tensor, top_k: np.ndarray, top_p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Samples one token a row by inverting the cumulative distribution at ``u`` (float64 [m], in (0, 1)).

    logits: float32 [m, vocab], divided by the temperature; top_k: int64 [m], 0 for all; top_p: float64 [m].
    Returns int64 [m].
    """
    tokens = np.empty(len(u), dtype=np.int64)
    filtered = (top_k > 0) | (top_p < 1.0)
    for i in np.flatnonzero(~filtered):  # in the order of the vocabulary: no sorting needed
        cumulative = logits[i].double().exp_().cumsum(0)
        tokens[i] = min(
            int(torch.searchsorted(cumulative, u[i] * cumulative[-1], right=True)), _last_positive(logits[i])
        )
    rest, width = np.flatnonzero(filtered), min(_CANDIDATES, logits.shape[-1])
    while rest.size:
        found, settled = _draw_sorted(logits[rest], top_k[rest], top_p[rest], u[rest], width)
        tokens[rest[settled]] = found[settled]
        rest, width = rest[~settled], logits.shape[-1]
    return tokens


def _last_positive(row: torch.Tensor) -> int:
    return int(torch.nonzero(row > -math.inf)[-1])


def _draw_sorted(
    logits: torch.Tensor, top_k: np.ndarray, top_p: np.ndarray, u: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """`draw` among the ``width`` best tokens of each row. The second result says for which rows these were enough."""
    k = torch.from_numpy(np.where(top_k > 0, top_k, logits.shape[-1]))[:, None]
    p = torch.from_numpy(top_p)[:, None]
    values, ids = (
        logits.topk(width, dim=-1) if width < logits.shape[-1] else logits.sort(dim=-1, descending=True, stable=True)
    )
    in_k = torch.arange(width) < k
    values = values.double().masked_fill(~in_k, -math.inf)
    # Probabilities are relative to the k best tokens where there is a k, else to all of them.
    total = torch.where(k <= width, values.logsumexp(-1, keepdim=True), logits.double().logsumexp(-1, keepdim=True))
    probabilities = (values - total).exp()
    cumulative = probabilities.cumsum(-1)
    settled = ((k <= width) | (cumulative[:, -1:] >= p)).squeeze(1).numpy() | (width == logits.shape[-1])
    kept = in_k & (cumulative - probabilities < p) & (probabilities > 0)
    kept[:, 0] = True
    count = kept.sum(-1, keepdim=True)
    mass = cumulative.gather(1, count - 1)
    place = torch.searchsorted(cumulative, torch.from_numpy(u)[:, None] * mass, right=True).minimum(count - 1)
    return ids.gather(1, place).squeeze(1).numpy(), settled


# ------------------------------------------------------------------------------------------------ random numbers


def sequence_key(seed: int, index: int) -> int:
    """The key of answer ``index`` of a request: its seed mixed with the index."""
    return int(_mix(_mix(np.array([seed], dtype=np.uint64)) + np.uint64(index))[0])


def uniform(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One float64 in (0, 1) for each (key, position), both uint64: the same pair always gives the same number."""
    bits = _mix(keys + _mix(positions)) >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that changes half of the output bits for each input bit (the finaliser of SplitMix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed

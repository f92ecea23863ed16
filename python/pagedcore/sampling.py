"""Choosing the next token of every sequence from its logits.

Random numbers are a function of (seed, answer index, position in the answer): there is no generator whose state could
depend on which requests share a step, on preemption, or on order. A row's token is decided by its own logits alone, up
to the last bits of sums over its vocabulary, which torch may round differently for other numbers of rows.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from pagedcore.params import GREEDY_BELOW, SamplingParams

#: Top-k and top-p look at this many best tokens first, and sort the whole row only if these do not settle it. The same
#: for all rows, so that ties are broken alike whatever the step holds.
_CANDIDATES = 512


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
        self._temperature[row] = max(params.temperature, GREEDY_BELOW)
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._key[row] = key
        self._prompt_len[row] = prompt_len

    def sample(self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One token for each row of ``logits`` (float [num_samples, vocab]); ``rows`` (int [num_samples], no repeats)
        says whose, ``positions`` (int [num_samples]) where in its sequence, prompt included, the token will stand.
        Nothing is remembered: a step that is computed again samples the same tokens.

        Returns (token ids int64 [num_samples], failed bool [num_samples]). A sample fails if its logits hold NaN or
        +inf, or nothing above -inf; its token id is 0 and means nothing. O(num_samples * vocab). On a device the tokens
        are chosen there, and come back in one copy, which waits for the step.
        """
        chosen, best = _best(logits)
        failed = ~torch.isfinite(best)
        random = np.flatnonzero(~self._greedy[rows])
        if random.size:
            of = rows[random]
            u = uniform(self._key[of], (positions[random] - self._prompt_len[of]).astype(np.uint64))
            if random.size < len(rows):
                at = torch.from_numpy(random).to(logits.device)
                chosen[at] = draw(
                    logits[at].float() - best[at, None], self._temperature[of], self._top_k[of], self._top_p[of], u
                )
            else:
                chosen = draw(
                    logits.float() - best[:, None], self._temperature[of], self._top_k[of], self._top_p[of], u
                )
        answer = chosen.masked_fill(failed, _FAILED).cpu().numpy()
        failures = answer == _FAILED
        return np.where(failures, 0, answer), failures


#: In the place of a token id: the sample failed. One array comes back from a device, not two.
_FAILED = -1


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best token of each row (int64 [n]) and its logit (float32 [n]). NaN counts as the greatest."""
    if logits.device.type == "cpu":  # NumPy's argmax takes a tenth of the time of torch's, and the first of equals
        chosen = torch.from_numpy(logits.float().numpy().argmax(axis=-1))
        return chosen, logits.gather(1, chosen[:, None])[:, 0].float()
    return _best_on_device(logits)


def _best_on_device(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    best, chosen = logits.max(dim=-1)
    return chosen, best.float()


def draw(
    logits: torch.Tensor, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, u: np.ndarray
) -> torch.Tensor:
    """Samples one token a row by inverting the cumulative distribution at ``u`` (float64 [m], in (0, 1)).

    logits: float32 [m, vocab]; temperature: float [m]; top_k: int64 [m], 0 for all; top_p: float64 [m].
    Returns int64 [m] on the logits' device. A row with NaN gives some token.
    """
    # One copy to the device for all numbers. A top_k is exact in float64.
    numbers = torch.from_numpy(np.stack([temperature, top_k, top_p, u]).astype(np.float64)).to(logits.device)
    logits = logits / numbers[0].float()[:, None]
    k, p, u_there = numbers[1].long(), numbers[2], numbers[3]
    tokens = torch.empty(len(u), dtype=torch.int64, device=logits.device)
    filtered = (top_k > 0) | (top_p < 1.0)
    for i in np.flatnonzero(~filtered).tolist():  # in the order of the vocabulary: no sorting needed
        cumulative = logits[i].double().exp_().cumsum(0)
        place = torch.searchsorted(cumulative, u_there[i] * cumulative[-1], right=True)
        tokens[i] = torch.minimum(place, _last_positive(logits[i]))
    rest, width = torch.from_numpy(np.flatnonzero(filtered)).to(logits.device), min(_CANDIDATES, logits.shape[-1])
    while len(rest):
        found, settled = _draw_sorted(logits[rest], k[rest], p[rest], u_there[rest], width)
        tokens[rest[settled]] = found[settled]
        rest, width = rest[~settled], logits.shape[-1]
    return tokens


def _last_positive(row: torch.Tensor) -> torch.Tensor:
    """The last token whose probability is not 0; int64, and 0 where there is none."""
    return torch.where(row > -math.inf, torch.arange(len(row), device=row.device), 0).max()


def _draw_sorted(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, u: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw` among the ``width`` best tokens of each row. The second result says for which rows these were enough."""
    k = torch.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    p = top_p[:, None]
    values, ids = (
        logits.topk(width, dim=-1) if width < logits.shape[-1] else logits.sort(dim=-1, descending=True, stable=True)
    )
    in_k = torch.arange(width, device=logits.device) < k
    values = values.double().masked_fill(~in_k, -math.inf)
    # Probabilities are relative to the k best tokens where there is a k, else to all of them.
    total = torch.where(k <= width, values.logsumexp(-1, keepdim=True), logits.double().logsumexp(-1, keepdim=True))
    probabilities = (values - total).exp()
    cumulative = probabilities.cumsum(-1)
    settled = ((k <= width) | (cumulative[:, -1:] >= p)).squeeze(1) | (width == logits.shape[-1])
    kept = in_k & (cumulative - probabilities < p) & (probabilities > 0)
    kept[:, 0] = True
    count = kept.sum(-1, keepdim=True)
    mass = cumulative.gather(1, count - 1)
    place = torch.searchsorted(cumulative, u[:, None] * mass, right=True).minimum(count - 1)
    return ids.gather(1, place).squeeze(1), settled


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

"""Choosing the next token of every sequence from its logits.

Random numbers are a function of (seed, answer index, position in the answer): there is no generator whose state could
depend on which requests share a step, on preemption, or on order. A row's token is decided by its own logits alone, up
to the last bits of sums over its vocabulary, which torch may round differently for other numbers of rows.

What rows are drawn by is computed on the host (`Sampler.draws`), travels to a device with the step's other arrays, and
is read there (`sample`). The host decides nothing by what a device holds until the tokens have come back.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from pagedcore.draws import NO_DRAWS, Draws
from pagedcore.params import GREEDY_BELOW, SamplingParams

#: Top-k and top-p look at this many best tokens first, and sort the whole row only if these do not settle it. The same
#: for all rows, so that ties are broken alike whatever the step holds.
_CANDIDATES = 512


class Sampler:
    """Per-row sampling settings of the running sequences.

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

    def draws(self, rows: np.ndarray, positions: np.ndarray) -> Draws:
        """For a step that samples once for each of ``rows`` (int [num_samples], no repeats); ``positions`` (int
        [num_samples]) says where in its sequence, prompt included, the token will stand. Nothing is remembered: a step
        that is computed again draws the same numbers. O(num_samples).
        """
        random = np.flatnonzero(~self._greedy[rows])
        if not random.size:
            return NO_DRAWS
        sorts = (self._top_k[rows[random]] > 0) | (self._top_p[rows[random]] < 1.0)
        samples = np.concatenate([random[~sorts], random[sorts]])
        of = rows[samples]
        u = uniform(self._key[of], (positions[samples] - self._prompt_len[of]).astype(np.uint64))
        numbers = np.stack([samples, self._temperature[of], self._top_k[of], self._top_p[of], u], dtype=np.float64)
        return Draws(numbers, len(random) - int(sorts.sum()))


#: In the place of a token id: the sample failed; the best `_CANDIDATES` do not settle it. One array comes back from a
#: device, not three.
_FAILED, _UNSETTLED = -1, -2


def sample(
    logits: torch.Tensor, draws: Draws = NO_DRAWS, numbers: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One token for each row of ``logits`` (float [num_samples, vocab]), the best one unless ``draws`` says how it is
    drawn; ``numbers`` is ``draws.numbers`` where the logits are, None if it is empty.

    Returns (token ids int64 [num_samples], failed bool [num_samples]). A sample fails if its logits hold NaN or +inf,
    or nothing above -inf; its token id is 0 and means nothing. O(num_samples * vocab).

    On a device the tokens are chosen there, and come back in one copy, the only time that the host waits. A row whose
    `_CANDIDATES` best tokens hold less than its top_p, or are fewer than its top_k, is then sorted as a whole, and all
    tokens come back again: to sort every row at once would save that wait, and have every step pay for it. The same two
    rounds decide on the CPU, so a device gives the same tokens but for the last bits of sums, and for which of two
    equal logits counts as the better one.
    """
    chosen, best = _best(logits)
    failed = ~torch.isfinite(best)
    if numbers is None:
        return _on_host(chosen.masked_fill(failed, _FAILED))
    samples, whole = numbers[0].long(), draws.num_whole
    if not np.array_equal(draws.numbers[0], np.arange(len(logits))):
        logits, best = logits.index_select(0, samples), best.index_select(0, samples)
    scaled = (logits.float() - best[:, None]) / numbers[1].float()[:, None]
    top_k, top_p, u = numbers[2, whole:].long(), numbers[3, whole:], numbers[4]
    sorts, u_sorts = scaled[whole:], u[whole:]
    drawn = _draw_whole(scaled[:whole], u[:whole])
    if len(sorts):
        width = min(_CANDIDATES, logits.shape[-1])
        found, settled = _draw_sorted(sorts, top_k, top_p, u_sorts, width)
        drawn = torch.cat([drawn, torch.where(settled, found, _UNSETTLED)])
    chosen = chosen.index_copy(0, samples, drawn).masked_fill(failed, _FAILED)
    tokens = chosen.cpu()
    if count := int((tokens == _UNSETTLED).sum()):
        # Which they are is known here too, but would have to be sent.
        rest = (chosen[samples[whole:]] == _UNSETTLED).int().argsort(descending=True, stable=True)[:count]
        found, _ = _draw_sorted(sorts[rest], top_k[rest], top_p[rest], u_sorts[rest], logits.shape[-1])
        tokens = chosen.index_copy(0, samples[whole:][rest], found).cpu()
    return _on_host(tokens)


def _on_host(chosen: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    answer = chosen.cpu().numpy()
    failures = answer == _FAILED
    return np.where(failures, 0, answer), failures


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best token of each row (int64 [n]) and its logit (float32 [n]). NaN counts as the greatest."""
    if logits.device.type == "cpu":  # NumPy's argmax takes a tenth of the time of torch's, and the first of equals
        chosen = torch.from_numpy(logits.float().numpy().argmax(axis=-1))
        return chosen, logits.gather(1, chosen[:, None])[:, 0].float()
    return _best_on_device(logits)


def _best_on_device(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    best, chosen = logits.max(dim=-1)
    return chosen, best.float()


def _draw_whole(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Samples one token a row by inverting the cumulative distribution, in the order of the vocabulary, at ``u``.

    logits: float32 [m, vocab], at most 0; u: float64 [m], in (0, 1). Returns int64 [m]; some token for a row with NaN.
    """
    # On the CPU row after row, in its cache, and with the same bits whatever the rows beside it.
    parts = 1 if logits.device.type == "cpu" else max(1, len(logits))
    tokens = [torch.empty(0, dtype=torch.int64, device=logits.device)]
    for rows, targets in zip(logits.split(parts), u[:, None].split(parts), strict=True):
        cumulative = rows.double().exp_().cumsum(-1)
        place = torch.searchsorted(cumulative, targets * cumulative[:, -1:], right=True)
        tokens.append(torch.minimum(place, _last_positive(rows)).squeeze(1))
    return torch.cat(tokens)


def _last_positive(rows: torch.Tensor) -> torch.Tensor:
    """The last token of each row whose probability is not 0; int64 [m, 1], and 0 where there is none."""
    ids = torch.arange(rows.shape[-1], device=rows.device)
    return torch.where(rows > -math.inf, ids, 0).amax(-1, keepdim=True)


def _draw_sorted(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, u: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_draw_whole` in the order of probability, among what top_k (int64 [m], 0: all) and then top_p (float64 [m])
    leave, looking at the ``width`` best tokens of each row. The second result (bool [m]) says for which rows these were
    enough.
    """
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
    # With more than these left by top_k, top_p is a share of what is not known yet.
    enough = (k >= logits.shape[-1]) & (cumulative[:, -1:] >= p)
    settled = ((k <= width) | enough).squeeze(1) | (width == logits.shape[-1])
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

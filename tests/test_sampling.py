"""Sampling: what is chosen, with which frequency, and that nothing but the row itself decides it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pagedcore import sampling
from pagedcore.draws import Draws
from pagedcore.errors import InvalidArgumentError
from pagedcore.params import SamplingParams
from pagedcore.sampling import Sampler, sample, sequence_key, uniform

VOCAB = 1000


def logits(rows, vocab=VOCAB, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def drawn(rows, temperature, top_k, top_p, u):
    """A token for each row, drawn at ``u``."""
    same = [np.full(len(u), value) for value in (temperature, top_k, top_p)]
    draws = Draws(np.stack([np.arange(len(u)), *same, u]), 0 if top_k or top_p < 1 else len(u))
    tokens, failed = sample(rows, draws, torch.from_numpy(draws.numbers))
    assert not failed.any()
    return tokens


def sweep(row, top_k=0, top_p=1.0, points=20_000):
    """Relative frequencies of the tokens drawn for evenly spread random numbers: exact up to 1 / points a token."""
    u = (np.arange(points) + 0.5) / points
    frequency = np.zeros(row.shape[-1])
    for part in np.array_split(u, 20):
        many = row.expand(len(part), -1)
        np.add.at(frequency, drawn(many, 1.0, top_k, top_p, part), 1 / points)
    return frequency


def expected(row, top_k=0, top_p=1.0):
    """The distribution by its definition, in float64."""
    order = np.argsort(-row.double().numpy(), kind="stable")
    p = np.exp(row.double().numpy() - row.double().logsumexp(0).item())
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(0, 1.0), (1, 1.0), (5, 1.0), (700, 1.0), (0, 0.5), (0, 0.001), (0, 0.9999999), (50, 0.8), (5000, 0.3)],
)
def test_frequencies(top_k, top_p):
    row = logits(1)[0]
    np.testing.assert_allclose(sweep(row, top_k, top_p), expected(row, top_k, top_p), atol=1.01 / 20_000)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.95), (600, 1.0)])
def test_flat_distributions_go_past_the_candidates(top_k, top_p):
    """A row so flat that the best few hundred tokens do not settle it is sorted as a whole."""
    row = logits(1, seed=2)[0] * 1e-3
    frequency = sweep(row, top_k, top_p, points=2000)
    np.testing.assert_allclose(frequency, expected(row, top_k, top_p), atol=1.01 / 2000)
    assert (frequency > 0).sum() > 512


def test_top_p_is_of_what_top_k_leaves():
    """Though the best few hundred tokens hold more than top_p of the whole row."""
    row = logits(1, seed=2)[0] * 1e-3
    frequency = sweep(row, top_k=700, top_p=0.5, points=2000)
    np.testing.assert_allclose(frequency, expected(row, top_k=700, top_p=0.5), atol=1.01 / 2000)
    assert 340 < (frequency > 0).sum() <= 351


def test_tokens_of_probability_zero_are_never_drawn():
    row = torch.full((1, VOCAB), -math.inf)
    row[0, [3, 990]] = 0.0
    for u in (1e-300, 0.25, 0.5, 0.75, 1 - 1e-16):
        for top_k, top_p in ((0, 1.0), (0, 0.99), (10, 1.0)):
            (token,) = drawn(row, 1.0, top_k, top_p, np.array([u]))
            assert token in (3, 990)
            assert u == 0.5 or token == (3 if u < 0.5 else 990)


@pytest.fixture(params=["host", "device"])
def either_way(request, monkeypatch):
    """The best token as it is found on the host, and as on a device."""
    if request.param == "device":
        monkeypatch.setattr(sampling, "_best", sampling._best_on_device)


def sampler_for(params, keys):
    sampler = Sampler(len(params))
    for row, (each, key) in enumerate(zip(params, keys, strict=True)):
        sampler.assign(row, each, key, 0)
    return sampler


def choose(sampler, logits, rows, positions):
    draws = sampler.draws(rows, positions)
    return sample(logits, draws, torch.from_numpy(draws.numbers) if draws.numbers.size else None)


def first(sampler, logits, rows):
    """The first tokens of answers to empty prompts."""
    return choose(sampler, logits, rows, np.zeros(len(rows), dtype=np.int64))


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=20),
    SamplingParams(temperature=1.3, top_p=0.9),
    SamplingParams(temperature=5.0, top_p=0.999),
    SamplingParams(temperature=1.0, top_k=900, top_p=0.99),
]


@pytest.mark.usefixtures("either_way")
def test_a_row_does_not_depend_on_its_companions():
    keys = [sequence_key(seed, 0) for seed in range(len(MIXED))]
    sampler, all_logits = sampler_for(MIXED, keys), logits(len(MIXED), seed=4)
    together, _ = first(sampler, all_logits, np.arange(len(MIXED)))
    backwards, _ = first(sampler, all_logits.flip(0), np.arange(len(MIXED))[::-1].copy())
    np.testing.assert_array_equal(together, backwards[::-1])
    for row in range(len(MIXED)):
        alone, _ = first(sampler, all_logits[row : row + 1], np.array([row]))
        assert alone[0] == together[row]


def test_same_seed_same_tokens_and_positions_differ():
    row = logits(1, seed=9)

    def tokens(seed, index=0, start=0, count=20):
        sampler = Sampler(1)
        sampler.assign(0, SamplingParams(temperature=1.0), sequence_key(seed, index), 50)
        out = []
        for _ in range(count):
            out.append(int(choose(sampler, row, np.array([0]), np.array([50 + start + len(out)]))[0][0]))
        return out

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(1) != tokens(1, index=1)
    assert len(set(tokens(1))) > 1
    assert tokens(1)[7:] == tokens(1, start=7, count=13), "a preempted sequence goes on with the same numbers"


@pytest.mark.usefixtures("either_way")
def test_greedy():
    all_logits = logits(3)
    for params in (SamplingParams(), SamplingParams(temperature=1e-9), SamplingParams(temperature=1.0, top_k=1)):
        tokens, failed = first(sampler_for([params] * 3, [0] * 3), all_logits, np.arange(3))
        np.testing.assert_array_equal(tokens, all_logits.argmax(-1).numpy())
        assert not failed.any()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)]
)
def test_rows_that_are_not_numbers_fail_alone(bad, params):
    clean = logits(3)
    keys = [1, 2, 3]
    good, _ = first(sampler_for([params] * 3, keys), clean, np.arange(3))
    broken = clean.clone()
    broken[1, 17] = bad
    tokens, failed = first(sampler_for([params] * 3, keys), broken, np.arange(3))
    assert failed.tolist() == [False, True, False]
    assert (tokens[[0, 2]] == good[[0, 2]]).all()
    assert 0 <= tokens[1] < VOCAB


@pytest.mark.usefixtures("either_way")
def test_a_row_of_minus_infinity_fails():
    _, failed = first(sampler_for([SamplingParams(temperature=1.0)], [0]), torch.full((1, 8), -math.inf), np.array([0]))
    assert failed.tolist() == [True]


def test_uniform_numbers_are_uniform():
    u = uniform(np.full(100_000, 7, dtype=np.uint64), np.arange(100_000, dtype=np.uint64))
    assert 0 < u.min() < u.max() < 1
    counts, _ = np.histogram(u, bins=100, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 170  # chi-square with 99 degrees of freedom: 1 in 100,000
    keys = uniform(
        np.array([sequence_key(1, i) for i in range(10_000)], dtype=np.uint64), np.zeros(10_000, dtype=np.uint64)
    )
    assert abs(keys.mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n", 0, "n is 0"),
        ("n", 1.5, "not an integer"),
        ("n", True, "not an integer"),
        ("max_tokens", 0, r"\[1, 2147483647\]"),
        ("max_tokens", -5, "max_tokens is -5"),
        ("max_tokens", 2**40, "max_tokens is"),
        ("max_tokens", None, "not an integer"),
        ("temperature", -0.1, "temperature is -0.1"),
        ("temperature", math.nan, "temperature is nan"),
        ("temperature", math.inf, "temperature is inf"),
        ("temperature", "hot", "not a number"),
        ("top_k", -1, "top_k is -1"),
        ("top_p", 0.0, "leaves no token"),
        ("top_p", 1.01, "top_p is 1.01"),
        ("seed", -1, "seed is -1"),
        ("seed", 2**64, "seed is"),
        ("stop_token_ids", "eos", "not a sequence"),
        ("stop_token_ids", 5, "not a sequence"),
        ("stop_token_ids", [-1], r"\[0, 2147483647\]"),
        ("stop_token_ids", ["a"], "not an integer"),
        ("ignore_eos", 1, "not a bool"),
        ("stop", 5, "neither a string nor several"),
        ("stop", b"x", "neither a string nor several"),
        ("stop", "", "no text to stop at"),
        ("stop", ["a", None], "no text to stop at"),
    ],
)
def test_bad_params(field, value, message):
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        SamplingParams(**{field: value})
    assert caught.value.argument == field


def test_params_are_frozen_and_take_numpy_numbers():
    params = SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5), stop_token_ids=np.array([1, 2]))
    assert params.stop_token_ids == (1, 2)
    with pytest.raises(AttributeError):
        params.n = 2

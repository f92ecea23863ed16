"""Whatever the scheduler does to a request, its greedy tokens are those that transformers computes for it alone."""

from __future__ import annotations

import numpy as np
import pytest
from greedy import Reference, run_all
from models import FAMILIES, OTHER_FAMILIES, VOCAB_SIZE, save_tiny_model
from pagedcore import SamplingParams
from pagedcore import models as pagedcore_models
from pagedcore.engine import Engine

BLOCK_SIZES = (1, 16, 64)
MAX_TOKENS = 24
EOS = 2


pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny:
    """A family's model in both forms."""

    def __init__(self, family, directory):
        save_tiny_model(family, directory)
        self.loaded = pagedcore_models.load(directory)
        self.reference = Reference(directory)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def tiny(request, tmp_path_factory):
    return Tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def prompts():
    """Lengths on, below and above the edges of blocks and chunks; five prompts share 70 tokens, two are equal."""
    random = np.random.default_rng(5)

    def tokens(length):
        return random.integers(3, VOCAB_SIZE, length).tolist()

    shared = tokens(70)
    alone = [tokens(length) for length in (1, 2, 15, 16, 17, 33, 64, 65)]
    together = [shared + tokens(length) for length in (5, 9, 30)]
    return [*alone, *together, list(together[1]), shared]


def check(tiny, prompts, answers, n=1):
    for number, prompt in enumerate(prompts):
        for answer in answers[str(number)]:
            tiny.reference.check(prompt, answer, MAX_TOKENS, {EOS})
        assert len(answers[str(number)]) == n


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_alone_and_batched(tiny, prompts, block_size):
    """Mixed steps of decodes and prompts in chunks that end anywhere in a block."""
    params = SamplingParams(max_tokens=MAX_TOKENS)
    with Engine(
        tiny.loaded, block_size=block_size, num_blocks=2048 // block_size + 1, max_num_batched_tokens=24
    ) as engine:
        check(tiny, prompts, run_all(engine, {str(i): (prompt, params) for i, prompt in enumerate(prompts)}))
        assert engine.stats().preemptions == 0


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_prefix_hits(tiny, prompts, block_size):
    """The second round finds what the first one computed, answers included, and says the same."""
    params = SamplingParams(max_tokens=MAX_TOKENS)
    with Engine(
        tiny.loaded, block_size=block_size, num_blocks=4096 // block_size + 1, max_num_batched_tokens=64
    ) as engine:
        first = run_all(engine, {str(i): (prompt, params) for i, prompt in enumerate(prompts)})
        before = engine.stats().prefix_hit_tokens
        second = run_all(engine, {str(i): (prompt, params) for i, prompt in enumerate(prompts)})
        hits = engine.stats().prefix_hit_tokens - before
        # Every full block but the one that the last token is in: at least that much of each prompt is found.
        assert hits >= sum((len(prompt) - 1) // block_size * block_size for prompt in prompts)
        check(tiny, prompts, first)
        check(tiny, prompts, second)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_forks(tiny, prompts, block_size):
    """n answers share their prompt's blocks; the last one, partly full, is copied before they write to it."""
    params = SamplingParams(max_tokens=MAX_TOKENS, n=3)
    with Engine(
        tiny.loaded, block_size=block_size, num_blocks=4096 // block_size + 1, max_num_batched_tokens=48
    ) as engine:
        check(tiny, prompts, run_all(engine, {str(i): (prompt, params) for i, prompt in enumerate(prompts)}), n=3)
        assert (engine.stats().block_copies > 0) == (block_size > 1)


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize(("block_size", "num_blocks", "max_tokens"), [(1, 320, 50), (16, 20, 50), (64, 8, 140)])
def test_preemption(tiny, prompts, block_size, num_blocks, max_tokens, prefix_caching):
    """Requests that all fit when they begin outgrow the pool, by more than the block that each is granted ahead: some
    lose their blocks half-way and take up where they were.
    """
    with Engine(
        tiny.loaded,
        block_size=block_size,
        num_blocks=num_blocks + 1,
        max_num_seqs=12,
        max_num_batched_tokens=40,
        enable_prefix_caching=prefix_caching,
    ) as engine:
        params = [SamplingParams(max_tokens=max_tokens, n=2 if i == 1 else 1, ignore_eos=True) for i in range(7)]
        answers = run_all(engine, {str(i): (prompts[i], params[i]) for i in range(7)})
        assert engine.stats().preemptions > 0
        for i in range(7):
            assert len(answers[str(i)]) == params[i].n
            for answer in answers[str(i)]:
                tiny.reference.check(prompts[i], answer, max_tokens)


def test_arrivals_and_aborts_in_between(tiny, prompts):
    """Requests that come and go while others run change nothing for them."""
    params = SamplingParams(max_tokens=MAX_TOKENS)
    answers: dict[str, list[int]] = {}
    with Engine(tiny.loaded, num_blocks=40, max_num_seqs=6, max_num_batched_tokens=32) as engine:
        waiting = list(enumerate(prompts))
        while waiting or engine.has_unfinished:
            if waiting:
                number, prompt = waiting.pop()
                engine.add_request(str(number), prompt, params)
                engine.add_request(f"gone-{number}", prompt[::-1], SamplingParams(max_tokens=100, ignore_eos=True))
            for output in engine.step():
                for completion in output.outputs:
                    answers.setdefault(output.request_id, []).extend(completion.new_token_ids)
            for gone in [r for r in answers if r.startswith("gone-") and len(answers[r]) >= 2]:
                assert len(engine.abort(gone).outputs[0].token_ids) == len(answers.pop(gone))
        for number, prompt in enumerate(prompts):
            tiny.reference.check(prompt, answers[str(number)], MAX_TOKENS, {EOS})
        assert engine.stats().blocks_used == 0


@pytest.mark.parametrize("family", sorted(OTHER_FAMILIES))
def test_other_families(family, prompts, tmp_path):
    """Learned positions, biases, layers with and without a window, experts: what the probe lets through is right."""
    tiny = Tiny(family, tmp_path)
    params = SamplingParams(max_tokens=12)
    with Engine(tiny.loaded, num_blocks=60, max_num_batched_tokens=50) as engine:
        answers = run_all(engine, {str(i): (prompt, params) for i, prompt in enumerate(prompts)})
        for number, prompt in enumerate(prompts):
            tiny.reference.check(prompt, answers[str(number)][0], 12, {EOS})

"""Decode steps that read a shared prefix once give the same greedy tokens; and when they do so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from greedy import Reference, run_all
from hypothesis import given
from hypothesis import strategies as st
from models import VOCAB_SIZE, save_tiny_model
from pagedcore import KVCacheLayout, SamplingParams, ops, shared_prefix
from pagedcore import models as pagedcore_models
from pagedcore.engine import Engine
from pagedcore.shared_prefix import shared_blocks

MAX_TOKENS = 16
MEASURED = shared_prefix.LEAST_SAVED_BYTES
LAYOUT = KVCacheLayout(100, 4, 3, 2, 16, "float32")  # 1,024 bytes of a layer in a block
LAYER_BLOCK = 1024


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cascades(monkeypatch):
    """The numbers of shared blocks that layers were computed with, where any saving counts."""
    seen = []
    cascade = ops.cascade_attention

    def noting(*args: Any, num_shared_blocks: int, **options: Any) -> Any:
        seen.append(num_shared_blocks)
        return cascade(*args, num_shared_blocks=num_shared_blocks, **options)

    monkeypatch.setattr(ops, "cascade_attention", noting)
    monkeypatch.setattr(shared_prefix, "LEAST_SAVED_BYTES", 1)
    return seen


def prompts() -> list[list[int]]:
    random = np.random.default_rng(11)
    shared = random.integers(3, VOCAB_SIZE, 70).tolist()
    return [[*shared, *random.integers(3, VOCAB_SIZE, length).tolist()] for length in (1, 2, 9, 16, 40)]


# Layers with a window read for themselves; what sinks bring is counted once.
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("block_size", [1, 16])
def test_answers_are_those_of_the_model(tmp_path, cascades, family, block_size):
    both = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}
    directory = save_tiny_model(family, tmp_path / "model", **both)
    reference = Reference(directory)
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    with Engine(directory, block_size=block_size, num_blocks=2048 // block_size) as engine:
        for _ in range(2):  # the second time the prefix is found from the start
            answers = run_all(engine, {str(i): (prompt, params) for i, prompt in enumerate(prompts())})
            for i, prompt in enumerate(prompts()):
                reference.check(prompt, answers[str(i)][0], MAX_TOKENS)
    assert set(cascades) == (set() if family == "mistral" else {70 // block_size})


def test_answers_of_one_prompt(tmp_path, cascades):
    """Forks share its blocks, but for the last, which they write to."""
    directory = save_tiny_model("llama", tmp_path / "model")
    reference = Reference(directory)
    prompt = prompts()[-1]
    with Engine(directory, num_blocks=100) as engine:
        answers = run_all(engine, {"a": (prompt, SamplingParams(max_tokens=MAX_TOKENS, n=4, ignore_eos=True))})
    assert len(answers["a"]) == 4
    for answer in answers["a"]:
        reference.check(prompt, answer, MAX_TOKENS)
    assert 110 // 16 in cascades


def test_codes(tmp_path, cascades, monkeypatch):
    """Both passes take the scales along: the tokens are those without a cascade."""
    loaded = pagedcore_models.load(save_tiny_model("llama", tmp_path / "model"))
    answers = []
    for least in (1, 10**12):
        monkeypatch.setattr(shared_prefix, "LEAST_SAVED_BYTES", least)
        with Engine(loaded, num_blocks=200, kv_format="fp8_e4m3") as engine:
            params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
            answers.append(run_all(engine, {str(i): (prompt, params) for i, prompt in enumerate(prompts())}))
    assert cascades
    assert answers[0] == answers[1]


def test_small_savings_are_left(tmp_path, cascades, monkeypatch):
    monkeypatch.setattr(shared_prefix, "LEAST_SAVED_BYTES", MEASURED)
    with Engine(save_tiny_model("llama", tmp_path / "model"), num_blocks=100) as engine:
        run_all(engine, {str(i): (prompt, SamplingParams(max_tokens=4)) for i, prompt in enumerate(prompts())})
    assert not cascades


def plan_of(table: list[list[int]], seq_lens: list[int], num_tokens: int | None = None) -> Any:
    return SimpleNamespace(
        num_seqs=len(table),
        num_tokens=len(table) if num_tokens is None else num_tokens,
        seq_lens=np.array(seq_lens, np.int32),
        block_table=np.array(table, np.int32),
    )


@pytest.mark.parametrize(
    ("seq_lens", "num_tokens", "least", "want"),
    [
        ([13, 14, 16], None, 1, 2),
        ([13, 14, 16], None, 4 * LAYER_BLOCK, 2),  # two blocks of two sequences need not be read again
        ([13, 14, 16], None, 4 * LAYER_BLOCK + 1, 0),
        ([9, 14, 16], None, 1, 2),
        ([8, 14, 16], None, 1, 1),  # the first one's query is in its second block
        ([4, 14, 16], None, 1, 0),
        ([13, 14, 16], 4, 1, 0),  # a prompt is computed too
    ],
)
def test_when_it_pays(monkeypatch, seq_lens, num_tokens, least, want):
    monkeypatch.setattr(shared_prefix, "LEAST_SAVED_BYTES", least)
    table = [[7, 8, 1, 2], [7, 8, 3, 4], [7, 8, 5, 2]]
    assert shared_blocks(plan_of(table, seq_lens, num_tokens), LAYOUT) == want
    assert shared_blocks(plan_of(table[:1], [16]), LAYOUT) == 0


@given(
    st.lists(st.lists(st.integers(1, 2), min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(1, 24),
    st.integers(1, 12 * LAYER_BLOCK),
)
def test_it_is_the_longest_common_beginning(table, shortest, least):
    common = 0
    while common < (shortest - 1) // 4 and len({row[common] for row in table}) == 1:
        common += 1
    pays = len(table) > 1 and common * (len(table) - 1) * LAYER_BLOCK >= least
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefix, "LEAST_SAVED_BYTES", least)
        assert shared_blocks(plan_of(table, [shortest] + [24] * (len(table) - 1)), LAYOUT) == (common if pays else 0)

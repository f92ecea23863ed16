"""Whatever is handed to the engine: the right error with its numbers, nothing held, and the next request is answered
as ever.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from greedy import run_all
from models import VOCAB_SIZE, save_tiny_model
from pagedcore import SamplingParams
from pagedcore import models as pagedcore_models
from pagedcore.engine import Engine
from pagedcore.errors import (
    ClosedError,
    DuplicateRequestError,
    InvalidArgumentError,
    PagedCoreError,
    RequestTooLargeError,
    TokenOutOfRangeError,
    UnknownRequestError,
    UnsupportedError,
)

PROMPT = [5, 6, 7, 8, 9]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return pagedcore_models.load(save_tiny_model("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def expected(loaded):
    with Engine(loaded, num_blocks=40) as engine:
        return run_all(engine, {"x": (PROMPT, PARAMS)})["x"]


@pytest.fixture
def engine(loaded):
    with Engine(loaded, num_blocks=40, max_num_seqs=8, max_model_len=200, max_num_batched_tokens=64) as engine:
        yield engine


BAD_PROMPTS = [
    ([], InvalidArgumentError, "empty: 0 tokens"),
    (np.array([], dtype=np.int32), InvalidArgumentError, "empty"),
    (torch.tensor([], dtype=torch.long), InvalidArgumentError, "empty"),
    (
        [5, VOCAB_SIZE],
        TokenOutOfRangeError,
        rf"token {VOCAB_SIZE} at position 1 is outside the vocabulary \[0, {VOCAB_SIZE}\)",
    ),
    ([-1], TokenOutOfRangeError, "token -1 at position 0"),
    ([5, 2**63 - 1], TokenOutOfRangeError, "token 9223372036854775807"),
    ([2**64 - 1], TokenOutOfRangeError, "position 0"),
    ([2**200], InvalidArgumentError, "prompt"),
    (np.array([2**64 - 1], dtype=np.uint64), TokenOutOfRangeError, "position 0"),
    ([1.0, 2.0], InvalidArgumentError, "float64"),
    ([True, False], InvalidArgumentError, "bool"),
    (["a"], InvalidArgumentError, "token ids are integers"),
    ([[1, 2], [3, 4]], InvalidArgumentError, r"shape \(2, 2\)"),
    ([[1, 2], [3]], InvalidArgumentError, "not a flat sequence"),
    ([None], InvalidArgumentError, "object"),
    (np.array(5), InvalidArgumentError, "prompt"),
    (torch.ones(3), InvalidArgumentError, "float32"),
    (b"bytes", InvalidArgumentError, "bytes"),
    ({1: 2}, InvalidArgumentError, "dict"),
    ({1, 2}, InvalidArgumentError, "set"),
    (None, InvalidArgumentError, "NoneType"),
    (7, InvalidArgumentError, "int"),
    ("text", UnsupportedError, "has no tokenizer"),
    ([5] * 200, RequestTooLargeError, "200 tokens; with max_model_len 200 it can have at most 199"),
    ([5] * 100_000, RequestTooLargeError, "100000 tokens"),
]


@pytest.mark.parametrize(("prompt", "error", "message"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_bad_prompts(engine, expected, prompt, error, message):
    before = engine.stats()
    with pytest.raises(error, match=message) as caught:
        engine.add_request("bad", prompt, PARAMS)
    assert isinstance(caught.value, PagedCoreError)
    assert isinstance(caught.value, ValueError)
    assert engine.stats() == before
    assert not engine.has_unfinished
    assert run_all(engine, {"bad": (PROMPT, PARAMS)})["bad"] == expected


@pytest.mark.parametrize(
    ("request_id", "params", "error", "message"),
    [
        ("", None, InvalidArgumentError, "not a non-empty string"),
        (None, None, InvalidArgumentError, "not a non-empty string"),
        (7, None, InvalidArgumentError, "not a non-empty string"),
        (b"x", None, InvalidArgumentError, "not a non-empty string"),
        ("x", {"max_tokens": 5}, InvalidArgumentError, "not SamplingParams"),
        ("x", 5, InvalidArgumentError, "not SamplingParams"),
        (
            "x",
            SamplingParams(stop_token_ids=(VOCAB_SIZE,)),
            TokenOutOfRangeError,
            f"stop_token_ids: token {VOCAB_SIZE}",
        ),
        ("x", SamplingParams(n=9), PagedCoreError, "9"),
        ("x", SamplingParams(n=8, max_tokens=150), RequestTooLargeError, "39"),
    ],
)
def test_bad_requests(engine, expected, request_id, params, error, message):
    before = engine.stats()
    with pytest.raises(error, match=message):
        engine.add_request(request_id, PROMPT, params)
    assert engine.stats() == before
    assert run_all(engine, {"x": (PROMPT, PARAMS)})["x"] == expected


def test_repeated_and_unknown_ids(engine, expected):
    engine.add_request("a", PROMPT, PARAMS)
    before = engine.stats()
    with pytest.raises(DuplicateRequestError, match="'a' is still running") as caught:
        engine.add_request("a", [1, 2, 3], PARAMS)
    assert caught.value.request_id == "a"
    for unknown in ("b", "", None, 3):
        with pytest.raises(UnknownRequestError) as missing:
            engine.abort(unknown)
        assert isinstance(missing.value, KeyError)
    assert engine.stats() == before
    assert engine.num_unfinished == 1
    while engine.has_unfinished:
        last = engine.step()
    assert last[0].outputs[0].token_ids == expected[0]
    with pytest.raises(UnknownRequestError):
        engine.abort("a")
    assert run_all(engine, {"a": (PROMPT, PARAMS)})["a"] == expected, "an id can be used again"


def test_an_id_is_in_use_until_its_end_was_told(engine, expected):
    """Otherwise the last output of one request would be lost behind the first of another."""
    engine.add_request("a", PROMPT, PARAMS)
    while engine.num_unfinished:
        assert engine.step(only=()) == []
    assert engine.in_use("a")
    with pytest.raises(DuplicateRequestError, match=r"'a' has ended, and nobody was told .*call step") as caught:
        engine.add_request("a", PROMPT, PARAMS)
    assert caught.value.request_id == "a"
    (output,) = engine.step()
    assert output.finished
    assert output.outputs[0].token_ids == expected[0]
    assert not engine.in_use("a")
    assert run_all(engine, {"a": (PROMPT, PARAMS)})["a"] == expected


def test_prepared_twice_is_added_once(engine, expected):
    first, second = (engine.prepare("a", PROMPT, PARAMS) for _ in range(2))
    engine.add_prepared(first)
    with pytest.raises(DuplicateRequestError, match="'a' is still running"):
        engine.add_prepared(second)
    last = []
    while engine.has_unfinished:
        last = engine.step()
    assert last[0].outputs[0].token_ids == expected[0]


def test_one_id_is_no_set_of_ids(engine):
    with pytest.raises(InvalidArgumentError, match="only is 'a1', not a set of request ids"):
        engine.step(only="a1")
    assert engine.step(only={"a1"}) == []


def test_steps_without_requests(engine):
    assert engine.step() == []
    assert not engine.has_unfinished


@pytest.mark.parametrize("after", [0, 1, 3])
def test_abort(engine, expected, after):
    engine.add_request("a", PROMPT * 20, SamplingParams(max_tokens=50, n=2, ignore_eos=True))
    for _ in range(after):
        engine.step()
    output = engine.abort("a")
    assert output.finished
    assert [completion.finish_reason for completion in output.outputs] == ["abort", "abort"]
    assert output.metrics.finished_time is not None
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert engine.step() == []
    assert run_all(engine, {"a": (PROMPT, PARAMS)})["a"] == expected


def test_use_after_close(loaded):
    engine = Engine(loaded, num_blocks=40)
    engine.add_request("a", PROMPT, PARAMS)
    engine.step()
    engine.close()
    engine.close()
    for call in (
        engine.step,
        engine.stats,
        engine.__enter__,
        lambda: engine.abort("a"),
        lambda: engine.add_request("b", PROMPT),
    ):
        with pytest.raises(ClosedError, match="closed"):
            call()
    for name in ("scheduler", "tokenizer"):
        with pytest.raises(ClosedError):
            getattr(engine, name)
    assert not engine.has_unfinished
    assert engine.closed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 2.5}, "block_size is 2.5, not an integer"),
        ({"block_size": True}, "not an integer"),
        ({"num_blocks": 1}, r"num_blocks is 1; it must be in \[2, "),
        ({"num_blocks": -3}, "num_blocks is -3"),
        ({"num_blocks": 2**31}, "num_blocks is 2147483648"),
        ({"num_blocks": 10, "kv_cache_memory": 100}, "both given"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"max_model_len": 1}, "max_model_len is 1"),
        ({"max_model_len": 100_000}, "max_model_len is 100000, but the model has 512 positions"),
        ({"kv_cache_memory": 0}, "0 bytes"),
        ({"kv_cache_memory": -1}, "-1 bytes"),
        ({"kv_cache_memory": 100}, "100 bytes holds 0 blocks"),
        ({"kv_cache_memory": 2**60}, "are available"),
        ({"kv_cache_memory": 1.5}, r"share of the available memory, in \(0, 1\)"),
        ({"kv_cache_memory": float("nan")}, r"in \(0, 1\)"),
        ({"kv_cache_memory": "2GB"}, "bytes"),
    ],
)
def test_bad_options(loaded, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Engine(loaded, **options)


def test_memory_decides_the_number_of_blocks(loaded):
    with Engine(loaded, kv_cache_memory=2**20) as engine:
        assert (
            (engine.stats().num_blocks + 1) * engine.layout.block_bytes
            <= 2**20
            < (engine.stats().num_blocks + 2) * engine.layout.block_bytes
        )
    with Engine(loaded, max_num_seqs=2, kv_cache_memory=0.9) as engine:
        assert engine.stats().num_blocks == 2 * 512 // 16, "no more than two sequences of 512 tokens can use"
    with Engine(loaded, num_blocks=5) as engine:
        assert engine.max_model_len == 4 * 16, "no longer than the pool"
        assert engine.stats().num_blocks == 4


class TestFaults:
    """One request's fault is its own."""

    def test_logits_that_are_no_numbers(self, tmp_path):
        """Token 77 poisons every row that sees it: the request with it ends, its companions do not notice."""
        loaded = pagedcore_models.load(save_tiny_model("llama", tmp_path))
        good = {"a": (PROMPT, PARAMS), "c": ([*range(3, 40)], PARAMS)}
        with Engine(loaded, num_blocks=40) as engine:
            alone = run_all(engine, good)
        with torch.no_grad():
            loaded.module.get_input_embeddings().weight[77] = float("nan")
        with Engine(loaded, num_blocks=40) as engine:
            bad = [*range(3, 40), 77]
            requests = {"a": good["a"], "b": (bad, SamplingParams(max_tokens=6, n=2)), "c": good["c"]}
            for request_id, (prompt, params) in requests.items():
                engine.add_request(request_id, prompt, params)
            last = {}
            while engine.has_unfinished:
                last |= {output.request_id: output for output in engine.step()}
            assert [completion.finish_reason for completion in last["b"].outputs] == ["error", "error"]
            assert "not finite" in last["b"].error
            assert last["b"].finished
            for request_id in ("a", "c"):
                assert last[request_id].error is None
                assert [last[request_id].outputs[0].token_ids] == alone[request_id]
            # What it computed was not published: the same prefix without the bad token is as good as ever.
            assert run_all(engine, {"c": good["c"]})["c"] == alone["c"]
            assert engine.stats().blocks_used == 0

    def test_a_step_that_raises(self, engine, expected, monkeypatch):
        """The requests of that step end; those that wait are answered."""
        engine.add_request("a", PROMPT, PARAMS)
        engine.step()
        execute = engine._runner.execute
        monkeypatch.setattr(engine._runner, "execute", lambda *_: 1 / 0)
        (output,) = engine.step()
        assert output.request_id == "a"
        assert output.finished
        assert "ZeroDivisionError" in output.error
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].token_ids == expected[0][:1], "what it had is kept"
        monkeypatch.setattr(engine._runner, "execute", execute)
        assert engine.stats().blocks_used == 0
        assert run_all(engine, {"a": (PROMPT, PARAMS)})["a"] == expected

    def test_an_interrupted_step_is_done_again(self, engine, expected, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        execute = engine._runner.execute
        tokens = []
        engine.add_request("a", PROMPT, PARAMS)
        while engine.has_unfinished:
            monkeypatch.setattr(engine._runner, "execute", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
            monkeypatch.setattr(engine._runner, "execute", execute)
            for output in engine.step():
                tokens += output.outputs[0].new_token_ids
        assert tokens == expected[0]

    def test_a_detokenizer_that_raises(self, engine, expected):
        class Broken:
            def after(self, state, token, *, last=False):
                raise RuntimeError("no such token")

        engine.add_request("a", PROMPT, PARAMS)
        engine.add_request("b", PROMPT[::-1], PARAMS)
        engine._requests["b"].sequences[0].detokenizer = Broken()
        last = {}
        while engine.has_unfinished:
            last |= {output.request_id: output for output in engine.step()}
        assert last["b"].outputs[0].finish_reason == "error"
        assert "no such token" in last["b"].error
        assert last["a"].outputs[0].token_ids == expected[0]
        assert engine.stats().blocks_used == 0

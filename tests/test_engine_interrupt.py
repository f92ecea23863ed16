"""Ctrl-C at every point of a step: nothing is lost, nothing is told twice, and the answers are those of a quiet run."""

from __future__ import annotations

import contextlib
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pagedcore
import pytest
import torch
from models import VOCAB_SIZE, save_tiny_model
from pagedcore import Engine, SamplingParams
from pagedcore import models as pagedcore_models
from pagedcore.errors import DuplicateRequestError, UnknownRequestError
from pagedcore.tokenizer import Detokenizer

REQUESTS = {
    "greedy": ([5, 6, 7, 8, 9], SamplingParams(max_tokens=3, ignore_eos=True)),
    "several": ([*range(3, 30)], SamplingParams(max_tokens=4, n=2, temperature=1.0, seed=7, ignore_eos=True)),
    "stopped": ([40, 41], SamplingParams(max_tokens=6, stop=("g",), ignore_eos=True)),
}
#: Where the engine keeps its books. What the model does in between changes nothing of them.
FILES = {
    str(Path(pagedcore.__file__).with_name(f"{name}.py"))
    for name in ("engine", "flight", "outputs", "request", "runner", "sampling", "stop_strings", "tokenizer")
}


class Letters:
    """A tokenizer for models that have none: each token is a letter."""

    eos_token_id = None

    def decode(self, token_ids):
        return "".join(chr(97 + token % 26) for token in token_ids)

    def detokenizer(self):
        return Detokenizer(self.decode)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model whose next token is a matter of the last one: quick, as it runs some thousand steps here."""
    model = pagedcore_models.load(save_tiny_model("llama", tmp_path_factory.mktemp("llama")))
    table = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 3

    def forward(input_ids, logits_to_keep, **_):
        return SimpleNamespace(logits=table[input_ids[:, logits_to_keep]])

    return replace(model, module=forward, tokenizer=Letters())


class InterruptAt:
    """Raises KeyboardInterrupt at the nth call, or return from compiled code, that the engine's Python code makes; with
    ``times`` at the calls after it too.
    """

    def __init__(self, place, times=1):
        self.left, self.last = place, 1 - times

    def __call__(self, frame, event, argument):
        if event == "return" or frame.f_code.co_filename not in FILES:
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR:  # may be closing, where Python ignores what is raised
            return
        self.left -= 1
        if self.last <= self.left <= 0:
            raise KeyboardInterrupt

    def __enter__(self):
        sys.setprofile(self)

    def __exit__(self, *_):
        sys.setprofile(None)


def add_all(engine):
    for request_id, (prompt, params) in REQUESTS.items():
        engine.add_request(request_id, prompt, params)


def collect(told, outputs):
    for output in outputs:
        for completion in output.outputs:
            tokens, text, ends = told.setdefault((output.request_id, completion.index), ([], [], []))
            tokens.extend(completion.new_token_ids)
            text.append(completion.new_text)
        if output.finished:
            for completion in output.outputs:
                tokens, text, ends = told[output.request_id, completion.index]
                ends.append(completion.finish_reason)
                assert completion.token_ids == tokens
                assert completion.text == "".join(text)


@pytest.fixture(scope="module")
def quiet(loaded):
    told = {}
    with Engine(loaded, num_blocks=40, max_num_batched_tokens=20) as engine:
        add_all(engine)
        while engine.has_unfinished:
            collect(told, engine.step())
    assert all(len(ends) == 1 for _, _, ends in told.values())
    assert told["stopped", 0][2] == ["stop"], "the answer with the stop string is cut"
    return told


def interrupted_run(loaded, place):
    """Interrupts each step once, at the same place, and lets it finish. Returns what was told, and how often."""
    told, interrupts = {}, 0
    with Engine(loaded, num_blocks=40, max_num_batched_tokens=20) as engine:
        add_all(engine)
        while engine.has_unfinished:
            try:
                with InterruptAt(place):
                    outputs = engine.step()
            except KeyboardInterrupt:
                interrupts += 1
                outputs = engine.step()
            collect(told, outputs)
        assert engine.stats().blocks_used == 0
        engine.scheduler.check()
    return told, interrupts


def test_a_step_can_be_interrupted_anywhere(loaded, quiet):
    place, interrupts = 1, 1
    while interrupts:
        told, interrupts = interrupted_run(loaded, place)
        assert {key: (tokens, "".join(text), ends) for key, (tokens, text, ends) in told.items()} == {
            key: (tokens, "".join(text), ends) for key, (tokens, text, ends) in quiet.items()
        }, f"interrupted at call {place}"
        place += 1
    assert place > 50, "there was much to interrupt"


@pytest.mark.parametrize("times", [1, 2, 3])
def test_an_add_can_be_interrupted_anywhere(loaded, quiet, times):
    """It is added or it is not, also if the clean-up is interrupted as well; and the engine goes on."""
    place, interrupted = 1, True
    while interrupted:
        interrupted = False
        told = {}
        with Engine(loaded, num_blocks=40, max_num_batched_tokens=20) as engine:
            engine.add_request("greedy", *REQUESTS["greedy"])
            collect(told, engine.step())
            try:
                with InterruptAt(place, times):
                    engine.add_request("several", *REQUESTS["several"])
            except KeyboardInterrupt:
                interrupted = True
                with contextlib.suppress(DuplicateRequestError):
                    engine.add_request("several", *REQUESTS["several"])
            engine.add_request("stopped", *REQUESTS["stopped"])
            while engine.has_unfinished:
                collect(told, engine.step())
            assert engine.stats().waiting == engine.stats().blocks_used == 0, f"interrupted at call {place}"
            engine.scheduler.check()
        assert told == quiet, f"interrupted at call {place}"
        place += 1
    assert place > 10


def test_an_end_can_be_interrupted_anywhere(loaded, quiet):
    """abort, and the step in which a request ends because its forward pass failed."""
    place, interrupted = 1, True
    while interrupted:
        interrupted = False
        with Engine(loaded, num_blocks=40) as engine:
            add_all(engine)
            told = {}
            collect(told, engine.step())
            try:
                with InterruptAt(place):
                    outputs = [engine.abort("several")]
            except KeyboardInterrupt:
                interrupted, outputs = True, []
                with contextlib.suppress(UnknownRequestError):  # it had ended; the news waits for step
                    outputs = [engine.abort("several")]
            collect(told, outputs)
            while engine.has_unfinished:
                collect(told, engine.step())
            assert engine.stats().blocks_used == 0
        for index in (0, 1):
            tokens, _, ends = told["several", index]
            assert ends == ["abort"], f"interrupted at call {place}"
            assert tokens == quiet["several", index][0][: len(tokens)]
        for other in ("greedy", "stopped"):
            assert told[other, 0][0] == quiet[other, 0][0], f"interrupted at call {place}"
        place += 1
    assert place > 10


def test_a_failed_step_can_be_interrupted_anywhere(loaded, monkeypatch):
    place, interrupted = 1, True
    while interrupted:
        interrupted = False
        with Engine(loaded, num_blocks=40) as engine:
            add_all(engine)
            engine.step()
            execute = engine._runner.execute
            engine._runner.execute = lambda *_: 1 / 0
            ends = []
            try:
                with InterruptAt(place):
                    outputs = engine.step()
            except KeyboardInterrupt:
                interrupted = True
                outputs = engine.step()
            ends += [output for output in outputs if output.finished]
            engine._runner.execute = execute
            while engine.has_unfinished:
                ends += [output for output in engine.step() if output.finished]
            assert sorted(output.request_id for output in ends) == sorted(REQUESTS), f"interrupted at call {place}"
            assert all("ZeroDivisionError" in output.error for output in ends)
            assert engine.stats().blocks_used == 0
        place += 1
    assert place > 10


def test_discard_after_an_interrupt(loaded):
    """The clean-up of `LLM.generate`: whatever was interrupted, nothing is left, and the engine goes on."""
    for place in range(1, 400, 7):
        with Engine(loaded, num_blocks=40) as engine:
            add_all(engine)
            engine.step()
            with contextlib.suppress(KeyboardInterrupt), InterruptAt(place):
                engine.step()
            for request_id in REQUESTS:
                engine.discard(request_id)
                engine.discard(request_id)
            assert not engine.has_unfinished
            assert engine.stats().blocks_used == 0
            assert engine.step() == []

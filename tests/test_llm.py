"""The two calls most people need, and the command line around them."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from greedy import Reference
from models import VOCAB_SIZE, save_tiny_model
from pagedcore import LLM, SamplingParams, cli
from pagedcore import models as pagedcore_models
from pagedcore.errors import (
    ClosedError,
    InvalidArgumentError,
    TokenOutOfRangeError,
    UnknownRequestError,
    UnsupportedError,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def llm(tiny):
    with LLM(tiny, num_blocks=100) as llm:
        yield llm


@pytest.fixture(scope="module")
def smollm2_loaded(smollm2):
    return pagedcore_models.load(smollm2)


@pytest.fixture(scope="module")
def reference(smollm2):
    return Reference(smollm2)


class TestTokenIds:
    """A model without a tokenizer."""

    def test_kinds_of_prompts(self, llm):
        params = SamplingParams(max_tokens=4)
        ids = [5, 6, 7]
        (one,) = llm.generate(ids, params)
        assert one.prompt is None
        assert one.prompt_token_ids == ids
        assert one.outputs[0].text == ""
        wanted = one.outputs[0].token_ids
        for prompts in ([ids], [np.array(ids)], np.array([ids, ids]), np.array(ids), [tuple(ids)]):
            for output in llm.generate(prompts, params):
                assert output.outputs[0].token_ids == wanted
        assert llm.generate([], params) == []

    def test_order_and_params_for_each(self, llm):
        prompts = [[3 + i] * (1 + 7 * i) for i in range(9)]
        params = [SamplingParams(max_tokens=1 + i, n=1 + i % 3, ignore_eos=True) for i in range(9)]
        outputs = llm.generate(prompts, params)
        for i, output in enumerate(outputs):
            assert output.prompt_token_ids == prompts[i]
            assert [completion.index for completion in output.outputs] == list(range(1 + i % 3))
            assert all(completion.num_tokens == 1 + i for completion in output.outputs)
            assert output.finished
            assert 0 < output.metrics.queue_time <= output.metrics.time_to_first_token <= output.metrics.finished_time

    def test_an_output_does_not_change_after_it_was_given_out(self, llm):
        llm.engine.add_request("a", [5, 6, 7], SamplingParams(max_tokens=5, ignore_eos=True))
        outputs = []
        while llm.engine.has_unfinished:
            outputs += llm.engine.step()
        assert [output.metrics.finished_time is None for output in outputs] == [True] * 4 + [False]
        assert [output.outputs[0].num_tokens for output in outputs] == [1, 2, 3, 4, 5]

    def test_stop_tokens(self, llm):
        full = llm.generate([5, 6, 7], SamplingParams(max_tokens=10, ignore_eos=True))[0].outputs[0]
        stop = full.token_ids[4]
        cut = llm.generate([5, 6, 7], SamplingParams(max_tokens=10, ignore_eos=True, stop_token_ids=(stop,)))[
            0
        ].outputs[0]
        first = full.token_ids.index(stop)
        assert cut.token_ids == full.token_ids[: first + 1]
        assert (cut.finish_reason, full.finish_reason) == ("stop", "length")

    def test_stop_strings_need_text(self, llm):
        with pytest.raises(UnsupportedError, match="no text to stop at") as caught:
            llm.generate([5, 6, 7], SamplingParams(stop="x"))
        assert caught.value.argument == "stop"

    def test_seeds(self, llm):
        hot = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True, "n": 3}
        outputs = llm.generate([[5, 6, 7]] * 4, [SamplingParams(**hot, seed=seed) for seed in (1, 1, 2, None)])
        ids = [[completion.token_ids for completion in output.outputs] for output in outputs]
        assert ids[0] == ids[1]
        assert ids[0] != ids[2]
        assert len({tuple(answer) for answer in ids[0]}) == 3

    def test_one_bad_prompt_stops_all_before_they_run(self, llm):
        before = llm.engine.stats()
        with pytest.raises(TokenOutOfRangeError):
            llm.generate([[5], [VOCAB_SIZE]])
        with pytest.raises(InvalidArgumentError, match="2 params for 1 prompts"):
            llm.generate([[5]], [SamplingParams()] * 2)
        for prompts in (None, 7, b"x", {"prompt": "x"}):
            with pytest.raises(InvalidArgumentError):
                llm.generate(prompts)
        with pytest.raises(InvalidArgumentError, match="not SamplingParams"):
            llm.generate([[5]], {"n": 2})
        with pytest.raises(UnsupportedError, match="no tokenizer"):
            llm.generate("text")
        with pytest.raises(UnsupportedError, match="no tokenizer"):
            llm.chat([{"role": "user", "content": "hi"}])
        assert llm.engine.stats() == before

    def test_an_interrupt_takes_its_requests_along(self, llm, monkeypatch):
        step = llm.engine.step
        calls = iter(range(3))

        def interrupted(only=None):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return step(only)

        monkeypatch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5, 6], [7, 8]])
        assert not llm.engine.has_unfinished
        assert llm.engine.stats().blocks_used == 0
        monkeypatch.setattr(llm.engine, "step", step)
        assert len(llm.generate([5, 6])) == 1

    def test_other_requests_of_the_engine_are_left_alone(self, llm):
        llm.engine.add_request("mine", [9, 9, 9], SamplingParams(max_tokens=50, ignore_eos=True))
        assert len(llm.generate([5, 6], SamplingParams(max_tokens=3))) == 1
        assert llm.engine.num_unfinished == 1

    def test_other_requests_get_all_their_news(self, llm):
        """Also those that end while `generate` steps the engine: it tells nobody what is not theirs."""
        (alone,) = llm.generate([9, 9, 9], SamplingParams(max_tokens=5, ignore_eos=True))
        llm.engine.add_request("mine", [9, 9, 9], SamplingParams(max_tokens=5, ignore_eos=True))
        llm.generate([5, 6], SamplingParams(max_tokens=20, ignore_eos=True))
        assert llm.engine.num_unfinished == 0
        assert llm.engine.has_unfinished
        (output,) = llm.engine.step()
        assert output.request_id == "mine"
        assert output.finished
        assert output.outputs[0].new_token_ids == alone.outputs[0].token_ids
        assert not llm.engine.has_unfinished

    def test_a_prompt_that_somebody_aborts(self, llm, monkeypatch):
        step = llm.engine.step

        def aborting(only=None):
            if "llm-1" in llm.engine._requests:
                llm.engine.abort("llm-1")
            return step(only)

        monkeypatch.setattr(llm.engine, "step", aborting)
        with pytest.raises(UnknownRequestError, match="1 of 2 prompts got no answer, 'llm-1' first"):
            llm.generate([[5, 6], [7, 8]], SamplingParams(max_tokens=3))
        assert not llm.engine.has_unfinished

    def test_a_prompt_that_somebody_aborts_beside_others(self, llm, monkeypatch):
        """Neither news that somebody has not fetched nor a request that still runs is a reason to step on."""
        step, steps = llm.engine.step, iter(range(20))

        def aborting(only=None):
            if next(steps) == 2:  # an endless loop ends here, with a StopIteration
                llm.engine.abort("llm-0")
            return step(only)

        monkeypatch.setattr(llm.engine, "step", aborting)
        llm.engine.add_request("ended", [9, 9, 9], SamplingParams(max_tokens=1))
        llm.engine.add_request("running", [9, 9, 8], SamplingParams(max_tokens=90, ignore_eos=True))
        with pytest.raises(UnknownRequestError, match="1 of 1 prompts got no answer, 'llm-0' first"):
            llm.generate([5, 6], SamplingParams(max_tokens=30, ignore_eos=True))
        assert next(steps) == 3
        assert llm.engine.num_unfinished == 1
        (ended, *_) = step()
        assert (ended.request_id, ended.finished) == ("ended", True)

    def test_ids_that_others_use(self, llm):
        """`generate` makes up ids, and passes over those that are taken."""
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        for request_id in ("llm-1", "llm-2"):
            llm.engine.add_request(request_id, [9, 9, 9], params)
        outputs = llm.generate([[5, 6], [7, 8]], params)
        assert [output.request_id for output in outputs] == ["llm-0", "llm-3"]
        assert {output.request_id for output in llm.engine.step()} == {"llm-1", "llm-2"}

    def test_close(self, tiny):
        llm = LLM(tiny, num_blocks=10)
        llm.close()
        llm.close()
        with pytest.raises(ClosedError):
            llm.generate([5])
        with pytest.raises(ClosedError):
            llm.chat([{"role": "user", "content": "hi"}])
        with pytest.raises(ClosedError), llm:
            pass


class TestSmolLM2:
    """Real text."""

    QUESTIONS = ("What is the capital of France?", "Name a colour.", "Count from one to five.")

    @pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 135), (16, 12), (64, 5)])
    def test_greedy_tokens_are_those_of_transformers(self, smollm2_loaded, reference, block_size, num_blocks):
        """In chunks, with prefix hits, with n > 1, and with so few blocks that requests are preempted."""
        tokenizer = smollm2_loaded.tokenizer
        system = {"role": "system", "content": "You answer the questions of visitors in one short sentence. " * 5}
        texts = (
            "Once upon a time, there was a little girl who lived in",
            "def fibonacci(n):\n    if n <= 1:\n        return",
            "The three largest cities of France, by population, are Paris,",
            "To make a good cup of tea you need fresh water and",
            "In the year 1969, for the first time, two people",
        )
        prompts = [tokenizer.encode(text) for text in texts]
        prompts += [tokenizer.encode_chat([system, {"role": "user", "content": text}]) for text in self.QUESTIONS[:2]]
        params = [SamplingParams(max_tokens=24, n=2 if i == 5 else 1, ignore_eos=i < 5) for i in range(len(prompts))]
        with LLM(
            smollm2_loaded,
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_seqs=6,
            max_num_batched_tokens=48,
        ) as llm:
            for i, output in enumerate(llm.generate(prompts, params)):
                for completion in output.outputs:
                    reference.check(prompts[i], completion.token_ids, 24, () if params[i].ignore_eos else {2})
            stats = llm.engine.stats()
            assert stats.prefix_hit_tokens > 0
            # With 64 no answer outgrows the block that each is granted ahead; test_engine_greedy.py has longer ones.
            assert stats.preemptions > 0 or block_size == 64

    def test_chat(self, smollm2_loaded):
        with LLM(smollm2_loaded, num_blocks=100) as llm:
            conversations = [[{"role": "user", "content": question}] for question in self.QUESTIONS]
            outputs = llm.chat(conversations, SamplingParams(max_tokens=30))
            assert "Paris" in outputs[0].outputs[0].text
            assert outputs[0].outputs[0].finish_reason == "stop"
            assert not outputs[0].outputs[0].text.endswith("<|im_end|>")
            (alone,) = llm.chat(conversations[0], SamplingParams(max_tokens=30))
            assert alone.outputs[0].text == outputs[0].outputs[0].text
            for messages in (
                [],
                "hi",
                [[]],
                [{"role": "user"}],
                [{"content": "x"}],
                [["hi"]],
                {"role": "user", "content": "x"},
                [5],
                None,
            ):
                with pytest.raises(InvalidArgumentError):
                    llm.chat(messages)
            with pytest.raises(InvalidArgumentError, match="empty"):
                llm.generate("")
            with pytest.raises(InvalidArgumentError, match="prompt"):
                llm.generate("\ud800")

    def test_stop_strings(self, smollm2_loaded):
        """The text ends before the first one, whatever tokens it is made of, and what might be one waits."""
        params = {"max_tokens": 14, "ignore_eos": True}
        with LLM(smollm2_loaded, num_blocks=100) as llm:
            prompt = "One, two, three, four,"
            full = llm.generate(prompt, SamplingParams(**params))[0].outputs[0]
            for stop in (full.text[9:12], full.text[-6:], full.text[0]):
                (output,) = llm.generate(prompt, SamplingParams(**params, stop=[stop, "never"]))
                completion = output.outputs[0]
                assert completion.text == full.text[: full.text.index(stop)]
                assert completion.finish_reason == "stop"
                assert completion.token_ids == full.token_ids[: completion.num_tokens]
                assert stop in llm.engine.tokenizer.decode(completion.token_ids)
            llm.engine.add_request("a", prompt, SamplingParams(**params, stop=full.text[4:20]))
            streamed = ""
            while llm.engine.has_unfinished:
                streamed += "".join(output.outputs[0].new_text for output in llm.engine.step())
            assert streamed == full.text[:4], "nothing of the stop string was ever given out"
            (never,) = llm.generate(prompt, SamplingParams(**params, stop=full.text[-5:] + "?"))
            assert never.outputs[0].text == full.text, "what waited is given out at the end"
            assert llm.engine.stats().blocks_used == 0

    def test_streamed_text_is_the_text(self, smollm2_loaded):
        with LLM(smollm2_loaded, num_blocks=100) as llm:
            engine = llm.engine
            engine.add_request("a", "Grüße aus 東京: 😀 是", SamplingParams(max_tokens=25, temperature=1.0, seed=3))
            streamed, texts = "", []
            while engine.has_unfinished:
                for output in engine.step():
                    streamed += output.outputs[0].new_text
                    texts.append((output.outputs[0], output.outputs[0].text))
            assert streamed == output.outputs[0].text
            assert all(completion.text == then for completion, then in texts), (
                "an output does not change after it was given"
            )


class TestCommandLine:
    def run(self, *arguments, stdin="", env=None):
        return subprocess.run(
            [sys.executable, "-m", "pagedcore", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
            env=env,
        )

    def test_generate(self, smollm2):
        done = self.run(
            "generate",
            "--model",
            str(smollm2),
            "--chat",
            "--max-tokens",
            "20",
            "--stop",
            "is Paris",
            "--stop",
            ".",
            "--kv-memory",
            "64MiB",
            "What is the capital of France?",
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "The capital of France \n"
        assert done.stderr == f"loading {smollm2} ...\n"  # it takes seconds, terminal or not

    def test_generate_many_as_json(self, smollm2, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("One, two,\n\nThe sky is\n"))
        assert (
            cli.main(
                ["generate", "--model", str(smollm2), "--max-tokens", "4", "--n", "2", "--json", "--kv-memory", "64MiB"]
            )
            == 0
        )
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["prompt"] for line in lines] == ["One, two,", "The sky is"]
        assert all(len(answer["token_ids"]) <= 4 for line in lines for answer in line["outputs"])
        assert [answer["index"] for answer in lines[0]["outputs"]] == [0, 1]

    def test_errors(self, capsys, monkeypatch, tiny):
        assert cli.main(["generate", "--model", "/no/such/model", "x"]) == 1
        assert "does not exist" in capsys.readouterr().err
        assert cli.main(["generate", "--model", str(tiny), "--max-tokens", "0", "x"]) == 1
        assert "max_tokens is 0" in capsys.readouterr().err
        assert cli.main(["generate", "--model", str(tiny), "--stop", "", "x"]) == 1
        assert "no text to stop at" in capsys.readouterr().err
        assert cli.main(["generate", "--model", str(tiny), "x"]) == 1
        assert "no tokenizer" in capsys.readouterr().err
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert cli.main(["generate", "--model", str(tiny)]) == 2
        assert "no prompts" in capsys.readouterr().err
        for usage in ([], ["fly"], ["generate"], ["generate", "--model", "m", "--kv-memory", "lots", "x"]):
            with pytest.raises(SystemExit) as caught:
                cli.main(usage)
            assert caught.value.code == 2

    def test_info(self, capsys):
        assert cli.main(["info"]) == 0
        out = capsys.readouterr().out
        assert "PAGEDCORE_CPU_ISA" in out
        assert "GiB available" in out
        assert cli.main(["info", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["versions"]["torch"]
        assert facts["kernels"]["threads"] >= 1
        assert facts["memory"]["total"] >= facts["memory"]["available"] > 0

    @pytest.mark.parametrize(
        ("name", "value"),
        [("PAGEDCORE_LOG_LEVEL", "loud"), ("PAGEDCORE_CPU_ISA", "sse9"), ("PAGEDCORE_CPU_IAS", "avx2")],
    )
    def test_bad_environment(self, name, value, monkeypatch, capsys):
        monkeypatch.setenv(name, value)
        assert cli.main(["info"]) == 1
        assert name in capsys.readouterr().err

    def test_starts_without_torch(self):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "pagedcore", "--version"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0
        assert "torch" not in done.stderr
        assert done.stdout.startswith("pagedcore ")

"""What crosses between the host and a device in a step: one copy there, one wait for the tokens. On a device that is
not there (`elsewhere`): on a GPU, tests/device/test_engine_on_device.py has torch itself raise for every other wait.
"""

from __future__ import annotations

from collections import Counter as Counts
from dataclasses import replace

import numpy as np
import pytest
import torch
from elsewhere import DEVICE, Counter, move, put
from models import VOCAB_SIZE, save_tiny_model
from pagedcore import Engine, SamplingParams, Scheduler, SchedulerConfig, models, runner
from pagedcore.sampling import Sampler, sample
from pagedcore.staging import DeviceStaging

VOCAB = 2000  # more than what top-p looks at first

STEPS = {
    "greedy": [SamplingParams()] * 5,
    "whole": [SamplingParams(temperature=1.0)] * 5,
    "top_k": [SamplingParams(temperature=0.7, top_k=k) for k in (2, 5, 50, 500, 7)],
    "top_p": [SamplingParams(temperature=1.0, top_p=p) for p in (0.2, 0.5, 0.9, 0.95, 0.99)],
    "mixed": [
        SamplingParams(temperature=1.0, top_k=300, top_p=0.9),
        SamplingParams(),
        SamplingParams(temperature=1.3),
        SamplingParams(temperature=0.7, top_k=20),
        SamplingParams(temperature=1.0, top_p=0.5),
    ],
}


def make_sampler(params):
    sampler = Sampler(len(params))
    for row, each in enumerate(params):
        sampler.assign(row, each, 10 + row, 0)
    return sampler.draws(np.arange(len(params)), np.arange(len(params)))


def logits(spread):
    return torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1)) * spread


def on_host(values, draws):
    return sample(values, draws, torch.from_numpy(draws.numbers) if draws.numbers.size else None)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampling_sends_nothing_and_waits_once(step, dtype):
    """And gives what the CPU gives: each token is decided by the same rounds, whoever looks at their outcome."""
    draws, values = make_sampler(STEPS[step]), logits(4.0).to(dtype)
    with Counter() as counter:
        there = put(values)
        tokens, failed = sample(there, draws, put(torch.from_numpy(draws.numbers)) if draws.numbers.size else None)
    assert counter.sent == []
    assert len(counter.waits) == 1
    expected, _ = on_host(values, draws)
    np.testing.assert_array_equal(tokens, expected)
    assert not failed.any()


def test_a_flat_row_is_waited_for_once_more():
    """Its best tokens hold less than top_p: the whole row is sorted, and nothing is sent for that."""
    draws, values = make_sampler(STEPS["mixed"]), logits(4.0)
    values[4] *= 1e-3
    values[3, 8] = float("nan")  # fails, and is not waited for
    with Counter() as counter:
        tokens, failed = sample(put(values), draws, put(torch.from_numpy(draws.numbers)))
    assert counter.sent == []
    assert len(counter.waits) == 2
    expected, failures = on_host(values, draws)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(failed, failures)
    assert failed.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_sent_by_one_copy(step, decode):
    """The plan's arrays, the table's changes and what the samples are drawn by."""
    config = {"num_blocks": 200, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64}
    scheduler = Scheduler(SchedulerConfig(**config))
    draws = make_sampler(STEPS[step])
    for number in range(5):
        scheduler.add_request(str(number), list(range(4)), max_tokens=30)
    plan = scheduler.schedule()
    with Counter() as counter:
        staging = DeviceStaging(DEVICE, max_num_tokens=64, max_num_seqs=8, max_blocks=16)
        staging.decode_tensors(8)
        counter.sent.clear()  # what it takes to make them
        if decode:
            staging.stage(plan, draws.numbers)
            scheduler.update(plan.step, np.ones(5, np.int64))
            plan = scheduler.schedule()
            assert plan.num_tokens == plan.num_seqs == 5
            assert len(plan.table_updates)
            counter.sent.clear()
            staged = staging.stage_decode(plan, draws.numbers, 8)
        else:
            staged = staging.stage(plan, draws.numbers)
    assert counter.sent == ["aten.copy_.default"]
    assert counter.waits == []
    assert (staged.numbers is None) == (step == "greedy")
    if staged.numbers is not None:
        np.testing.assert_array_equal(staged.numbers.here.numpy(), draws.numbers)
    np.testing.assert_array_equal(staged.table_updates.here.numpy(), plan.table_updates)


def test_newcomers_with_long_cached_prefixes_are_sent_by_one_copy():
    """As many as begin in one step, each of which changes nearly its whole row of the table."""
    config = {"num_blocks": 900, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 400}
    scheduler = Scheduler(SchedulerConfig(**config))
    prompt = list(range(380))
    for number in range(9):
        scheduler.add_request(str(number), prompt, max_tokens=2)
        if number == 0:  # it computes what the others find
            while scheduler.has_unfinished:
                plan = scheduler.schedule()
                scheduler.update(plan.step, np.ones(len(plan.logits_indices), np.int64))
    with Counter() as counter:
        staging = DeviceStaging(DEVICE, max_num_tokens=64, max_num_seqs=8, max_blocks=100)
        most = 0
        while scheduler.has_unfinished:
            plan = scheduler.schedule()
            most = max(most, len(plan.table_updates))
            counter.sent.clear()
            staged = staging.stage(plan, np.ones((5, len(plan.logits_indices))))
            assert counter.sent == ["aten.copy_.default"]
            if len(plan.table_updates):
                np.testing.assert_array_equal(staged.table_updates.here.numpy(), plan.table_updates)
            scheduler.update(plan.step, np.ones(len(plan.logits_indices), np.int64))
    assert most > 4 * 90


FAMILIES = ("llama", "qwen3", "gemma3", "gpt_oss", "deepseek_v3", "mixtral", "opt", "phi3", "gpt2", "dynamic")
#: Where transformers' own code asks the device for a number in every step: such a model cannot be recorded
#: (docs/engine.md). Experts go through `grouped_mm`, which waits by itself but in bfloat16 on sm_90 and sm_100.
WAITING = {
    "gpt2",  # with a pad token in its configuration: are the first and the last token padding?
    "dynamic",  # a rotary embedding that asks for the longest sequence
}
CHANGES = {"dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}}


def answers(directory, steps):
    """Greedy and sampled tokens of three requests; calls ``steps`` with each step's number."""
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.0, top_p=0.9, seed=1),
        SamplingParams(temperature=0.7, seed=2),
    ]
    random = np.random.default_rng(4)
    tokens = {}
    with Engine(
        models.load(directory, pack_weights=False, device="cpu"), num_blocks=40, max_num_batched_tokens=24
    ) as engine:
        for number, each in enumerate(params):
            prompt = random.integers(3, VOCAB_SIZE, 20).tolist()
            engine.add_request(str(number), prompt, replace(each, max_tokens=5, ignore_eos=True))
        while engine.has_unfinished:
            outputs = engine.step()
            for output in outputs:
                assert not output.error
                tokens.setdefault(output.request_id, []).extend(output.outputs[0].new_token_ids)
            steps(bool(outputs))
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_step_sends_once_and_waits_once(family, tmp_path, monkeypatch):
    """With the model's own pass, as transformers writes it; and the answers are those of the CPU."""
    directory = save_tiny_model({"dynamic": "llama"}.get(family, family), tmp_path, **CHANGES.get(family, {}))
    expected = answers(directory, lambda _: None)

    def make(model, kv, config, *, cuda_graphs):
        move(model.module)
        return runner.DeviceRunner(replace(model, device=DEVICE), kv, config, None)

    monkeypatch.setattr("pagedcore.engine.make_runner", make)
    for module in ("ops", "tensors"):
        monkeypatch.setattr(f"pagedcore.{module}.device_index", lambda _: -1)  # the kernels run on the host
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # wrapped tensors have no views there
    seen = set()
    with Counter() as counter:

        def step(has_samples):
            own = Counts(counter.waits)
            assert own.pop("aten._to_copy.default", 0) == has_samples
            seen.update(own)
            if family not in WAITING:
                assert counter.sent == ["aten.copy_.default"]
            counter.sent.clear()
            counter.waits.clear()

        assert answers(directory, step) == expected
    assert seen == ({"aten._local_scalar_dense.default"} if family in WAITING else set())

"""The engine's way over a device: packed arrays, a block table that takes changes, and recorded decode steps.

The device here is the CPU, and a recording runs its work again: what is tested is all that the host does, with the
same bits as on a GPU. On a GPU the same way is taken by `LLM(device="cuda")`.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from greedy import Reference
from models import VOCAB_SIZE, save_tiny_model
from pagedcore import Engine, SamplingParams, Scheduler, SchedulerConfig, graphs, models, ops, runner, staging
from pagedcore.attention import AttentionStep, LayerCache, paged_attention_forward
from pagedcore.devices import choose_device, runs_on
from pagedcore.draws import NO_DRAWS
from pagedcore.errors import InvalidArgumentError, UnsupportedError

CPU = torch.device("cpu")
NONE = NO_DRAWS.numbers


class Rerun:
    """Records by keeping the work: a replay runs it on whatever its arguments hold by then."""

    def __init__(self):
        self.replays = {}

    def record(self, work):
        result = work().clone()
        batch = len(result)
        self.replays[batch] = 0

        def replay():
            self.replays[batch] += 1
            result.copy_(work())

        return replay, result


class Refuses:
    """Records nothing, as CUDA does not what reads a value back."""

    def record(self, work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore about it")


@pytest.fixture(scope="module", params=["llama", "mistral"])
def directory(request, tmp_path_factory):
    return save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def on_device(monkeypatch):
    """Engines made by this test run as on a device, with this recorder."""

    def use(recorder):
        def make(model, kv, config, *, cuda_graphs):
            return runner.DeviceRunner(model, kv, config, recorder if cuda_graphs else None)

        monkeypatch.setattr("pagedcore.engine.make_runner", make)
        return recorder

    return use


def prompts():
    random = np.random.default_rng(3)
    shared = random.integers(3, VOCAB_SIZE, 40).tolist()
    others = [random.integers(3, VOCAB_SIZE, length).tolist() for length in (1, 2, 7, 16, 17, 33, 70)]
    return [*others, [*shared, 5], [*shared, 6, 7]]


def run(directory, n=1, **options):
    """The answers to all prompts, and the engine's counters at the end."""
    with Engine(directory, max_num_batched_tokens=48, **options) as engine:
        for number, prompt in enumerate(prompts()):
            engine.add_request(str(number), prompt, SamplingParams(max_tokens=20, n=n, ignore_eos=True))
        done = {}
        while engine.has_unfinished:
            for output in engine.step():
                if output.finished:
                    done[int(output.request_id)] = [answer.token_ids for answer in output.outputs]
        engine.scheduler.manager.check()
        return done, engine.stats()


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("recorder", [None, Rerun])
def test_answers_are_those_of_the_model_alone(directory, on_device, recorder, block_size):
    recorder = on_device(recorder and recorder())
    reference = Reference(directory)
    answers, _ = run(directory, max_num_seqs=6, num_blocks=600 // block_size, block_size=block_size)
    for number, prompt in enumerate(prompts()):
        reference.check(prompt, answers[number][0], 20, set())
    if recorder:
        assert sorted(recorder.replays) == [1, 2, 4, 6]
        assert all(recorder.replays[batch] for batch in (4, 6))


def test_preempted_and_forked_rows_follow_their_tables(directory, on_device):
    """Rows that change hands, and blocks that are copied: a table entry that missed a change would read them."""
    on_device(Rerun())
    reference = Reference(directory)
    answers, stats = run(directory, n=3, max_num_seqs=9, num_blocks=75, block_size=2)
    assert stats.preemptions > 0
    assert stats.block_copies > 0
    for number, prompt in enumerate(prompts()):
        for answer in answers[number]:
            reference.check(prompt, answer, 20, set())


def test_steps_that_are_interrupted_are_told_again(directory, on_device, monkeypatch):
    """Before the pass, between the table's changes and the pass, or after it: the next plan repeats what was lost."""
    on_device(Rerun())
    steps = itertools.count()
    execute, prepare = runner.DeviceRunner.execute, runner.Forward.prepare
    interrupted = []

    def interrupt(when):
        interrupted.append(when)
        raise KeyboardInterrupt

    def interrupted_execute(self, plan, numbers):
        self.step = next(steps)
        if self.step % 4 == 1:
            interrupt("before")
        self._forward.step = self.step
        result = execute(self, plan, numbers)
        if self.step % 4 == 3:
            interrupt("after")
        return result

    def interrupted_prepare(self, staged):
        prepare(self, staged)
        if self.step % 4 == 2:
            interrupt("between")

    monkeypatch.setattr(runner.DeviceRunner, "execute", interrupted_execute)
    monkeypatch.setattr(runner.Forward, "prepare", interrupted_prepare)
    step = Engine.step

    def patient_step(self):
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return step(self)

    monkeypatch.setattr(Engine, "step", patient_step)
    reference = Reference(directory)
    answers, stats = run(directory, n=3, max_num_seqs=9, num_blocks=75, block_size=2)
    assert stats.preemptions > 0
    assert {"before", "between", "after"} <= set(interrupted)
    for number, prompt in enumerate(prompts()):
        for answer in answers[number]:
            reference.check(prompt, answer, 20, set())


def test_a_model_that_cannot_be_recorded_runs_without(directory, on_device, caplog):
    on_device(Refuses())
    with caplog.at_level("WARNING"):
        answers, _ = run(directory, max_num_seqs=6, num_blocks=100)
    (warning,) = caplog.records
    assert warning.getMessage() == (
        "decode steps run without CUDA graphs: operation not permitted when stream is capturing"
    )
    reference = Reference(directory)
    reference.check(prompts()[3], answers[3][0], 20, set())


def test_indices_out_of_range_fail_the_step(directory, on_device, monkeypatch):
    """Kernels on a device mask them and say so: no answer is made of such a step."""
    on_device(None)
    monkeypatch.setattr("pagedcore.ops.device_errors", lambda device: ["a block id outside of [0, num_blocks)"])
    with Engine(directory, num_blocks=20) as engine:
        engine.add_request("a", [5, 6, 7], SamplingParams(max_tokens=3))
        (output,) = engine.step()
        assert "the kernels met a block id outside of [0, num_blocks)" in output.error
        assert output.outputs[0].token_ids == []


def test_graphs_can_be_declined(directory, on_device):
    recorder = on_device(Rerun())
    run(directory, max_num_seqs=6, num_blocks=100, cuda_graphs=False)
    assert recorder.replays == {}


def test_batch_sizes():
    assert graphs.batch_sizes(1) == [1]
    assert graphs.batch_sizes(3) == [1, 2, 3]
    assert graphs.batch_sizes(30) == [1, 2, 4, 8, 16, 24, 30]
    for most in (100, 256, 1000):
        sizes = graphs.batch_sizes(most)
        assert sizes[-1] == most
        assert all(a < b <= max(2 * a, a + 8) for a, b in itertools.pairwise(sizes))
        assert len(sizes) < 40


# ------------------------------------------------------------------------------------------------------ staging

CONFIG = {"num_blocks": 200, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64}


def test_what_carries_a_step_imports_nothing_beside_it():
    """It sends the numbers that samples are drawn by, and knows nothing of how tokens are chosen."""
    nodes = ast.walk(ast.parse(Path(staging.__file__).read_text(encoding="utf-8")))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("pagedcore")} == {"pagedcore._core", "pagedcore.draws"}


def make_staging():
    return staging.DeviceStaging(CPU, max_num_tokens=64, max_num_seqs=8, max_blocks=16)


def plans(scheduler, steps):
    """Plans with prompts of several lengths, then decode steps, each updated after it was used."""
    for number, length in enumerate((3, 9, 20, 30, 5)):
        scheduler.add_request(str(number), list(range(length)), max_tokens=30)
    for _ in range(steps):
        plan = scheduler.schedule()
        yield plan
        scheduler.update(plan.step, np.ones(len(plan.logits_indices), np.int64))


def apply(table, updates):
    if updates is not None:
        for row, index, block in updates.tolist():
            table[row, index] = block


NAMES = ("input_ids", "positions", "slot_mapping", "query_start_loc", "seq_lens", "rows", "logits_indices")


def test_arrays_arrive_as_planned():
    stage = make_staging()
    for plan in plans(Scheduler(SchedulerConfig(**CONFIG)), 12):
        staged = stage.stage(plan, NONE)
        apply(staged.tensors.block_table, staged.table_updates)
        for name in NAMES:
            np.testing.assert_array_equal(getattr(staged.tensors, name).numpy(), getattr(plan, name))
        for sequence, row in enumerate(plan.rows):
            used = -(-int(plan.seq_lens[sequence]) // CONFIG["block_size"])
            np.testing.assert_array_equal(staged.tensors.block_table[row, :used], plan.block_table[sequence, :used])


def test_decode_steps_are_filled_up_with_empty_sequences():
    stage = make_staging()
    recorded = stage.decode_tensors(8)
    decoded = 0
    for plan in plans(Scheduler(SchedulerConfig(**CONFIG)), 12):
        if plan.max_query_len > 1:
            apply(stage.stage(plan, NONE).tensors.block_table, stage.stage(plan, NONE).table_updates)
            continue
        decoded += 1
        staged = stage.stage_decode(plan, NONE, 8)
        used = plan.num_seqs
        assert used < 8
        for name in NAMES:
            tensor = getattr(recorded, name)
            assert tensor.data_ptr() == getattr(staged.tensors, name).data_ptr()  # where it was when it was recorded
            expected = getattr(plan, name)
            np.testing.assert_array_equal(tensor.numpy()[: len(expected)], expected)
        assert (recorded.slot_mapping[used:] == -1).all()
        assert (recorded.seq_lens[used:] == 0).all()
        assert recorded.query_start_loc.tolist() == list(range(9))
        assert recorded.logits_indices.tolist() == list(range(8))
    assert decoded > 5


def test_more_changes_than_there_is_room_for():
    """Sequences of other owners may bring as many block copies as they like into a plan."""
    scheduler = Scheduler(SchedulerConfig(**CONFIG | {"num_blocks": 5000}))
    manager = scheduler.manager
    for _ in range(2000):
        parent = manager.add([1, 2])
        manager.allocate_slots(parent, 2)
        manager.commit(parent, 2)
        (child,) = manager.fork(parent)
        manager.append(child, [3])
        manager.allocate_slots(child, 1)
    scheduler.add_request("a", [1, 2, 3], max_tokens=2)
    plan = scheduler.schedule()
    assert len(plan.block_copies) > 1000
    staged = make_staging().stage(plan, NONE)
    np.testing.assert_array_equal(staged.block_copies.numpy(), plan.block_copies)
    np.testing.assert_array_equal(staged.table_updates.numpy(), plan.table_updates)
    np.testing.assert_array_equal(staged.tensors.input_ids.numpy(), plan.input_ids)


def test_a_part_of_the_ring_waits_for_its_copy():
    stage = make_staging()
    log = []

    class Event:
        def __init__(self, name):
            self.name = name

        def record(self):
            log.append(f"copied {self.name}")

        def synchronize(self):
            log.append(f"wait {self.name}")

    for name, slot in zip("ab", stage._ring, strict=True):
        slot._copied = Event(name)
    for plan in plans(Scheduler(SchedulerConfig(**CONFIG)), 3):
        stage.stage(plan, NONE)
    assert log == ["wait a", "copied a", "wait b", "copied b", "wait a", "copied a"]


# ------------------------------------------------------------------------------------------------------ devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu(directory):
    assert choose_device("auto") == CPU
    for device in ("cuda", "cuda:3", torch.device("cuda")):
        with pytest.raises(UnsupportedError, match=r"device 'cuda.*': (these kernels|this torch|torch finds|.*driver)"):
            models.load(directory, device=device)
    with pytest.raises(UnsupportedError, match="device 'mps': there are no kernels for it"):
        choose_device("mps")
    for nonsense in ("gpu", "", 7.5, None):
        with pytest.raises(InvalidArgumentError, match="device is"):
            choose_device(nonsense)


def test_a_gpu_that_the_kernels_were_not_built_for(monkeypatch):
    monkeypatch.setattr("pagedcore.devices.why_no_gpu", lambda: None)
    monkeypatch.setattr("pagedcore.devices._kernels.gpu_facts", lambda: {"images": "80 89-real 90a-real"})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: [(7, 5), (9, 0)][gpu.index])
    assert choose_device("auto") == CPU
    with pytest.raises(UnsupportedError, match=r"device 'cuda': its compute capability is 7\.5, .* for 80 89-real"):
        choose_device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda", 1)


def test_which_images_a_gpu_runs():
    gpus = [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0)]
    runs = {image: [runs_on(gpu, image) for gpu in gpus] for image in ("80", "80-real", "86-virtual", "90a", "native")}
    assert runs == {
        "80": [False, True, True, True, True],
        "80-real": [False, True, True, False, False],
        "86-virtual": [False, False, True, True, True],
        "90a": [False, False, False, True, False],
        "native": [True] * 5,
    }


def test_layers_that_agree_share_a_plan(monkeypatch):
    """On a device, which here is the CPU with a workspace: one plan for each window and number of heads."""
    made = []
    plan_attention = ops.plan_attention

    def noting(*args, **options):
        made.append((options["window"], options["num_heads"]))
        return plan_attention(*args, **options)

    monkeypatch.setattr(ops, "plan_attention", noting)
    layers = [(None, 4), (8, 4), (None, 4), (8, 4), (None, 2)]
    cache = torch.randn(2, 9, 2, 16, 32)
    step = AttentionStep(
        layers=[LayerCache(*cache)] * len(layers),
        sinks=[None] * len(layers),
        slot_mapping=torch.tensor([40, 56]),
        block_table=torch.tensor([[1, 2], [1, 3]], dtype=torch.int32),
        seq_lens=torch.tensor([25, 25], dtype=torch.int32),
        query_start_loc=torch.arange(3, dtype=torch.int32),
        max_query_len=1,
        max_seq_len=25,
        workspace=torch.empty(0, dtype=torch.uint8),
    )
    states = torch.randn(1, 4, 2, 32), torch.randn(1, 2, 2, 32), torch.randn(1, 2, 2, 32)
    for layer, (window, num_heads) in enumerate(layers):
        query = states[0][:, :num_heads]
        out, _ = paged_attention_forward(
            SimpleNamespace(layer_idx=layer), query, *states[1:], sliding_window=window, pagedcore_step=step
        )
        whole = ops.paged_attention(
            query[0].transpose(0, 1), *cache, step.block_table, step.seq_lens, step.query_start_loc, window=window
        )
        torch.testing.assert_close(out[0], whole)
    assert made == [(None, 4), (8, 4), (None, 2)]

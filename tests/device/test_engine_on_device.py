"""The engine's steps on a GPU: what they wait for, the streams that they run on, and answers there and on the CPU.

    PAGEDCORE_TEST_DEVICE=cuda python -m pytest tests/device        (`make gpu-check-core` does that)

Without the variable the same bodies run on the CPU, except those that need a GPU.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import VOCAB_SIZE, save_tiny_model
from pagedcore import Engine, SamplingParams, sampling

if TYPE_CHECKING:
    from pathlib import Path

DEVICE = os.environ.get("PAGEDCORE_TEST_DEVICE", "cpu")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: PAGEDCORE_TEST_DEVICE=cuda")

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_k=20, seed=2),
    SamplingParams(temperature=1.0, top_p=0.9, seed=3),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def make_engine(model: Path, device: str = DEVICE, **options: Any) -> Engine:
    settings = {"dtype": "float32", "num_blocks": 64, "max_num_seqs": 4, "max_num_batched_tokens": 24}
    return Engine(str(model), device=device, **settings, **options)  # type: ignore[arg-type]


def add(engine: Engine, max_tokens: int = 12) -> None:
    """Prompts that take several steps, with every way to draw tokens."""
    generator = torch.Generator().manual_seed(1)
    for number, params in enumerate(PARAMS):
        prompt = torch.randint(3, VOCAB_SIZE, (10 + 20 * number,), generator=generator).tolist()
        settings = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "seed")}
        engine.add_request(str(number), prompt, SamplingParams(**settings, max_tokens=max_tokens, ignore_eos=True))


def answers(engine: Engine, step: Any = None) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished:
        for output in step() if step else engine.step():
            assert not output.error
            tokens.setdefault(output.request_id, []).extend(output.outputs[0].new_token_ids)
    return tokens


def expected(model: Path) -> dict[str, list[int]]:
    with make_engine(model, "cpu") as engine:
        add(engine)
        return answers(engine)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_greedy_and_sampled_answers(model: Path, cuda_graphs: bool) -> None:
    with make_engine(model, cuda_graphs=cuda_graphs) as engine:
        add(engine)
        assert answers(engine) == expected(model)


@on_gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_step_waits_for_its_tokens_only(model: Path, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch raises for every other wait: a copy from or to memory that is not pinned, a value or a size read back."""
    waits = []
    to_host = torch.Tensor.cpu

    def allowed(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return to_host(tensor)
        waits.append(tuple(tensor.shape))
        torch.cuda.set_sync_debug_mode("default")
        try:
            return to_host(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with make_engine(model, cuda_graphs=cuda_graphs) as engine:
        add(engine)
        answers(engine)  # whatever libraries do at first
        add(engine)
        monkeypatch.setattr(torch.Tensor, "cpu", allowed)
        steps = []

        def step() -> Any:
            before = len(waits)
            torch.cuda.set_sync_debug_mode("error")
            try:
                outputs = engine.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            steps.append(len(waits) - before)
            return outputs

        assert answers(engine, step) == expected(model)
    assert steps
    assert set(steps) == {1}


@on_gpu
def test_steps_on_other_streams_follow_each_other(model: Path) -> None:
    """Each step is run where another stream is current, and that one is kept busy: a step that went there would come
    before the one that it depends on.
    """
    with make_engine(model) as engine:
        add(engine)
        streams = [torch.cuda.Stream() for _ in range(3)]

        def step() -> Any:
            streams.append(streams.pop(0))
            with torch.cuda.stream(streams[0]):
                torch.cuda._sleep(5_000_000)
                outputs = engine.step()
                assert torch.cuda.current_stream() == streams[0]
            return outputs

        assert answers(engine, step) == expected(model)
    torch.cuda.synchronize()


@on_gpu
def test_two_engines_in_two_threads(model: Path) -> None:
    """Made at once, which records their steps one after the other, and stepped at once."""
    results: list[dict[str, list[int]]] = []

    def run() -> None:
        with make_engine(model) as engine:
            add(engine)
            results.append(answers(engine))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected(model)] * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2 or DEVICE == "cpu", reason="needs two GPUs")
def test_engines_on_two_devices(model: Path) -> None:
    """Whichever device is torch's current one, where they are made and where they are stepped."""
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(make_engine(model, f"cuda:{index}")) for index in (0, 1)]
        for engine in engines:
            add(engine)
            assert answers(engine) == expected(model)
            assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("spread", [4.0, 1e-3], ids=["peaked", "flat"])
def test_tokens_are_those_drawn_on_the_cpu(spread: float) -> None:
    """Of logits over more tokens than are looked at first; flat rows are sorted as a whole."""
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(5)) * spread
    sampler = sampling.Sampler(4)
    for row, params in enumerate(PARAMS):
        sampler.assign(row, params, sampling.sequence_key(7, row), 0)
    rows = torch.arange(4).numpy()
    draws = sampler.draws(rows, rows)
    numbers = torch.from_numpy(draws.numbers)
    tokens, failed = sampling.sample(logits.to(DEVICE), draws, numbers.to(DEVICE))
    on_cpu, _ = sampling.sample(logits, draws, numbers)
    assert tokens.tolist() == on_cpu.tolist()
    assert not failed.any()

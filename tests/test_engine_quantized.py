"""Engines whose KV cache holds codes: the answers are those of the model with keys and values rounded as codes are.

The oracle is transformers' model with an attention that rounds them by the reference packer, so that what differs is
rounding alone: a scale that a copied, preempted or shared block had lost would change every logit.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from greedy import Reference, run_all
from models import VOCAB_SIZE, save_tiny_model
from pagedcore import AsyncEngine, SamplingParams, cli, runner
from pagedcore import models as pagedcore_models
from pagedcore.engine import Engine
from pagedcore.errors import InvalidArgumentError, UnsupportedError
from pagedcore.quantized import dequantize, quantize
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

FP8 = "fp8_e4m3"
MAX_TOKENS = 16
LAYERS, KV_HEADS = 2, 2
K_SCALES = np.linspace(0.01, 0.04, LAYERS * KV_HEADS, dtype=np.float32).reshape(LAYERS, KV_HEADS)
SCALES = {  # by granularity, what the engine is given
    "token": None,
    "head": (K_SCALES, 2 * K_SCALES[::-1]),
    "tensor": (K_SCALES[:, 0], 2 * K_SCALES[::-1, 0]),
}
#: A code may fall to the other side where a key's last bit differs; logits then differ by more than rounding.
NEAR_TIE = 0.05


pytestmark = pytest.mark.usefixtures("one_thread")


class RoundingReference(Reference):
    """`Reference` whose keys and values are rounded before they are used, and counted."""

    rounded = 0

    def __init__(self, directory: Any, granularity: str) -> None:
        super().__init__(directory)
        AttentionInterface.register("rounding", self._attention)
        AttentionMaskInterface.register("rounding", eager_mask)
        self.model.set_attn_implementation("rounding")
        self._scales = SCALES[granularity]

    def _attention(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        scales = (None, None) if self._scales is None else (s[module.layer_idx] for s in self._scales)
        key, value = (self._round(x, s) for x, s in zip((key, value), scales, strict=True))
        return eager_attention_forward(module, query, key, value, mask, **options)

    def _round(self, rows: torch.Tensor, scale: np.ndarray | None) -> torch.Tensor:
        self.rounded += 1
        tokens = rows[0].transpose(0, 1).numpy()
        scale = None if scale is None else np.atleast_1d(scale)
        return torch.from_numpy(dequantize(*quantize(tokens, scale))).to(rows).transpose(0, 1)[None]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(directory):
    return pagedcore_models.load(directory)


@pytest.fixture(scope="module", params=sorted(SCALES))
def granularity(request):
    return request.param


@pytest.fixture(scope="module")
def reference(directory, granularity):
    reference = RoundingReference(directory, granularity)
    yield reference
    assert reference.rounded


def options_of(granularity: str) -> dict[str, Any]:
    return {"kv_format": FP8, "scale_granularity": granularity, "kv_scales": SCALES[granularity]}


def prompts() -> list[list[int]]:
    random = np.random.default_rng(9)
    shared = random.integers(3, VOCAB_SIZE, 40).tolist()
    others = [random.integers(3, VOCAB_SIZE, length).tolist() for length in (1, 15, 17, 50)]
    return [*others, [*shared, 5], [*shared, 6, 7]]


def check(reference: RoundingReference, answers: dict[str, list[list[int]]], max_tokens: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("greedy.NEAR_TIE", NEAR_TIE)
    for number, prompt in enumerate(prompts()):
        for answer in answers[str(number)]:
            reference.check(prompt, answer, max_tokens)


def ask(engine: Engine, max_tokens: int = MAX_TOKENS, n: int = 1) -> dict[str, list[list[int]]]:
    params = SamplingParams(max_tokens=max_tokens, n=n, ignore_eos=True)
    return run_all(engine, {str(i): (prompt, params) for i, prompt in enumerate(prompts())})


@pytest.mark.parametrize("block_size", [1, 16])
def test_chunks_and_prefix_hits(loaded, reference, granularity, block_size, monkeypatch):
    """The second round finds codes and scales that the first one wrote."""
    options = options_of(granularity)
    with Engine(
        loaded, block_size=block_size, num_blocks=1024 // block_size, max_num_batched_tokens=24, **options
    ) as engine:
        check(reference, ask(engine), MAX_TOKENS, monkeypatch)
        before = engine.stats().prefix_hit_tokens
        check(reference, ask(engine), MAX_TOKENS, monkeypatch)
        assert engine.stats().prefix_hit_tokens > before + 100


def test_forks_copy_scales(loaded, reference, granularity, monkeypatch):
    """The last block of a prompt, partly full, is copied before each answer writes to it."""
    with Engine(loaded, block_size=16, num_blocks=64, **options_of(granularity)) as engine:
        check(reference, ask(engine, n=3), MAX_TOKENS, monkeypatch)
        assert engine.stats().block_copies > 0


def test_preemption(loaded, reference, granularity, monkeypatch):
    """Blocks that others filled meanwhile are written anew."""
    options = options_of(granularity)
    with Engine(loaded, block_size=4, num_blocks=60, max_num_seqs=6, max_num_batched_tokens=40, **options) as engine:
        check(reference, ask(engine, 40), 40, monkeypatch)
        assert engine.stats().preemptions > 0


def test_over_a_device(loaded, reference, granularity, monkeypatch):
    """The way over a device, with the CPU for one."""

    def make(model, kv, config, *, cuda_graphs):
        return runner.DeviceRunner(model, kv, config, None)

    monkeypatch.setattr("pagedcore.engine.make_runner", make)
    with Engine(loaded, num_blocks=64, **options_of(granularity)) as engine:
        check(reference, ask(engine, n=2), MAX_TOKENS, monkeypatch)


def test_logits_are_near_those_of_the_model(tmp_path):
    """Teacher-forced: after the same prompts, computed in chunks over the cache. Codes have 3 bits of mantissa. The
    weights are of the size that real ones have: those of the other tests make every score count.
    """
    gentle = pagedcore_models.load(save_tiny_model("llama", tmp_path / "gentle", initializer_range=0.14))

    def logits(**options: Any) -> torch.Tensor:
        rows = []
        with Engine(gentle, num_blocks=64, max_num_batched_tokens=24, **options) as engine:
            execute = engine._runner.execute

            def noting(plan, numbers):
                logits, there = execute(plan, numbers)
                rows.append(logits.clone())
                return logits, there

            engine._runner.execute = noting
            for prompt in prompts():
                run_all(engine, {"a": (prompt, SamplingParams(max_tokens=1))})
        return torch.cat([row for row in rows if len(row)])

    exact, codes = logits(), logits(kv_format=FP8)
    assert len(exact) == len(prompts())
    error = float((codes - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.05
    agree = (codes.argmax(-1) == exact.argmax(-1)).float().mean()
    assert agree >= 0.8


def test_more_blocks_for_the_same_memory(loaded):
    """Two 16-byte rows of codes and two scales, where two rows of float32 were."""
    sizes = {}
    for kind in ("auto", FP8):
        with Engine(loaded, kv_cache_memory=100_000, max_num_seqs=64, kv_format=kind) as engine:
            sizes[kind] = (engine.stats().num_blocks, engine.layout.block_bytes)
            assert engine.layout.block_bytes == engine.stats().block_bytes
    dim = loaded.layers[0].head_dim
    assert sizes["auto"][1] == LAYERS * 2 * KV_HEADS * 16 * dim * 4
    assert sizes[FP8][1] == LAYERS * 2 * KV_HEADS * 16 * (dim + 4)
    assert [count for count, _ in sizes.values()] == [100_000 // size - 1 for _, size in sizes.values()]


def test_the_async_engine_takes_it_too(loaded):
    import asyncio

    async def run() -> Any:
        async with AsyncEngine(loaded, num_blocks=20, kv_format=FP8) as engine:
            return [output async for output in engine.generate([5, 6, 7], SamplingParams(max_tokens=3))]

    assert len(asyncio.run(run())[-1].outputs[0].token_ids) == 3


PAIR = (np.ones(LAYERS), np.ones(LAYERS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_format": "int8"}, "^kv_format: expected 'auto' .* got 'int8'"),
        ({"kv_format": "float16"}, "^kv_format: expected 'auto'"),
        ({"scale_granularity": "token"}, "^scale_granularity: expected 'tensor' without"),
        ({"kv_format": FP8, "scale_granularity": "row"}, "^scale_granularity: expected 'tensor', 'head' or 'token'"),
        ({"kv_format": FP8, "scale_granularity": "tensor"}, r"^kv_scales: expected a pair.*\[2\] for .*, got None"),
        ({"kv_format": FP8, "scale_granularity": "head"}, r"^kv_scales: expected a pair.*\[2, 2\] for .*, got None"),
        ({"kv_format": FP8, "scale_granularity": "head", "kv_scales": PAIR}, r"got shapes \[\[2\], \[2\]\]"),
        ({"kv_format": FP8, "scale_granularity": "tensor", "kv_scales": PAIR[:1]}, r"got shapes \[\[2\]\]"),
        ({"kv_format": FP8, "scale_granularity": "tensor", "kv_scales": 3}, "^kv_scales: expected a pair"),
        (
            {"kv_format": FP8, "scale_granularity": "tensor", "kv_scales": (PAIR[0], [0.0, 1.0])},
            "positive finite scales .*, got 0.0 to 1.0",
        ),
        (
            {"kv_format": FP8, "scale_granularity": "tensor", "kv_scales": (PAIR[0], [1e300, 1.0])},
            "positive finite scales .*, got 1.0 to inf",
        ),
        (
            {"kv_format": FP8, "scale_granularity": "tensor", "kv_scales": (PAIR[0], [float("nan"), 1.0])},
            "positive finite scales",
        ),
        ({"kv_format": FP8, "kv_scales": PAIR}, "^kv_scales: expected None, as scales are made of each token"),
        ({"kv_scales": PAIR}, "^kv_scales: expected None, as the cache holds no codes"),
    ],
)
def test_what_is_refused(loaded, options, message):
    with pytest.raises((InvalidArgumentError, UnsupportedError), match=message):
        Engine(loaded, num_blocks=20, **options)


def test_a_head_that_the_kernels_do_not_take(tmp_path):
    """Said when the engine is made, not by its first step."""
    wide = save_tiny_model("qwen3", tmp_path / "wide", head_dim=272)
    for kind in ("auto", FP8):
        with pytest.raises(UnsupportedError, match=r"head_dim 272, .* at most 256"):
            Engine(wide, num_blocks=20, kv_format=kind)


def test_a_real_model_on_the_command_line(smollm2, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="pagedcore"):
        arguments = [
            "--model",
            str(smollm2),
            "--chat",
            "--kv-format",
            FP8,
            "--kv-memory",
            "64MiB",
            "--max-tokens",
            "20",
        ]
        assert cli.main(["generate", *arguments, "What is the capital of France?"]) == 0
    assert "Paris" in capsys.readouterr().out
    assert f"{FP8}, " in caplog.text

"""Which models run over pages, which are refused and with what words, and how one is found and loaded."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch
import transformers
from models import VOCAB_SIZE, save_tiny_model
from pagedcore import attention, linear, models
from pagedcore.devices import choose_dtype
from pagedcore.errors import InvalidArgumentError, UnsupportedError
from torch._subclasses.fake_tensor import FakeTensorMode

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save(config, directory):
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("LlamaConfig", {}),
        ("MistralConfig", {"sliding_window": 8}),
        ("Qwen2Config", {}),
        ("Qwen3Config", {}),
        ("Phi3Config", {}),
        ("Gemma3TextConfig", {"sliding_window": 8}),
        ("GPT2Config", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}),
        ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("Gemma2Config", {"sliding_window": 8}),
        ("GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8}),
    ],
)
def test_families_that_run(name, changes, tmp_path):
    loaded = models.load(save(getattr(transformers, name)(**{**TINY, **changes}), tmp_path))
    assert len(loaded.layers) == 2
    assert loaded.vocab_size == 64
    assert loaded.max_model_len == 128
    assert loaded.stop_token_ids == (2,)
    assert loaded.tokenizer is None
    if "sliding_window" in changes and name == "MistralConfig":
        assert [layer.window for layer in loaded.layers] == [8, 8]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, "encoder-decoder"),
        ("MambaConfig", {"state_size": 4}, "linear_attention"),
        ("BloomConfig", {"n_head": 4, "n_layer": 2}, "AttentionInterface"),
        (
            "Qwen3NextConfig",
            {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
            "linear_attention",
        ),
    ],
)
def test_families_that_are_refused(name, changes, message, tmp_path):
    config = getattr(transformers, name)(**{**TINY, **changes})
    if name == "T5Config":
        config.save_pretrained(tmp_path)
    else:
        save(config, tmp_path)
    with pytest.raises(UnsupportedError, match=message) as caught:
        models.load(tmp_path)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rope_that_changes_with_length_limits_the_length(rope, tmp_path):
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = transformers.LlamaConfig(**{**TINY, "max_position_embeddings": 128}, rope_parameters=parameters)
    assert models.load(save(config, tmp_path)).max_model_len == 64


def test_rope_of_each_type_of_layer_is_looked_at(tmp_path):
    parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
        },
    }
    config = transformers.LlamaConfig(**TINY)
    config.rope_parameters = parameters
    assert models._max_model_len(config) == 64


def test_code_of_a_repository_is_never_run_nor_asked_about(tmp_path, monkeypatch):
    config = transformers.LlamaConfig(**TINY).to_dict()
    config |= {
        "model_type": "of_its_own",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(UnsupportedError):
        models.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "a directory, a GGUF file or a hub name"),
        (None, "a directory, a GGUF file or a hub name"),
        (7, "a directory, a GGUF file or a hub name"),
        ("/no/such/directory", "does not exist"),
        ("./missing.gguf", "does not exist"),
        ("missing.gguf", "does not exist"),
        ("a/b/c", "does not exist"),
    ],
)
def test_not_found(model, message):
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        models.load(model)
    assert caught.value.argument == "model"


def test_directories_that_hold_no_model(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"no config.json and 0 GGUF files"):
        models.load(tmp_path)
    file = tmp_path / "weights.bin"
    file.write_bytes(b"x")
    with pytest.raises(InvalidArgumentError, match="not a GGUF file"):
        models.load(file)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises((InvalidArgumentError, UnsupportedError)):
        models.load(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    save(transformers.LlamaConfig(**TINY), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidArgumentError, match="could not be read"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("argument", "value"), [("dtype", "int8"), ("dtype", torch.int32), ("device", "cuda"), ("device", "tpu")]
)
def test_bad_options(argument, value, tmp_path):
    with pytest.raises(InvalidArgumentError) as caught:
        models.load(save_tiny_model("llama", tmp_path), **{argument: value})
    assert caught.value.argument == argument


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", torch.bfloat16])
def test_dtypes(dtype, tmp_path):
    loaded = models.load(save_tiny_model("llama", tmp_path), dtype=dtype)
    assert loaded.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def test_automatic_dtype_follows_the_processor(monkeypatch):
    def on(**flags):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)

    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    on(avx512_f=True, avx512_bf16=False)
    assert choose_dtype("auto", torch.bfloat16, cpu) == torch.float32
    on(avx512_f=True, avx512_bf16=True)
    assert choose_dtype("auto", torch.bfloat16, cpu) == torch.bfloat16
    assert choose_dtype("auto", torch.float16, cpu) == torch.float32
    assert choose_dtype("auto", torch.float32, cpu) == torch.float32
    assert choose_dtype("float16", torch.bfloat16, cpu) == torch.float16
    assert choose_dtype("auto", torch.float16, gpu) == torch.float16
    assert choose_dtype("auto", torch.float8_e4m3fn, gpu) == torch.float32


def test_stop_ids_come_from_the_generation_configuration(tmp_path):
    save_tiny_model("llama", tmp_path)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    generation.eos_token_id = [5, 9, 5]
    generation.save_pretrained(tmp_path)
    assert models.load(tmp_path).stop_token_ids == (5, 9)


def test_the_model_outside_the_engine_says_what_it_needs(tmp_path):
    loaded = models.load(save_tiny_model("llama", tmp_path))
    with pytest.raises(InvalidArgumentError, match="without its step"):
        loaded.module(input_ids=torch.tensor([[1, 2]]))


def test_convert_gguf(smollm2, smollm2_gguf, tmp_path):
    assert models.convert_gguf(smollm2_gguf) == smollm2, "made once"
    assert not list(smollm2.parent.glob("*.unfinished"))
    loaded = models.load(smollm2)
    assert (loaded.vocab_size, len(loaded.layers), loaded.stop_token_ids) == (49152, 30, (2,))
    assert loaded.tokenizer is not None
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    for call in (models.convert_gguf, models.load):
        with pytest.raises(InvalidArgumentError):
            call(broken)
    assert not broken.with_suffix("").exists()


def test_packed_products(tmp_path):
    """Same results as plain ones up to rounding, with few rows, some and many, with and without a bias."""
    for bias in (True, False):
        plain = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=bias), torch.nn.Linear(48, 32, bias=bias)).eval()
        assert linear.can_pack(plain)
        assert linear.packed_bytes(plain) == 4 * (64 * 48 + 48 * 32)
        inputs = [torch.randn(1, rows, 64) for rows in (0, 1, 2, 3, 64, 127, 128, 300)]
        with torch.inference_mode():
            expected = [plain(x) for x in inputs]
            assert linear.pack_linears(plain) == 2
            assert linear.pack_linears(plain) == 0
            for x, y in zip(inputs, expected, strict=True):
                torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-5)
    assert not linear.can_pack(torch.nn.Linear(4, 4).to(torch.float64))
    assert not linear.can_pack(torch.nn.ReLU())


def test_a_probe_goes_to_the_models_device(tmp_path, monkeypatch):
    """Which is not the current one as a rule, and kernels of a model's own ask for that alone."""
    current = []

    @contextmanager
    def device(of):
        current.append(of)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    config = transformers.LlamaConfig(**TINY, attn_implementation=attention.NAME)
    attention.register()
    ran_on = []
    for where in ("cuda:1", "cpu"):
        with FakeTensorMode(), torch.device(where):
            module = transformers.LlamaForCausalLM(config).eval()
            module.lm_head.register_forward_hook(lambda *_: ran_on.append(list(current)))
            assert len(models.probe(module)[0]) == 2
    assert ran_on == [[torch.device("cuda:1")], []]
    assert current == []


def test_vocabulary_and_shapes_are_what_the_probe_saw(tmp_path):
    loaded = models.load(save_tiny_model("qwen3", tmp_path))
    layer = loaded.layers[1]
    assert (layer.index, layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.window) == (1, 4, 2, 20, None)
    assert loaded.vocab_size == VOCAB_SIZE
    assert math.prod(loaded.module.get_output_embeddings().weight.shape) == VOCAB_SIZE * 48

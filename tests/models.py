"""Tiny random models of the families that the engine is tested with, written once per test session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 128


@dataclass(frozen=True)
class Family:
    """A configuration class of transformers with what makes it tiny. GQA, and an odd head_dim where the family allows
    it.
    """

    config: str
    options: dict[str, Any]


_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.6,  # far apart logits: near-ties would make greedy tokens a matter of rounding
}

FAMILIES = {
    "llama": Family("LlamaConfig", {}),
    "qwen3": Family("Qwen3Config", {"head_dim": 20}),
    "mistral": Family("MistralConfig", {"sliding_window": 24, "head_dim": 16}),
}

#: Families that are tried once each: what they do differently is in the comment.
OTHER_FAMILIES = {
    "gemma3": Family(
        "Gemma3TextConfig", {"sliding_window": 20, "head_dim": 16}
    ),  # layers with and without a window, scaled embeddings
    "gemma2": Family(
        "Gemma2Config",
        {"sliding_window": 20, "head_dim": 16, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 30.0},
    ),  # soft-capped scores
    "gpt_oss": Family(
        "GptOssConfig",
        {"sliding_window": 20, "head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),  # attention sinks
    "deepseek_v3": Family(
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
        },
    ),  # keys wider than values
    "gpt2": Family(
        "GPT2Config", {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 512}
    ),  # learned positions, no GQA
    "mixtral": Family("MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}),  # experts
    "opt": Family("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 48}),  # positions with an offset, biases
    "phi3": Family("Phi3Config", {}),  # one product for queries, keys and values
    "qwen2": Family("Qwen2Config", {}),  # biases
}


def save_tiny_model(family: str, directory: Path, **changes: Any) -> Path:
    """Writes the family's tiny model with random weights (always the same) to ``directory``; returns it."""
    import transformers

    of = (FAMILIES | OTHER_FAMILIES)[family]
    config = getattr(transformers, of.config)(**{**_SMALL, **of.options, **changes})
    torch.manual_seed(20)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))  # norms that are not all ones
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(directory)
    return directory

"""What was installed works where there is no source tree, and the other ways to install work too."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

GENERATE = """
import pagedcore, sys, torch, transformers
assert pagedcore.__file__.startswith(sys.prefix), pagedcore.__file__
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None, bos_token_id=None)
LlamaForCausalLM(config).save_pretrained("tiny")
llm = pagedcore.LLM("tiny", block_size=16, num_blocks=64, max_num_seqs=4, dtype="float32")
prompts = [[1, 2, 3], list(range(40))]
outputs = llm.generate(prompts, pagedcore.SamplingParams(max_tokens=12, temperature=0.0))
print([len(output.outputs[0].token_ids) for output in outputs])
"""


def test_wheel_generates_text_in_a_clean_venv(wheel, clean_venv):
    clean_venv.install(wheel)
    assert clean_venv.run(GENERATE).strip().splitlines()[-1] == "[12, 12]"


@pytest.mark.slow
def test_editable_install_points_at_the_sources(unpacked_sdist, clean_venv):
    clean_venv.install("--no-build-isolation", "-e", unpacked_sdist)
    found = clean_venv.run("import pagedcore, pagedcore._core, pagedcore._kernels; print(pagedcore._kernels.__file__)")
    assert Path(found.strip()).parent == unpacked_sdist / "python" / "pagedcore"


@pytest.mark.slow
def test_isolated_build(source_tree, tmp_path, run_command):
    """`pip wheel .` as a user types it. The one test that needs a package index: build isolation installs its tools."""
    tree = shutil.copytree(source_tree, tmp_path / "tree")
    run_command(sys.executable, "-m", "pip", "wheel", "--no-deps", ".", cwd=tree, PIP_NO_INDEX="0")
    assert next(tree.glob("*.whl")).name.split("-")[2] == f"cp{sys.version_info.major}{sys.version_info.minor}"

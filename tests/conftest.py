"""Settings that hold for every test, and the model that end-to-end tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

# No test uses the network. Set before anything imports a Hugging Face library, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# CI runs the same examples each time and prints what replays a failure; elsewhere every run looks at new ones.
COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, **COMMON)
settings.register_profile("dev", **COMMON)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, which `make test` fetches before it starts pytest."""
    if not SMOLLM2.is_file():
        pytest.fail(f"{SMOLLM2.relative_to(ROOT)} is missing: python bench/fetch_model.py fetches it (93 MB)")
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M-Instruct as a model directory: converted from the GGUF file the first time, kept beside it.

    PAGEDCORE_TEST_MODEL names another copy, as a directory or a GGUF file.
    """
    from pagedcore import environment
    from pagedcore.models import convert_gguf

    model = Path(environment.TEST_MODEL.read() or request.getfixturevalue("smollm2_gguf"))
    return model if model.is_dir() else convert_gguf(model)

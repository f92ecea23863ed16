"""Finds the compiler of the GPU kernels, or installs it from PyPI.

    python python/_build/nvcc.py              # prints the path of the nvcc that a build takes; nothing where there is none
    python python/_build/nvcc.py --install    # installs one into .cuda (270 MB) where there is none

CMake asks here, and so do `make cuda-gates` and the tests: there is one search. Needs nothing but Python.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MINIMUM = (12, 4)
# All five are pinned by one version: nvcc alone brings newer companions, and its ptxas then fails. The environment is its
# own because torch's would replace the headers in the same folder.
TOOLKIT = "cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.2"
ENVIRONMENT = ROOT / ".cuda"
IN_ENVIRONMENT = "lib/python3*/site-packages/nvidia/cu13/bin/nvcc"


def version_of(nvcc: str | Path) -> tuple[int, int]:
    """The release that `nvcc --version` names; (0, 0) if it does not run."""
    try:
        shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0, 0
    found = re.search(r"release (\d+)\.(\d+)", shown)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def find(environment: Path = ENVIRONMENT) -> Path | None:
    """$CUDACXX, PATH, /usr/local/cuda, and last the one in .cuda. The first that runs and is new enough."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for candidate in (*filter(None, candidates), *sorted(environment.glob(IN_ENVIRONMENT))):
        if version_of(candidate) >= MINIMUM:
            return Path(candidate)
    return None


def install(environment: Path = ENVIRONMENT) -> Path:
    """Makes the environment with nvcc from PyPI; returns its nvcc."""
    print(f"==> nvcc from PyPI into {environment.name} (270 MB)", file=sys.stderr, flush=True)
    venv.create(environment, with_pip=True)
    pip = [str(environment / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", TOOLKIT], check=True)
    (nvcc,) = environment.glob(IN_ENVIRONMENT)
    return nvcc


if __name__ == "__main__":
    found = find() or (install() if "--install" in sys.argv[1:] else None)
    print(found or "", end="")

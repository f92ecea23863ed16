"""The artefacts under test: an sdist of this tree, and the wheel built from it. Each is made once per session.

Nothing here is built inside the repository: the editable install that the other tests run from must not change
meanwhile.
This folder must not get an `__init__.py`: it would shadow the `packaging` distribution.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The trees built here share compiled dependencies with the repository: only the crate itself is compiled again.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")},
    "CARGO_TARGET_DIR": os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target")),
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INDEX": "1",
    # The GPU kernels are compiled once in a test run, by `make cuda-gates`, and the others optimised once, by the
    # set-up: here a build type without flags of its own.
    "PAGEDCORE_CUDA": "OFF",
    "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Quick",
}


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; what it printed becomes part of the failure if it fails."""
    result = subprocess.run(
        command, cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))} gave {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


@dataclass(frozen=True)
class CleanVenv:
    """A virtual environment outside the repository that sees the installed dependencies but not the repository."""

    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    def install(self, *arguments: str | Path) -> None:
        run(sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", *arguments, cwd=self.path)

    def run(self, code: str) -> str:
        """Run code in isolated mode, so that neither the current folder nor the environment adds to sys.path."""
        return run(self.python, "-I", "-W", "error", "-c", code, cwd=self.path).stdout


def make_venv(path: Path) -> CleanVenv:
    """Make a CleanVenv: torch and friends come in by one .pth file, as installing them would take minutes.

    The .pth files of the folders it names are not read, so this repository's editable install stays out of sight.
    """
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path.parent)
    shared = [entry for entry in sys.path if Path(entry).name == "site-packages"]
    site = next(path.glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text("\n".join(shared) + "\n")
    return CleanVenv(path)


@pytest.fixture(scope="session")
def run_command():
    return run


@pytest.fixture
def clean_venv(tmp_path: Path) -> CleanVenv:
    return make_venv(tmp_path / "venv")


@pytest.fixture(scope="session")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git knows or would add, so that building there leaves the repository alone."""
    tree = tmp_path_factory.mktemp("source") / "pagedcore"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="session")
def sdist(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, source_tree, cwd=out)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def unpacked_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="session")
def wheel(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist and so from nothing but what the sdist holds."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out]
    run(*pip, unpacked_sdist, cwd=out)
    return next(out.glob("*.whl"))

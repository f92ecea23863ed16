"""Gathers the wheels of other attention libraries, for a GPU machine without a network: `make gpu-wheels`.

    python bench/gpu_wheels.py [--python 3.12] [--to .gpu-wheels]

There: python3 -m pip install --no-index --no-deps --target peers .gpu-wheels/*.whl, and PYTHONPATH=peers. Only what is
imported is taken: torch, numpy, packaging, tqdm and typing-extensions are expected on the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = (
    "flashinfer-python==0.6.11",  # paged decode and prefill; compiles its kernels when they are first called
    "apache-tvm-ffi==0.1.11",
    "click",
    "einops",
    "ninja",
    "nvidia-ml-py",
    "requests",  # FlashInfer imports it, and it the next four
    "certifi",
    "charset-normalizer",
    "idna",
    "urllib3",
    "tabulate",
    "fa3-fwd==0.0.3",  # FlashAttention-3 forward for Hopper, on contiguous KV
)
CORE = ROOT / "python" / "pagedcore" / "_core.abi3.so"  # travels too, built here
LIMIT = 64 << 20  # bytes of all that travels: the wheels, that file and the source tree
# pip takes a platform tag only by its exact name.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34, 35)] + ["manylinux2014_x86_64"]


def tree_size(root: Path) -> int:
    """Bytes of the files of a working tree that git knows or does not ignore."""
    listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")
    return sum(path.stat().st_size for name in names if name and (path := root / name).is_file())


def refusal(sizes: dict[str, int]) -> str | None:
    """What is wrong with so many bytes of each kind of file, if anything."""
    if not sizes[CORE.name]:
        return f"{CORE.name} is missing, which travels too: `make build` makes it"
    total = sum(sizes.values())
    if total <= LIMIT:
        return None
    parts = ", ".join(f"{size / 2**20:.1f} {name}" for name, size in sizes.items())
    return f"{total / 2**20:.1f} MiB in all ({parts}), and only {LIMIT >> 20} may travel"


def main() -> int:
    """Fetches them all anew; fails where they and what goes with them are more than may travel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", help="the machine's Python (default: 3.12)")
    parser.add_argument("--to", type=Path, default=ROOT / ".gpu-wheels", metavar="FOLDER")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    target = [f"--platform={platform}" for platform in PLATFORMS]
    target += [f"--python-version={options.python}", "--implementation=cp", "--only-binary=:all:", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=options.to) as fresh:  # what is there stays where a download fails
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--dest", fresh]
        subprocess.run([*pip, *target, *WHEELS], check=True)
        for stale in options.to.glob("*.whl"):
            stale.unlink()
        for wheel in Path(fresh).glob("*.whl"):
            wheel.replace(options.to / wheel.name)
    wheels = sorted(options.to.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")
    print(f"{size / 2**20:6.1f} MiB  {len(wheels)} wheels in {options.to}")
    core = CORE.stat().st_size if CORE.is_file() else 0
    sizes = {"wheels": size, CORE.name: core, "source tree": tree_size(ROOT)}
    print(f"{sum(sizes.values()) / 2**20:6.1f} MiB  with {CORE.name} and the source tree, of {LIMIT >> 20} MiB")
    if why := refusal(sizes):
        sys.exit(why)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Plants one fault after another in a copy of the GPU kernels and runs the shim's tests on each: all must be caught.

    python tests/shim/mutants.py        (half a minute a fault; prints "caught N of N" last)

A fault counts as caught if a test fails or the process dies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """A fault: `old`, which stands once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


MUTANTS = [
    Mutant(
        "missing barrier before the merge", "decode.cu", "    sync_threads();  // the records take the place", "    // "
    ),
    Mutant(
        "missing barrier in the plan's scan",
        "plan.cu",
        "    sums[t] += left;\n    sync_threads();",
        "    sums[t] += left;",
    ),
    Mutant("missing wait", "decode.cu", "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();"),
    Mutant("missing sync_warp", "decode.cu", "    sync_warp();  // what every lane copied", "    // "),
    Mutant(
        "divergent barrier",
        "decode.cu",
        "    sync_threads();  // the pipelines take the place",
        "    if (thread_id() != 3) sync_threads();  // ",
    ),
    Mutant("off-by-one page", "page_of_key.h", "index = key / p.block_size", "index = (key + 1) / p.block_size"),
    Mutant(
        "wrong stage index",
        "decode.cu",
        "const int slot = stage % kStages;\n    const char*",
        "const int slot = (stage + 1) % kStages;\n    const char*",
    ),
    Mutant("unmasked tail", "rows.h", "key < row.end", "key <= row.end"),
    Mutant("unmasked window edge", "rows.h", "row.position - key < reach", "row.position - key <= reach"),
    Mutant("bad block id", "page_of_key.h", "block >= 0 && block < p.num_blocks", "block >= 0"),
    Mutant("table read past its end", "page_of_key.h", " || index >= p.max_blocks", ""),
    Mutant(
        "NaN hidden",
        "finish.h",
        "f.rounded == 0.0f ? 0.0f : f.o / f.rounded",
        "f.rounded > 0.0f ? f.o / f.rounded : 0.0f",
    ),
    Mutant(
        "missing fence before the last arriver's merge",
        "finish.h",
        "    device::fence();\n    *arrived",
        "    *arrived",
    ),
    Mutant(
        "missing fence after the last arrival",
        "finish.h",
        "counters + first, 1);\n    device::fence();",
        "counters + first, 1);",
    ),
    Mutant(
        "int32 offset",
        "load.h",
        "block * p.k.block_stride",
        "static_cast<int32_t>(block * p.k.block_stride)",
    ),
    Mutant("V of unwritten slots", "load.h", "v + v_at, readable);", "v + v_at, true);"),
    Mutant(
        "merge before the last piece",
        "finish.h",
        "if (*arrived != last - first) return;",
        "if (*arrived + 1 < last - first) return;",
    ),
    Mutant("counter not reset", "finish.h", "if (device::thread_id() == 0) plan.counters[first] = 0;", "//"),
    Mutant("sum not rescaled", "state.h", "      state.rounded[half] *= factor;\n", ""),
    Mutant("rows of the next tile", "rows.h", "s.row_tile * kTileRows + r;", "s.row_tile * (kTileRows - 1) + r;"),
]


def plant(mutant: Mutant, directory: Path) -> None:
    """Puts the fault into the kernels in `directory`."""
    path = directory / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: {mutant.file} has {text.count(mutant.old)} places to change, expected 1")
    path.write_text(text.replace(mutant.old, mutant.new))


def passes(kernels: Path) -> bool:
    """Whether the tests of attention pass on the kernels in this directory."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            str(ROOT / "tests" / "shim" / "test_shim_attention.py"),
        ],
        cwd=ROOT,
        env={**os.environ, "PAGEDCORE_TEST_KERNELS": str(kernels)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "PAGEDCORE_SHIM_CHECK" in result.stdout:  # the build's own command, which only a failed build prints
        sys.exit(f"the kernels do not compile:\n{result.stdout}")
    return result.returncode == 0


def main() -> int:
    """Runs them all; 0 if each was caught and the kernels without a fault pass."""
    caught = 0
    with tempfile.TemporaryDirectory() as scratch:
        kernels = Path(scratch) / "gpu"

        def fresh() -> None:
            shutil.rmtree(kernels, ignore_errors=True)
            shutil.copytree(ROOT / "cuda" / "gpu", kernels)  # with the files' times: what did not change is not rebuilt

        fresh()
        if not passes(kernels):
            sys.exit("the tests fail on the kernels as they are")
        for mutant in MUTANTS:
            fresh()
            plant(mutant, kernels)
            found = not passes(kernels)
            caught += found
            print(f"{'caught' if found else 'MISSED'}: {mutant.name}", flush=True)
    print(f"caught {caught} of {len(MUTANTS)}")
    return 0 if caught == len(MUTANTS) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Runs one call of nvcc and keeps what ptxas says of each kernel beside the object, for `make cuda-gates`.

    python ptxas_report.py nvcc --ptxas-options=-v ... -o kernel.cu.o ...    # writes kernel.cu.o.ptxas.json

CMake calls it as the launcher of the CUDA compiler: ptxas' report would else be in the output of a build that may have
been somebody else's, or days ago.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path


def main(command: list[str]) -> int:
    """Passes on the compiler's exit status and all of its output but the report."""
    start = time.monotonic()
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    report, others = [], []
    for line in result.stderr.splitlines(keepends=True):
        told = line.startswith("ptxas info") or "bytes stack frame" in line
        (report if told else others).append(line)
    sys.stderr.writelines(others)
    if result.returncode == 0 and "-o" in command:
        kept = Path(command[command.index("-o") + 1] + ".ptxas.json")
        kept.write_text(json.dumps({"seconds": time.monotonic() - start, "report": "".join(report)}))
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

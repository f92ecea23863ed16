"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from pagedcore.bench.harness import Session

SUITES = {"attention": "pagedcore.bench.attention", "cascade": "pagedcore.bench.cascade"}


def main(argv: list[str] | None = None) -> int:
    """Runs one suite, or all; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m pagedcore.bench", description=__doc__)
    parser.add_argument(
        "suite", nargs="?", choices=[*SUITES, "all"], default="all", help="what to measure (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: under half a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    options = parser.parse_args(argv)
    session = Session(quick=options.quick, command=shlex.join(["python", "-m", "pagedcore.bench", *argv]))
    names = list(SUITES) if options.suite == "all" else [options.suite]
    suites = [importlib.import_module(SUITES[name]) for name in names]  # first: the environment names what they bring
    session.print_environment()
    for suite in suites:
        suite.run(session)
    if options.json:
        session.write_json(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

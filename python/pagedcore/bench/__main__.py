"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from pagedcore.bench.harness import Session, table
from pagedcore.errors import PagedCoreError

SUITES = {"attention": "pagedcore.bench.attention", "cascade": "pagedcore.bench.cascade"}
#: Exit status where a result of ours was wrong, and where a library broke the device's context.
WRONG, BROKEN = 1, 3
_MOST_CASES = 40  # in the table that is printed


def main(argv: list[str] | None = None) -> int:
    """Runs one suite, or all; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parse(argv)
    session = Session(
        quick=options.quick,
        command=shlex.join(["python", "-m", "pagedcore.bench", *argv]),
        device=options.device,
        rehearse=options.rehearse,
        seconds=options.seconds,
        without=options.without,
        json_path=options.json,
    )
    if options.resume:
        session.resume(options.resume)
    names = list(SUITES) if options.suite == "all" else [options.suite]
    suites = [importlib.import_module(SUITES[name]) for name in names]  # first: the environment names what they bring
    session.print_environment()
    try:
        for suite in suites:
            suite.run(session)
    finally:  # a wrong result ends it; what was found until then is kept
        session.write_json()
    if options.device != "cpu" or options.rehearse:
        session.note("\n" + "\n".join(table(session.results, session.not_run, _MOST_CASES)))
    for failure in session.failures:
        session.note(f"WRONG: {failure}")
    return BROKEN if session.broken else WRONG if session.failures else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pagedcore.bench", description=__doc__)
    parser.add_argument(
        "suite", nargs="?", choices=[*SUITES, "all"], default="all", help="what to measure (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="few cases: under half a minute on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="what to measure (default: cuda if torch and the kernels see one)"
    )
    parser.add_argument("--seconds", type=float, metavar="N", help="begin no case after N seconds (on a GPU)")
    parser.add_argument(
        "--without", action="append", default=[], metavar="PEER", help="leave a library out; may be repeated (on a GPU)"
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from the JSON of an earlier run (on a GPU)")
    parser.add_argument("--rehearse", action="store_true", help="a GPU's suite on the CPU, with tiny cases")
    options = parser.parse_args(argv)
    if options.resume and not options.resume.is_file():
        parser.error(f"--resume: there is no file {options.resume}")
    try:
        options.device = "cpu" if options.rehearse else _device(options.device)
    except PagedCoreError as error:
        parser.error(str(error))
    return options


def _device(wanted: str | None) -> str:
    from pagedcore.devices import choose_device

    return str(choose_device(wanted or "auto").type)


if __name__ == "__main__":
    raise SystemExit(main())

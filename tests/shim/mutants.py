"""Plants one fault after another in a copy of the GPU kernels and runs the shim's tests on each: all must be caught.

    python tests/shim/mutants.py        (some seconds a fault; prints "caught N of N" last)
    python tests/shim/mutants.py fence  (only those with this in their name)

A fault counts as caught if a test fails, the process dies, or it does not end. For each only the files are compiled
that see it, with little optimisation, and only the tests run that are named with it, in the build that can show it, by
a fork of a process that has torch and pytest: to import these takes longer than most of the tests.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import shim_build
from planted import MUTANTS, Mutant

CHECKS = {"plain": "none", "races": "races"}  # PAGEDCORE_TEST_SHIM -> PAGEDCORE_SHIM_CHECK
HEAD_DIMS = (64,)  # what the tests of planted.py need
MOST_SECONDS = 180  # that the tests of one fault may take: some faults make a loop without end


def plant(mutant: Mutant, directory: Path) -> None:
    """Puts the fault into the kernels in `directory`."""
    path = directory / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: {mutant.file} has {text.count(mutant.old)} places to change, expected 1")
    path.write_text(text.replace(mutant.old, mutant.new))


class Baseline:
    """The kernels without a fault, compiled once: all that a mutant leaves as it is comes from here."""

    def __init__(self, build: str, scratch: Path) -> None:
        self.directory = scratch / f"shim-{build}"
        self.kernels = scratch / "gpu"
        self.library = shim_build.build(
            CHECKS[build], kernels=self.kernels, directory=self.directory, head_dims=HEAD_DIMS
        )
        *compilations, self.link = self._ninja("commands", self.library.name).splitlines()
        self.compilations = {_after(command, "-o"): command for command in compilations if " -o " in command}
        self.sources: dict[str, str] = {}  # object -> the files that it was compiled from, a line each
        for entry in self._ninja("deps").split("\n\n"):
            name, _, files = entry.partition(":")
            self.sources[name.strip()] = files

    def _ninja(self, tool: str, *arguments: str) -> str:
        return shim_build.run_command(["ninja", "-t", tool, *arguments], cwd=self.directory)

    def compile(self, mutant: Mutant, directory: Path) -> Path:
        """The library with the fault in it, in `directory`, which has its kernels in `gpu`."""
        link = shlex.split(self.link)
        for name, command in self.compilations.items():
            if f"{self.kernels / mutant.file}\n" not in self.sources[name] + "\n":
                continue
            to = directory / name.replace("/", "_")
            changed, words = [], iter(shlex.split(command))
            for word in words:
                if word in ("-MT", "-MF", "-o"):
                    next(words)
                elif word == "-O2":
                    changed.append("-O1")
                elif word != "-MD":
                    changed.append(word.replace(str(self.kernels), str(directory / "gpu")))
            changed += ["-o", str(to)]
            shim_build.run_command(changed, cwd=self.directory)
            link = [str(to) if argument == name else argument for argument in link]
        library = directory / self.library.name
        link = [str(library) if argument == self.library.name else argument for argument in link]
        shim_build.run_command(["bash", "-c", " ".join(_quoted(argument) for argument in link)], cwd=self.directory)
        return library


def _after(command: str, option: str) -> str:
    words = shlex.split(command)
    return words[words.index(option) + 1]


def _quoted(argument: str) -> str:
    return argument if argument in ("&&", ":") else shlex.quote(argument)


def passes(build: str, library: Path, tests: list[str]) -> bool:
    """Whether these tests pass on this library; anything but that or a failure ends the run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest"])
    output = library.with_suffix(".txt")
    process = context.Process(target=run_tests, args=(build, library, tests, output))
    process.start()
    process.join(MOST_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    code = process.exitcode
    assert code is not None
    said = output.read_text() if output.exists() else ""
    if code > 1 or (code == 1 and "FAILED" not in said):
        sys.exit(f"the tests could not run:\n{said}")
    return code == 0  # negative: killed by a signal


def run_tests(build: str, library: Path, tests: list[str], output: Path) -> None:
    """Ends the process, with pytest's exit status; what it says goes to a file."""
    os.environ.update({"PAGEDCORE_TEST_SHIM": build, "PAGEDCORE_TEST_SHIM_LIBRARY": str(library)})
    os.chdir(shim_build.ROOT)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        here = Path(__file__).parent
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *(str(here / test) for test in tests)])
        sys.stdout.flush()
    sys.exit(int(code))


def main(pattern: str = "") -> int:
    """Runs them all, or those whose names have `pattern`; 0 if each was caught and the unchanged kernels pass."""
    mutants = [mutant for mutant in MUTANTS if pattern in mutant.name]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        shutil.copytree(shim_build.GPU, scratch / "gpu")
        baselines = {build: Baseline(build, scratch) for build in sorted({mutant.build for mutant in mutants})}
        for build, baseline in baselines.items():
            if not passes(build, baseline.library, sorted({m.test for m in mutants if m.build == build})):
                sys.exit(f"the tests fail on the kernels as they are ({build} build)")

        def run(mutant: Mutant) -> bool:
            start = time.monotonic()
            directory = Path(tempfile.mkdtemp(dir=scratch))
            shutil.copytree(scratch / "gpu", directory / "gpu")
            plant(mutant, directory / "gpu")
            library = baselines[mutant.build].compile(mutant, directory)
            found = not passes(mutant.build, library, [mutant.test])
            shutil.rmtree(directory)
            print(f"{'caught' if found else 'MISSED'}: {mutant.name} ({time.monotonic() - start:.0f} s)", flush=True)
            return found

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            caught = sum(pool.map(run, mutants))
    print(f"caught {caught} of {len(mutants)}")
    return 0 if mutants and caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

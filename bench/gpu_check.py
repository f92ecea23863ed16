"""Checks on a machine with a GPU: `make gpu-check-core`, `make gpu-check-bench` and `make gpu-check-sanitizer`.

    python3 bench/gpu_check.py core|bench|sanitizer [--rehearse]

Needs this source tree with `python/pagedcore/_core.abi3.so` in it (built anywhere: it runs under every Python from 3.11
on), and on the machine what TOOLS names, numpy and, for the model, transformers. No Rust, no network. `_kernels` is
compiled first, for this GPU and this Python alone, into build/gpu-check, where a package of its own is put together:
the tree is left as it is. The wheels of other libraries in .gpu-wheels, where there are any, are installed beside it
for the benchmark.

--rehearse does without a GPU what can be done there: the same script, the same tests on the host shim and on the CPU.

Prints a table last. Results go to $OUT where that is set, else to bench/results/<gpu>, after every step: a call that is
ended from outside has left what it found.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu-check"
WHEELS = ROOT / ".gpu-wheels"
sys.path.insert(0, str(ROOT / "python" / "_build"))
import nvcc  # noqa: E402  (one search for the compiler: CMake's)

SECONDS = {"core": 470, "bench": 470, "sanitizer": 290}  # of a whole call, the build included
PATIENCE = 4  # times as long in a rehearsal: the shim takes its time, and so do few cores
LEAST_SECONDS = 10  # what a step is begun with
SMALL = "tests/device/test_small.py"  # every kernel once
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass
class Step:
    """One row of the table."""

    name: str
    result: str  # passed, failed, not run
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Report:
    """What one call found."""

    mode: str
    rehearsal: bool
    command: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    out: Path | None = None  # the folder that it is kept in, step by step
    end: float = math.inf  # of time.monotonic(): when all steps must have ended

    def left(self) -> float:
        """Seconds until then."""
        return self.end - time.monotonic()

    def add(self, name: str, result: str, seconds: float = 0.0, detail: str = "") -> None:
        """Records a row, and prints it."""
        self.steps.append(Step(name, result, round(seconds, 1), detail))
        print(f"==> {name}: {result} {detail}", flush=True)
        if self.out is not None:
            self.write(self.out)

    def out_of_time(self, name: str) -> bool:
        """Whether there is too little left for a step, which is then recorded as failed: it must not look as if it had
        been passed.
        """
        if self.left() >= LEAST_SECONDS:
            return False
        self.add(name, "failed", detail="not begun: no time was left")
        return True

    @property
    def failed(self) -> bool:
        """Whether any step did."""
        return any(step.result == "failed" for step in self.steps)

    def write(self, directory: Path) -> None:
        """As <mode>.json."""
        directory.mkdir(parents=True, exist_ok=True)
        document = {name: value for name, value in asdict(self).items() if name not in ("out", "end")}
        (directory / f"{self.mode}.json").write_text(json.dumps({"schema": 1, **document}, indent=1) + "\n")

    def print(self) -> None:
        """The table."""
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        print(f"\ngpu-check {self.mode}{' (rehearsal: no GPU)' if self.rehearsal else ''}: {machine}")
        for step in self.steps:
            print(f"  {step.name:<34} {step.result:<8} {step.seconds:7.1f} s  {step.detail}")


def search_path(path: str | None = None) -> str:
    """PATH, or `path`, with the folder of this interpreter before it: CMake and Ninja may have come with it, and its
    environment need not be activated.
    """
    return os.pathsep.join([str(Path(sys.executable).parent), path or os.environ.get("PATH", os.defpath)])


def run(command: list[str], log: Path, *, seconds: float, environment: dict[str, str] | None = None) -> int:
    """Exit status of a command whose output goes to `log`; 124 where it ran out of time, with all it started, 127 where
    there is no such command.
    """
    variables = {**os.environ, **(environment or {})}
    variables["PATH"] = search_path(variables.get("PATH"))
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                [shutil.which(command[0], path=variables["PATH"]) or command[0], *command[1:]],
                cwd=ROOT,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own: compilers and workers must not outlive it
            )
        except FileNotFoundError:
            output.write(f"{command[0]}: no such command\n")
            return 127
        try:
            return process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            output.write(f"\nstopped after {seconds:.0f} s\n")
            return 124


def tail(log: Path, lines: int = 60) -> str:
    """The end of what a command printed."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def machine() -> dict[str, Any]:
    """What the results were found on."""
    try:
        import torch
    except ImportError as error:
        sys.exit(f"gpu-check: {sys.executable} cannot import torch ({error}). What it needs: docs/gpu-check.md.")

    facts = {"torch": torch.__version__, "python": ".".join(map(str, sys.version_info[:3])), "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            **facts,
        }
    return facts


def packaged(name: str) -> Callable[[], str]:
    """Asks for the version of an installed distribution, "" where it is not installed."""

    def ask() -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return ask


def shown_by(command: str) -> Callable[[], str]:
    """Asks for the version that a command shows, "" where there is no such command."""

    def ask() -> str:
        try:
            found = shutil.which(command, path=search_path()) or command
            shown = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return ""
        number = re.search(r"\d+(\.\d+)+", shown)
        return number[0] if number else ""

    return ask


def nvcc_version() -> str:
    """Of the nvcc that CMake will take, or of one that is too old for it; "" where there is none."""
    found = nvcc.find() or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    version = nvcc.version_of(found)
    return f"{version[0]}.{version[1]}" if version > (0, 0) else ""


@dataclass(frozen=True)
class Tool:
    """Something that must be on the machine already."""

    version: Callable[[], str]
    least: tuple[int, ...] = ()
    modes: tuple[str, ...] = tuple(SECONDS)
    gpu: bool = False  # not asked for in a rehearsal


TESTED = ("core", "sanitizer")
TOOLS = {
    "cmake": Tool(shown_by("cmake"), (3, 18)),
    "ninja": Tool(shown_by("ninja")),
    "pybind11": Tool(packaged("pybind11"), (2, 12)),
    "nvcc": Tool(nvcc_version, nvcc.MINIMUM, gpu=True),
    "numpy": Tool(packaged("numpy")),
    "torch": Tool(packaged("torch"), (2, 11)),
    "pytest": Tool(packaged("pytest"), (8, 2), TESTED),
    "hypothesis": Tool(packaged("hypothesis"), (6, 100), TESTED),
    "transformers": Tool(packaged("transformers"), modes=("core",)),
    # What is used where it is there.
    "pytest-timeout": Tool(packaged("pytest-timeout"), modes=()),
    "cupy": Tool(packaged("cupy-cuda13x"), modes=()),
}


def look_for_tools(report: Report) -> bool:
    """Whether all that the mode needs is there and new enough: said before anything is compiled, all at once."""
    wrong = []
    for name, tool in TOOLS.items():
        version = report.tools[name] = tool.version()
        numbers = tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))
        needed = report.mode in tool.modes and not (tool.gpu and report.rehearsal)
        if needed and (not version or numbers < tool.least):
            least = f"{'.'.join(map(str, tool.least))} or newer" if tool.least else "any version"
            wrong.append(f"{name}: {version or 'not found'}, {least} is needed")
    print("tools: " + ", ".join(f"{name} {version or '-'}" for name, version in report.tools.items()), flush=True)
    if wrong:
        report.add("tools", "failed", detail="; ".join(wrong))
    return not wrong


def image(capability: str) -> str:
    """What CMake compiles for: Hopper's own instructions need the a."""
    name = capability.replace(".", "")
    return f"{name}a-real" if name == "90" else f"{name}-real"


def build(report: Report) -> Path | None:
    """A folder with the package pagedcore, its `_kernels` compiled for this GPU and Python; None where that failed."""
    start = time.monotonic()
    core = ROOT / "python" / "pagedcore" / "_core.abi3.so"
    if not core.is_file():
        report.add("build", "failed", detail=f"{core.relative_to(ROOT)} is missing: build the package, take it along")
        return None
    package = WORK / "site" / "pagedcore"
    shutil.rmtree(package.parent, ignore_errors=True)
    ignore = shutil.ignore_patterns("_kernels*.so", "__pycache__")
    shutil.copytree(ROOT / "python" / "pagedcore", package, ignore=ignore)
    (package.parent / "pagedcore-0.dist-info").mkdir()
    version = re.search(r'^version = "([^"]+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
    assert version is not None
    metadata = f"Metadata-Version: 2.1\nName: pagedcore\nVersion: {version[1]}\n"
    (package.parent / "pagedcore-0.dist-info" / "METADATA").write_text(metadata)

    import pybind11

    directory = WORK / f"kernels-{sysconfig.get_config_var('SOABI')}"
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(directory), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"),
        f"-DPAGEDCORE_OUTPUT_DIR={package}",
        f"-DPAGEDCORE_CUDA={'OFF' if report.rehearsal else 'ON'}",
    ]
    if not report.rehearsal:
        configure.append(f"-DPAGEDCORE_CUDA_ARCHITECTURES={image(report.machine['capability'])}")
    compile_ = ["cmake", "--build", str(directory), "--parallel", str(os.cpu_count())]
    for name, command in (("configure", configure), ("compile", compile_)):
        log = WORK / f"{name}.log"
        if run(command, log, seconds=max(report.left(), LEAST_SECONDS)) != 0:
            report.add("build", "failed", time.monotonic() - start, f"see {log}")
            print(tail(log))
            return None
    report.add("build", "passed", time.monotonic() - start, report.machine.get("capability", "CPU kernels alone"))
    return package.parent


# What differs from the developers' machines is no error here, and pytest-timeout may not be there.
PYTEST = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "-o", "filterwarnings=default", "-o", "timeout=0"]


def pytest(report: Report, site: Path, name: str, tests: list[str], environment: dict[str, str]) -> None:
    """Runs tests against the package in `site` in the time that is left; one row."""
    if report.out_of_time(name):
        return
    start = time.monotonic()
    log, results = WORK / f"{name.replace(' ', '-')}.log", WORK / "results.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *PYTEST, f"--junitxml={results}", *tests]
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    environment = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    code = run(command, log, seconds=report.left(), environment=environment)
    counts = {}
    if results.is_file():
        suite = ET.parse(results).getroot()[0]
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    detail = ", ".join(f"{value} {key}" for key, value in counts.items()) or f"exit status {code}"
    if code == 124:
        reached = re.findall(r"\[ *(\d+%)\]", log.read_text(errors="replace"))
        detail = f"ended by the time limit at {reached[-1] if reached else '0%'}"
    report.add(name, "passed" if code == 0 else "failed", time.monotonic() - start, detail)
    if code != 0:
        print(tail(log), flush=True)


def core(report: Report, site: Path) -> None:
    """What only a device has and a model's answers; the tests that the shim runs, on the device."""
    device = {"PAGEDCORE_TEST_DEVICE": "cpu" if report.rehearsal else "cuda"}
    pytest(report, site, "kernels, graphs, CuPy, model", ["tests/device"], device)
    shim, sweep = "tests/shim", "tests/shim/test_shim_sweep.py"
    build = {"PAGEDCORE_TEST_SHIM": "plain" if report.rehearsal else "cuda"}
    pytest(report, site, "the shim's tests", [shim, f"--ignore={sweep}"], build)
    pytest(report, site, "sweep", [sweep], build)


def install_peers(report: Report) -> Path | None:
    """A folder with the libraries in .gpu-wheels and nothing else; None where there are none."""
    if report.rehearsal:
        report.add("peers' wheels", "not run", detail="needs a GPU")
        return None
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if not wheels:
        report.add("peers' wheels", "not run", detail=f"none in {WHEELS.name}: `make gpu-wheels` gathers them")
        return None
    start, log, target = time.monotonic(), WORK / "peers.log", WORK / "peers"
    shutil.rmtree(target, ignore_errors=True)
    install = ["install", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(target)]
    code = run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *install, *wheels],
        log,
        seconds=max(report.left(), LEAST_SECONDS),
    )
    report.add("peers' wheels", "failed" if code else "passed", time.monotonic() - start, f"{len(wheels)} wheels")
    if code:
        print(tail(log), flush=True)
        return None
    return target


def bench(report: Report, site: Path, out: Path) -> None:
    """`pagedcore.bench attention` in the time that is left, beside the peers that are here.

    A library may break the device for the process that called it. The benchmark says which, and goes on without it
    from where it was.
    """
    peers = install_peers(report)
    if report.out_of_time("attention"):
        return
    paths = [str(site), str(peers or ""), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    environment["FLASHINFER_WORKSPACE_BASE"] = str(WORK)  # what it compiles is kept below
    if peers:
        environment["PATH"] = os.pathsep.join([os.environ["PATH"], str(peers / "bin")])
    out.mkdir(parents=True, exist_ok=True)
    document, log = out / "attention.json", WORK / "bench.log"
    document.unlink(missing_ok=True)
    more = ["--rehearse"] if report.rehearsal else ["--device", "cuda"]
    while True:
        start = time.monotonic()
        seconds = report.left()
        command = [sys.executable, "-m", "pagedcore.bench", "attention", "--json", str(document), *more]
        code = run(
            [*command, "--seconds", f"{max(0.0, seconds - 30):.0f}"], log, seconds=seconds, environment=environment
        )
        ended = code in (0, 1, 3)  # right, wrong, or a device that can be used no more: its table stands last
        print(log.read_text().rpartition("\n\n")[2] if ended else tail(log), flush=True)
        found = json.loads(document.read_text()) if document.is_file() else {}
        counts = {"figures": len(found.get("results", ())), "not run": len(found.get("not_run", ()))}
        counts["wrong"] = len(found.get("failures", ()))
        detail = ", ".join(f"{count} {name}" for name, count in counts.items())
        broken = found.get("broken")
        if not broken or report.left() < 60:
            break
        report.add("attention", "not run", time.monotonic() - start, f"until {broken} broke the device; {detail}")
        more += ["--resume", str(document), "--without", broken]
    if broken or code == 124:
        detail += f"; ended by {broken or 'the time limit'}"
    report.add("attention", "failed" if code else "passed", time.monotonic() - start, detail)


def sanitizer(report: Report, site: Path) -> None:
    """compute-sanitizer's tools over every kernel on small shapes, one after the other, each with an equal share of the
    time. Failed where none of them came to an end.
    """
    tool_path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(tool_path).is_file():
        for index, tool in enumerate(SANITIZERS):
            _sanitize(report, site, [tool_path, "--tool", tool], report.left() / (len(SANITIZERS) - index))
    else:
        for tool in SANITIZERS:
            report.add(tool, "not run", detail="compute-sanitizer was not found")
    if not any(step.name in SANITIZERS and step.result != "not run" for step in report.steps):
        report.add("sanitizer", "failed", detail="none of the tools came to an end")


def _sanitize(report: Report, site: Path, command: list[str], seconds: float) -> None:
    """One tool; not run where it does not work on this machine, or does not end in time."""
    start, tool = time.monotonic(), command[-1]
    log = WORK / f"{tool}.log"
    command = [*command, "--error-exitcode", "77"]
    probe = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda').add_(1).item()"]
    code = run([*command, *probe], log, seconds=seconds)
    printed = log.read_text(errors="replace")
    if code not in (0, 77) or "not supported" in printed:
        reason = next((line for line in printed.splitlines() if "rror" in line or "support" in line), f"status {code}")
        report.add(tool, "not run", time.monotonic() - start, reason.strip()[:90])
        return
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    environment = {"PYTHONPATH": paths, "PAGEDCORE_TEST_DEVICE": "cuda"}
    # The caching allocator would hide what is out of bounds of a tensor and inside of its block.
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    # Kernels of ours alone: torch's would take most of the time.
    command += ["--kernel-name", "kernel_substring=pagedcore", sys.executable, "-m", "pytest", *PYTEST, "-x", SMALL]
    code = run(command, log, seconds=start + seconds - time.monotonic(), environment=environment)
    printed = log.read_text(errors="replace")
    if code == 124:
        report.add(tool, "not run", time.monotonic() - start, f"did not end in {seconds:.0f} s; no error until then")
        return
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", printed)
    detail = summary[-1] if summary else f"exit status {code}"
    report.add(tool, "passed" if code == 0 else "failed", time.monotonic() - start, detail)
    if code != 0:
        print(tail(log), flush=True)


def main() -> int:
    """Runs one mode; 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["core", "bench", "sanitizer"])
    parser.add_argument("--rehearse", action="store_true", help="do what can be done without a GPU")
    options = parser.parse_args()
    begin = time.monotonic()
    WORK.mkdir(parents=True, exist_ok=True)
    command = ["make", f"gpu-check-{options.mode}", *(["ARGS=--rehearse"] if options.rehearse else [])]
    report = Report(options.mode, options.rehearse, " ".join(command))
    complete = look_for_tools(report)
    report.machine = machine()
    if "gpu" not in report.machine and not options.rehearse:
        sys.exit("gpu-check: torch sees no GPU here. --rehearse does what can be done without one.")
    name = re.sub(r"[^a-z0-9]+", "-", str(report.machine.get("gpu", "none")).lower())
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / name)
    report.out = out = WORK / "rehearsal" if options.rehearse else out
    report.end = begin + SECONDS[options.mode] * (PATIENCE if options.rehearse else 1)
    site = build(report) if complete else None
    if site is not None:
        if options.mode == "core":
            core(report, site)
        elif options.mode == "bench":
            bench(report, site, out)
        elif options.rehearse:
            pytest(report, site, "small shapes", [SMALL], {"PAGEDCORE_TEST_DEVICE": "cpu"})
            for tool in SANITIZERS:
                report.add(tool, "not run", detail="needs a GPU")
        else:
            sanitizer(report, site)
    report.write(out)
    report.print()
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The script behind `make gpu-check-*`, as far as it goes without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu_check.py"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_stem(name))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    return script("gpu_check")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "core"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("tools: cmake ")
    assert "torch sees no GPU here. --rehearse does what can be done without one." in done.stderr


@pytest.mark.parametrize(("capability", "image"), [("8.0", "80-real"), ("8.9", "89-real"), ("9.0", "90a-real")])
def test_the_image_is_that_of_the_gpu(gpu_check: ModuleType, capability: str, image: str) -> None:
    assert gpu_check.image(capability) == image


def test_report(gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = gpu_check.Report("core", False, "make gpu-check-core", {"gpu": "X"})
    report.add("build", "passed", 3.21)
    assert not report.failed
    report.add("attention", "failed", 1.0, "2 failures")
    assert report.failed
    report.write(tmp_path / "new")
    document = json.loads((tmp_path / "new" / "core.json").read_text())
    assert document["schema"] == 1
    assert document["command"] == "make gpu-check-core"
    assert document["steps"][1] == {"name": "attention", "result": "failed", "seconds": 1.0, "detail": "2 failures"}
    report.print()
    assert capsys.readouterr().out.splitlines()[-1].split() == ["attention", "failed", "1.0", "s", "2", "failures"]


def test_a_report_is_kept_step_by_step(gpu_check: ModuleType, tmp_path: Path) -> None:
    """A call that is ended from outside has left what it found."""
    report = gpu_check.Report("core", True, out=tmp_path / "out", end=time.monotonic() + 60)
    for count, name in enumerate(("build", "attention"), 1):
        report.add(name, "passed")
        document = json.loads((tmp_path / "out" / "core.json").read_text())
        assert len(document["steps"]) == count
        assert not {"out", "end"} & document.keys()


def test_what_is_missing_or_too_old_is_said_before_anything_is_compiled(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = {
        "good": gpu_check.Tool(lambda: "3.18", (3, 18)),
        "new": gpu_check.Tool(lambda: "2.11.0+cu130", (2, 11)),
        "old": gpu_check.Tool(lambda: "2.6.1", (2, 12)),
        "none": gpu_check.Tool(lambda: ""),
        "of another mode": gpu_check.Tool(lambda: "1.0", (2,), ("bench",)),
        "of a GPU": gpu_check.Tool(lambda: "", gpu=True),
        "of use": gpu_check.Tool(lambda: "", modes=()),
    }
    monkeypatch.setattr(gpu_check, "TOOLS", tools)
    report = gpu_check.Report("core", True)
    assert not gpu_check.look_for_tools(report)
    assert report.steps[0].detail == "old: 2.6.1, 2.12 or newer is needed; none: not found, any version is needed"
    assert "tools: good 3.18, new 2.11.0+cu130, old 2.6.1, none -, " in capsys.readouterr().out
    for name in ("old", "none"):
        del tools[name]
    assert gpu_check.look_for_tools(gpu_check.Report("core", True))
    assert not gpu_check.look_for_tools(gpu_check.Report("core", False))


def test_this_machines_tools_are_found(gpu_check: ModuleType) -> None:
    """Each by the way that it is looked for; nvcc need not be here."""
    report = gpu_check.Report("core", True)
    assert gpu_check.look_for_tools(report)
    assert report.tools["pytest"] == pytest.__version__
    assert all(report.tools[name] for name in ("cmake", "ninja", "pybind11", "torch", "hypothesis"))


def test_pybind11_is_as_new_as_cmake_asks_for(gpu_check: ModuleType) -> None:
    for path in ("CMakeLists.txt", "cuda/shim/CMakeLists.txt"):
        least = re.search(r"find_package\(pybind11 (\d+)\.(\d+) ", (SCRIPT.parents[1] / path).read_text())
        assert least is not None
        assert gpu_check.TOOLS["pybind11"].least == tuple(map(int, least.groups()))


@pytest.fixture
def sleepy(tmp_path: Path) -> Path:
    """A file of tests, the second of which does not end."""
    path = tmp_path / "test_sleepy.py"
    path.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\n")
    return path


def test_tests_share_one_deadline(
    gpu_check: ModuleType, sleepy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that meets it is ended and says so, and what follows is not begun: neither looks as if it had passed."""
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 1)
    report = gpu_check.Report("core", True, end=time.monotonic() + 8)
    gpu_check.pytest(report, tmp_path, "sleepy", [str(sleepy)], {})
    gpu_check.pytest(report, tmp_path, "late", [str(sleepy)], {})
    assert [(step.name, step.result) for step in report.steps] == [("sleepy", "failed"), ("late", "failed")]
    assert report.steps[0].detail.startswith("ended by the time limit at ")
    assert 6 < report.steps[0].seconds < 20
    assert report.steps[1].detail == "not begun: no time was left"


_SANITIZER = """#!/bin/sh
case "$2 $*" in
  memcheck*SMALL*) echo "========= ERROR SUMMARY: 0 errors" ;;
  racecheck*SMALL*) echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"; exit 77 ;;
  initcheck*) echo "Error: Device not supported" ;;
  synccheck*SMALL*) sleep 600 ;;
esac
"""


def test_the_sanitizers_tools(gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed, failed, not supported, and out of time, with an equal share of it."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(_SANITIZER.replace("SMALL", gpu_check.SMALL))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    report = gpu_check.Report("sanitizer", False, end=time.monotonic() + 5)
    gpu_check.sanitizer(report, tmp_path)
    assert [(step.name, step.result) for step in report.steps] == [
        ("memcheck", "passed"),
        ("racecheck", "failed"),
        ("initcheck", "not run"),
        ("synccheck", "not run"),
    ]
    assert report.steps[0].detail == "ERROR SUMMARY: 0 errors"
    assert report.steps[1].detail == "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    assert report.steps[2].detail == "Error: Device not supported"
    assert report.steps[3].detail.startswith("did not end in ")


@pytest.mark.parametrize("there", [False, True])
def test_sanitizers_that_show_nothing_fail(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    tool = tmp_path / "compute-sanitizer"
    if there:
        tool.write_text("#!/bin/sh\necho Error: Device not supported\nexit 1\n")
        tool.chmod(0o755)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: str(tool))
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    report = gpu_check.Report("sanitizer", False, end=time.monotonic() + 60)
    gpu_check.sanitizer(report, tmp_path)
    assert [step.result for step in report.steps] == ["not run"] * 4 + ["failed"]
    assert report.failed


def test_tests_run_without_the_plugins_that_pyproject_configures() -> None:
    """A GPU machine may have pytest and hypothesis and nothing else."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:timeout", "-p", "no:xdist"]
    root = SCRIPT.parents[1]
    tests = ["tests/device/test_small.py", "-k", "merge"]
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}
    for more in ([], ["-o", "timeout=0"]):
        done = subprocess.run(
            [*command, *tests, *more], cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1 passed" in done.stdout


def test_the_benchmark_is_rehearsed(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that the call does with a package built, on the CPU: every part of the suite has figures, and every peer is
    named. (`make gpu-check-bench ARGS=--rehearse` builds the package too.)
    """
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    start = time.monotonic()
    report = gpu_check.Report("bench", True, end=start + 300)
    gpu_check.bench(report, SCRIPT.parents[1] / "python", tmp_path / "out")
    assert time.monotonic() - start < 60
    assert [(step.name, step.result) for step in report.steps] == [
        ("peers' wheels", "not run"),
        ("attention", "passed"),
    ]
    document = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert document["environment"]["rehearsal"] is True
    assert not document["failures"]
    assert document["broken"] is None
    figures: dict[str, set[str]] = {}
    for result in document["results"]:
        figures.setdefault(result["case"].split()[0], set()).add(result["metric"])
    ops = {"reshape_and_cache", "copy_blocks", "zero_blocks", "gather_blocks", "scatter_blocks", "merge_states"}
    assert figures.keys() == ops | {"copy", "product", "fp8", "splits", "decode", "prefill", "mixed"}
    assert figures["fp8"] == {"fp8/tensor", "fp8/token", "bfloat16"}
    assert figures["splits"] == {"planner", "split 0", "split 64", "plan"}
    assert figures["decode"] == {"pagedcore", "order block", "order layer"}
    assert all(figures[op] == {"pagedcore", "torch"} for op in ops)
    peers = {"flashinfer", "flashinfer-fa3", "flashinfer-xqa", "flex"}
    peers |= {"fa3 (contiguous)", "sdpa (contiguous)", "varlen (contiguous)"}
    missing = {(entry["metric"], entry["reason"]) for entry in document["not_run"]}
    others = {(peer, "does not take mixed batches") for peer in ("flashinfer-xqa", "flex", "sdpa (contiguous)")}
    others |= {("flashinfer-xqa", "does not take prefill batches"), ("flashinfer-fa3", "does not take decode batches")}
    assert missing == {(peer, "needs a GPU") for peer in peers} | others
    assert all(result["roofline"] is None for result in document["results"])  # shares of nothing
    printed = capsys.readouterr().out
    assert "%" not in printed
    assert not any(line.endswith(" ") for line in printed.splitlines())
    assert "not run: flashinfer-xqa: needs a GPU (" in printed
    assert len(printed) < 12_000


_BENCHMARK = """
import json, sys
from pathlib import Path
left_out = [value for name, value in zip(sys.argv, sys.argv[1:]) if name == "--without"]
if "--resume" in sys.argv:
    Path(sys.argv[sys.argv.index("--resume") + 1]).read_text()
peers = [peer for peer in ("good", "bad", "worse") if peer not in left_out]
broken = next((peer for peer in peers if peer != "good"), None)
path = Path(sys.argv[sys.argv.index("--json") + 1])
path.write_text(json.dumps({"results": peers, "not_run": [], "failures": [], "broken": broken}))
print("TABLE without", left_out)
sys.exit(3 if broken else 0)
"""


def test_a_library_that_breaks_the_device_is_left_out(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "site" / "pagedcore"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "bench.py").write_text(_BENCHMARK)
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    monkeypatch.setattr(gpu_check, "WHEELS", tmp_path / "none")
    report = gpu_check.Report("bench", False, end=time.monotonic() + 300)
    gpu_check.bench(report, tmp_path / "site", tmp_path / "out")
    assert [(step.name, step.result) for step in report.steps] == [
        ("peers' wheels", "not run"),
        ("attention", "not run"),
        ("attention", "not run"),
        ("attention", "passed"),
    ]
    assert report.steps[1].detail == "until bad broke the device; 3 figures, 0 not run, 0 wrong"
    assert report.steps[2].detail.startswith("until worse broke the device")
    assert "TABLE without ['bad', 'worse']" in capsys.readouterr().out


def test_a_benchmark_out_of_time_keeps_what_it_has(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(command: list[str], log: Path, *, seconds: float, environment: dict[str, str]) -> int:
        assert float(command[command.index("--seconds") + 1]) < seconds
        assert environment["PYTHONPATH"].startswith(str(tmp_path))
        log.write_text("")
        document = {"results": [1, 2], "not_run": [], "failures": [], "broken": None}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(document))
        return 124

    monkeypatch.setattr(gpu_check, "run", stops)
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    report = gpu_check.Report("bench", True, end=time.monotonic() + 100)
    gpu_check.bench(report, tmp_path, tmp_path / "out")
    assert report.steps[-1].result == "failed"
    assert report.steps[-1].detail == "2 figures, 0 not run, 0 wrong; ended by the time limit"


def test_a_benchmark_that_there_is_no_time_for(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "run", lambda *arguments, **options: pytest.fail("begun"))
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    report = gpu_check.Report("bench", True, end=time.monotonic() + 5)
    gpu_check.bench(report, tmp_path, tmp_path / "out")
    assert (report.steps[-1].name, report.steps[-1].result) == ("attention", "failed")
    assert report.steps[-1].detail == "not begun: no time was left"


def test_wheels_stay_where_a_download_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = script("gpu_wheels")
    kept = tmp_path / "kept-1.0-py3-none-any.whl"
    kept.write_text("")

    def download(command: list[str], *, check: bool) -> None:
        (Path(command[command.index("--dest") + 1]) / "half-1.0-py3-none-any.whl").write_text("")
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(sys, "argv", ["gpu_wheels.py", "--to", str(tmp_path)])
    with pytest.raises(subprocess.CalledProcessError):
        wheels.main()
    assert list(tmp_path.iterdir()) == [kept]


def test_what_travels_is_counted_whole(tmp_path: Path) -> None:
    """Tracked files and new ones, not ignored ones; the wheels and the compiled core with them."""
    wheels = script("gpu_wheels")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name, size in (("new.py", 10), (".gitignore", 0), ("ignored.so", 1000)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / ".gitignore").write_text("*.so\n")
    assert wheels.tree_size(tmp_path) == 10 + len("*.so\n")
    sizes = {"wheels": 50 << 20, "_core.abi3.so": 2 << 20, "source tree": 12 << 20}
    assert wheels.refusal(sizes) is None
    assert wheels.refusal(sizes | {"source tree": 13 << 20}) == (
        "65.0 MiB in all (50.0 wheels, 2.0 _core.abi3.so, 13.0 source tree), and only 64 may travel"
    )
    assert "make build" in str(wheels.refusal(sizes | {"_core.abi3.so": 0}))


def test_peers_are_installed_from_their_wheels_alone(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip itself, on a wheel made here that says it needs what there is not."""
    wheels = tmp_path / ".gpu-wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer.py", "ANSWER = 42\n")
        name = "peer-1.0.dist-info"
        wheel.writestr(
            f"{name}/METADATA", "Metadata-Version: 2.1\nName: peer\nVersion: 1.0\nRequires-Dist: nothing-x\n"
        )
        wheel.writestr(f"{name}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}/RECORD", f"peer.py,,\n{name}/METADATA,,\n{name}/WHEEL,,\n{name}/RECORD,,\n")
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    monkeypatch.setattr(gpu_check, "WHEELS", wheels)
    report = gpu_check.Report("bench", False)
    target = gpu_check.install_peers(report)
    assert (target / "peer.py").is_file()
    assert (report.steps[0].result, report.steps[0].detail) == ("passed", "1 wheels")
    (wheels / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    assert gpu_check.install_peers(report) is None
    assert report.steps[1].result == "failed"


def test_commands_that_came_with_the_interpreter_are_found(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment need not be activated; a command that is nowhere is said to be missing."""
    (tmp_path / "python").symlink_to(sys.executable)
    tool = tmp_path / "cmake"
    tool.write_text("#!/bin/sh\ncommand -v cmake\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(tmp_path / "python"))
    log = tmp_path / "log"
    assert gpu_check.run(["cmake"], log, seconds=20, environment={"PATH": "/nowhere:/usr/bin:/bin"}) == 0
    assert log.read_text() == f"{tool}\n"  # what it starts finds it too
    assert gpu_check.run(["no-such-command"], log, seconds=20) == 127
    assert log.read_text() == "no-such-command: no such command\n"


def test_a_command_that_hangs_is_stopped(gpu_check: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert gpu_check.run([sys.executable, "-c", "import time; time.sleep(60)"], log, seconds=0.5) == 124
    assert "stopped after" in log.read_text()


def test_what_a_stopped_command_started_ends_with_it(gpu_check: ModuleType, tmp_path: Path) -> None:
    """As the compilers under CMake do."""
    command = "sleep 300 & echo $! > child; wait"
    assert gpu_check.run(["sh", "-c", f"cd {tmp_path}; {command}"], tmp_path / "log", seconds=0.5) == 124
    status = Path("/proc") / (tmp_path / "child").read_text().strip() / "status"
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")


def test_the_shims_tests_are_chosen_for_a_gpu() -> None:
    """Every file but those that are about the shim or use kernels by themselves, and no test that needs what only the
    shim has.
    """
    root = SCRIPT.parents[1]
    of_the_shim = {f"test_shim{name}" for name in ("", "_address", "_faults", "_memory", "_on_gpu")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/shim"],
        cwd=root,
        env={**os.environ, "PAGEDCORE_TEST_SHIM": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    chosen = [line.partition("::")[::2] for line in done.stdout.splitlines() if "::" in line]
    files = {path.stem for path in (root / "tests" / "shim").glob("test_*.py")}
    assert {Path(file).stem for file, _ in chosen} == files - of_the_shim
    assert len(chosen) > 1700
    assert not any("recorded_step_runs" in test or "races" in test or "array interface" in test for _, test in chosen)

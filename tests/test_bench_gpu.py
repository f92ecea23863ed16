"""The benchmark of a GPU, without one: nothing wrong is timed, and what is not measured is named. What it counts is in
test_bench_cases.py, what calls other libraries in test_bench_peers.py; test_gpu_check.py rehearses a whole run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pagedcore.bench import attention_gpu, cache_gpu, cases, compiling, harness, timing
from pagedcore.bench.__main__ import main
from pagedcore.bench.batch import Batch
from pagedcore.bench.cases import LLAMA_8B, MQA, TINY, decode
from pagedcore.bench.harness import NotRun, Result, Session
from pagedcore.bench.measure import Bench, Contender, ContextBroken, Machine
from pagedcore.bench.peers import CannotRun, Peer
from pagedcore.bench.timing import HostClock

CPU = torch.device("cpu")


def session(**options: Any) -> Session:
    return Session(quick=False, command="test", **options)


def bench(**options: Any) -> Bench:
    return Bench(session(**options), Machine(CPU, HostClock(), memory=1 << 30, l2=1 << 10))


# Comparisons ---------------------------------------------------------------------------------------------------------


def refuses(reason: str) -> Callable[[], Any]:
    def prepare() -> Any:
        raise CannotRun(reason)

    return prepare


def crashes() -> Any:
    raise RuntimeError("build failed\n[1/2] nvcc -c mha.cu\n  mha.cu(7): error: no such thing\nerror: another")


def runs_out() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def naps(seconds: float) -> Callable[[], Callable[[int], object]]:
    return lambda: lambda _: time.sleep(seconds)


def test_the_fastest_rival_is_the_baseline_and_failures_are_named() -> None:
    run = bench()
    contenders = {
        "ours": Contender(naps(0.002), 4e6, own=True),
        "slow": Contender(naps(0.02), 4e6),
        "fast": Contender(naps(0.004), 4e6),
        "absent": Contender(refuses("cannot be imported"), 4e6),
        "broken": Contender(crashes, 4e6),
        "large": Contender(runs_out, 4e6, own=True),
    }
    run.compare("case", contenders, "GB/s", {"ours": ["slow", "fast", "absent"]})
    figures = {result.metric: result for result in run.session.results}
    assert list(figures) == ["ours", "slow", "fast"]
    mine = figures["ours"]
    assert (mine.baseline, mine.unit) == ("fast", "GB/s")
    assert mine.ratio is not None
    assert 1.2 < mine.ratio < 2.2
    assert mine.baseline_value == pytest.approx(figures["fast"].value)
    assert mine.p10 is not None
    assert mine.p90 is not None
    assert mine.p10 <= mine.value <= mine.p90 < 4e6 / 1e9 / 0.002
    assert mine.roofline == pytest.approx(mine.value * 1e9 / run.machine.copy_rate)
    assert run.session.not_run == [
        NotRun("case", "absent", "cannot be imported"),
        NotRun("case", "broken", "RuntimeError: build failed: mha.cu(7): error: no such thing"),
        NotRun("case", "large", "out of memory"),
    ]
    assert not run.session.failures


def test_without_the_subject_nothing_is_timed() -> None:
    run = bench()
    run.compare("case", {"ours": Contender(crashes, 1, own=True), "peer": Contender(naps(0), 1)}, "us", {})
    assert not run.session.results
    assert run.session.failures == ["case: ours: RuntimeError: build failed: mha.cu(7): error: no such thing"]


@pytest.mark.parametrize("dies", [False, True])
def test_who_fails_while_it_is_timed_is_named_with_its_reason(dies: bool) -> None:
    """The others are timed without it, unless it broke the device."""

    class Mortal(Machine):
        def settle(self) -> None:
            if dies and len(calls) > 3:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    calls: list[int] = []

    def later() -> Callable[[int], object]:
        def call(_: int) -> None:
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

        return call

    run = bench()
    run.machine = Mortal(CPU, HostClock(), 1 << 30, 1 << 10)
    contenders = {"ours": Contender(naps(0), 1, own=True), "bad": Contender(later, 1), "peer": Contender(naps(0), 1)}
    if dies:
        with pytest.raises(ContextBroken, match="bad in case"):
            run.compare("case", contenders, "us", {})
    else:
        run.compare("case", contenders, "us", {"ours": ["bad", "peer"]})
    assert run.session.broken == ("bad" if dies else None)
    reason = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert run.session.not_run == [NotRun("case", "bad", reason)]
    assert [(r.metric, r.baseline) for r in run.session.results] == ([] if dies else [("ours", "peer"), ("peer", None)])
    assert not run.session.failures


def test_a_subject_that_fails_while_it_is_timed_fails_the_run() -> None:
    calls = iter(range(3))
    run = bench()
    run.compare(
        "case",
        {"ours": Contender(lambda: lambda _: next(calls), 1, own=True), "peer": Contender(naps(0), 1)},
        "us",
        {},
    )
    assert run.session.failures == ["case: ours: StopIteration"]
    assert not run.session.results


def test_units() -> None:
    run = bench()
    run.machine.copy_rate, run.machine.product_rate = 8e9, 4e12
    one = harness.Timing(1e-3, 0.5e-3, 2e-3, 9)
    run.add("a", "bytes", one, 4e6, "GB/s")
    run.add("a", "operations", one, 2e9, "TFLOP/s", ("base", one.scaled(2), 2e9))
    run.add("a", "time", one, 4e6, "us", ("base", one.scaled(0.5), 4e6))
    run.add("a", "no bytes", one, 0, "us")
    got = [(r.value, r.p10, r.p90, r.ratio, r.baseline_value, r.roofline) for r in run.session.results]
    assert got[0] == pytest.approx((4.0, 2.0, 8.0, None, None, 0.5))
    assert got[1] == pytest.approx((2.0, 1.0, 4.0, 2.0, 1.0, 0.5))
    assert got[2] == pytest.approx((1000.0, 500.0, 2000.0, 0.5, 500.0, 0.5))
    assert got[3] == pytest.approx((1000.0, 500.0, 2000.0, None, None, None))


def test_a_call_that_breaks_the_device_ends_the_run(tmp_path: Path) -> None:
    class Dead(Machine):
        def settle(self) -> None:
            if broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken: list[bool] = []

    def breaks() -> Any:
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    path = tmp_path / "results.json"
    run = Bench(session(json_path=path), Dead(CPU, HostClock(), 1 << 30, 1))
    with pytest.raises(ContextBroken, match="peer in case"):
        run.compare("case", {"ours": Contender(naps(0), 1, own=True), "peer": Contender(breaks, 1)}, "us", {})
    document = json.loads(path.read_text())
    assert document["broken"] == "peer"
    assert document["done"] == ["case"]
    assert document["not_run"][0]["metric"] == "peer"
    again = session()
    again.resume(path)
    assert not Bench(again, run.machine).may_begin("case")
    assert again.broken is None


# The suite -----------------------------------------------------------------------------------------------------------


def suite(peers: tuple[Peer, ...], monkeypatch: pytest.MonkeyPatch, **options: Any) -> attention_gpu.Suite:
    monkeypatch.setattr(attention_gpu, "PEERS", peers)
    monkeypatch.setattr(attention_gpu.Suite, "_why_not", lambda *_, **__: None)
    return attention_gpu.Suite(bench(**options), TINY, compiling.Background([], 1))


def test_a_peer_that_does_not_take_a_case_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it does so under another entry."""

    def make(batch: Batch) -> Callable[[int], torch.Tensor]:
        return batch.reference

    peers = [Peer("both", (kind,), paged=True, make=make) for kind in ("decode", "prefill")]
    run = suite((*peers, Peer("prompts", ("prefill", "mixed"), paged=True, make=make)), monkeypatch)
    run._beside_peers(decode(LLAMA_8B, 1, 40), slow_starts=False)
    assert {result.metric for result in run.session.results} == {"pagedcore", "both"}
    (skipped,) = run.session.not_run
    assert (skipped.metric, skipped.reason) == ("prompts", "does not take decode batches")


def test_a_peer_that_raises_and_one_that_is_wrong_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def right(batch: Batch) -> Callable[[int], torch.Tensor]:
        def call(layer: int) -> torch.Tensor:
            timed.append("right")
            return batch.reference(layer)

        return call

    def wrong(batch: Batch) -> Callable[[int], torch.Tensor]:
        def call(layer: int) -> torch.Tensor:
            timed.append("wrong")
            return batch.reference(0)  # whatever the layer

        return call

    def fails(batch: Batch) -> Callable[[int], torch.Tensor]:
        raise OSError("no kernel image")

    peers = tuple(
        Peer(name, ("decode",), paged=True, make=make)
        for name, make in (("right", right), ("wrong", wrong), ("fails", fails))
    )
    run = suite(peers, monkeypatch)
    run.machine.l2 = 1 << 20  # more than one layer
    run._beside_peers(decode(LLAMA_8B, 1, 40), slow_starts=False)
    assert [(r.metric, r.baseline) for r in run.session.results] == [("pagedcore", "right"), ("right", None)]
    reasons = {entry.metric: entry.reason for entry in run.session.not_run}
    assert reasons["wrong"].startswith("differs from the oracle by ")
    assert reasons["wrong"].endswith(f"in layer {cases.num_buffers(decode(LLAMA_8B, 1, 40), 1 << 20) - 1}")
    assert reasons["fails"] == "OSError: no kernel image"
    assert timed.count("wrong") == 2  # checked on the first layer and on the last, and never again
    assert timed.count("right") > 10
    assert not run.session.failures


def test_a_wrong_result_of_ours_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad(batch: Batch, split_size: int | None = None) -> Callable[[int], torch.Tensor]:
        return lambda layer: batch.reference(layer) * 1.01

    monkeypatch.setattr(attention_gpu, "ours", bad)
    monkeypatch.setattr(attention_gpu.Suite, "alone", lambda self: None)
    assert main(["attention", "--rehearse"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: decode llama-3-8b 3 x 50: pagedcore: differs from the oracle by 1.0e-02 in layer 0" in printed


def test_whoever_broke_the_device_is_named_and_its_part_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison runs inside of a case, or of a part: the blame stays where the comparison put it."""
    broken: list[bool] = []

    class Dead(Machine):
        def settle(self) -> None:
            if broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def breaks(batch: Batch, split_size: int | None = None) -> Callable[[int], Any]:
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def document(part: Callable[[attention_gpu.Suite], None], peers: tuple[Peer, ...]) -> dict[str, Any]:
        broken.clear()
        run = suite(peers, monkeypatch, json_path=tmp_path / "results.json")
        run.bench.machine = run.machine = Dead(CPU, HostClock(), 1 << 30, 1 << 10)
        run.session.done.append("cache ops")
        with pytest.raises(ContextBroken):
            part(run)
        return json.loads((tmp_path / "results.json").read_text())

    of_peer = document(attention_gpu.Suite.beside_peers, (Peer("bad", ("decode",), paged=True, make=breaks),))
    assert (of_peer["broken"], of_peer["failures"]) == ("bad", [])
    assert of_peer["done"] == ["cache ops", "decode llama-3-8b 3 x 50"]
    monkeypatch.setattr(attention_gpu, "ours", breaks)
    of_ours = document(attention_gpu.Suite.alone, ())
    assert of_ours["broken"] == "fp8/tensor"
    assert of_ours["done"][-1] == "fp8"
    (failure,) = of_ours["failures"]
    assert failure.startswith("fp8 decode llama-3-8b 2 x 40: fp8/tensor: RuntimeError: CUDA error")


def test_what_moves_nothing_is_timed_over_many_calls() -> None:
    """A plan has no bytes to estimate by: a sample of one launch would be mostly what the launch of a graph costs."""
    estimates: list[float] = []

    class Noting(HostClock):
        def sample(self, call: Callable[[int], object], buffers: int, estimate: float) -> timing.Sample:
            estimates.append(estimate)
            return super().sample(call, buffers, estimate)

    run = Bench(session(), Machine(CPU, Noting(), 1 << 30, 1 << 10))
    run.compare("case", {"plan": Contender(naps(0), 0, own=True)}, "us", {})
    assert timing.calls_of_sample(1, estimates[0]) >= 100


def test_nan_is_not_right() -> None:
    batch = Batch(decode(MQA, 1, 20), CPU)
    with pytest.raises(CannotRun, match="differs from the oracle by nan"):
        attention_gpu.checked(lambda: lambda layer: batch.reference(layer) * float("nan"), batch, 1e-2)


def test_what_there_was_no_time_for_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert main(["attention", "--rehearse", "--seconds", "0", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert {result["metric"] for result in document["results"]} == {"copy", "product"}
    reasons = {entry["case"]: entry["reason"] for entry in document["not_run"]}
    assert set(reasons.values()) == {"the time was up"}
    wanted = {case.name for case in [*cases.main_cases(TINY), *cases.decode_grid(TINY)]}
    assert reasons.keys() == wanted | {"cache ops", "fp8", "splits", "orders"}
    assert document["done"] == ["copy"]
    assert "not run: all: the time was up (" in capsys.readouterr().out


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = suite((), monkeypatch)
    run.machine.memory = 2 << 20
    run.beside_peers()
    run._orders()
    skipped = {entry.case: entry.reason for entry in run.session.not_run}
    assert skipped["decode mha 3 x 50"] == "more than the device's memory"
    assert skipped["orders"] == "there is memory for 0.00171 GiB"
    pool = next(r for r in run.session.results if r.metric == "order block")
    assert pool.baseline == "order layer"
    run.machine.memory = 0
    run._orders()
    assert run.session.not_run[-1].reason == "there is memory for 0 GiB"
    assert "decode llama-3-8b 3 x 16" in {r.case for r in run.session.results}


def test_a_resumed_run_does_what_is_left(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert main(["attention", "--rehearse", "--json", str(first)]) == 0
    document = json.loads(first.read_text())
    left = document["done"].pop()
    document["results"] = [r for r in document["results"] if r["case"] != left]
    document["failures"] = ["something: ours: wrong"]
    document["environment"]["launched_by_the_host"] = ["something: a peer"]
    first.write_text(json.dumps(document))
    assert main(["attention", "--rehearse", "--resume", str(first), "--json", str(second)]) == 1
    again = json.loads(second.read_text())
    assert again["results"][: len(document["results"])] == document["results"]
    assert again["environment"]["launched_by_the_host"] == ["something: a peer"]
    assert {r["case"] for r in again["results"][len(document["results"]) :]} == {left}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rehearse", "--resume", "nowhere.json"], "--resume: there is no file nowhere.json"),
        pytest.param(
            ["--device", "cuda"],
            "error: device 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["attention", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_an_op_that_writes_something_else_is_not_timed() -> None:
    op = cache_gpu.block_ops(20, CPU, 0)[0]
    run = bench()
    wrong = cache_gpu.Op(op.name, lambda i: None, op.indexing, op.written, op.poison, op.bytes, op.buffers)
    run.compare("op", cache_gpu.contenders(wrong), "us", {})
    assert run.session.failures == ["op: pagedcore: does not write what torch's indexing writes"]
    assert not run.session.results


def test_the_table_compares_with_the_first() -> None:
    results = [
        Result("s", "decode", "ours", 400.0, "GB/s", roofline=0.5),
        Result("s", "decode", "peer", 100.0, "GB/s"),
        Result("s", "short", "ours", 5.0, "us"),
        Result("s", "short", "peer", 10.0, "us"),
    ]
    missing = [NotRun("a", "x", "needs a GPU"), NotRun("b", "x", "needs a GPU"), NotRun("a", "y", "absent")]
    lines = harness.table(results, missing)
    assert lines[0].split() == ["decode", "400", "GB/s", "50%", "peer", "4.00x"]
    assert lines[1].split() == ["short", "5", "us", "peer", "2.00x"]
    assert lines[2:] == ["not run: x: needs a GPU (2 cases)", "not run: y: absent (a)"]
    short = harness.table(results, missing, most=1)
    assert short == [lines[0], "and 1 cases more, in the JSON", *lines[2:]]


# Compiling in the background -----------------------------------------------------------------------------------------

_CHILD = """
import json, sys, time
job, *names = sys.argv[1:]
print("a compiler's noise")
for name in names:
    if job == "hangs":
        time.sleep(60)
    if job == "dies":
        sys.exit(1)
    print(json.dumps({"heads": name, "error": "no nvcc" if job == "fails" else None}), flush=True)
"""


def test_compiling_in_the_background() -> None:
    jobs = [compiling.Job(name, ("a", "b")) for name in ("works", "fails", "hangs", "dies")]
    start = time.monotonic()
    with compiling.Background(jobs, 3.0, [sys.executable, "-c", _CHILD]) as background:
        assert background.why_not("works", "b") is None
        assert background.why_not("fails", "a") == "no nvcc"
        assert background.why_not("dies", "a") == "its kernels could not be compiled: the process that did it ended"
        hanging = next(process for job, process in background._running.items() if job.name == "hangs")
        assert background.why_not("hangs", "a") == "its kernels were not compiled in 3 s"
        assert background.why_not("hangs", "b") == "its kernels were not compiled in 3 s"
    assert 3.0 <= time.monotonic() - start < 20
    assert hanging.poll() is not None


def test_jobs_are_those_of_the_peers() -> None:
    jobs = compiling.all_jobs()
    names = tuple(heads.name for heads in cases.ALL_HEADS)
    assert compiling.Job("flashinfer", names) in jobs
    assert [job.heads for job in jobs if job.name == "flashinfer-xqa"] == [(name,) for name in names]
    assert len(jobs) == len(set(jobs))


def test_a_job_calls_its_peers_once_and_says_what_is_wrong() -> None:
    def right(batch: Batch) -> Callable[[int], torch.Tensor]:
        return batch.reference

    def wrong(batch: Batch) -> Callable[[int], torch.Tensor]:
        return lambda layer: -batch.reference(layer)

    def fails(batch: Batch) -> Callable[[int], torch.Tensor]:
        raise RuntimeError("ninja: build stopped")

    def peers(make: Callable[[Batch], Callable[[int], torch.Tensor]]) -> list[Peer]:
        return [Peer("p", ("prefill",), paged=True, make=make, job="j"), Peer("q", ("decode",), paged=True, make=fails)]

    case = decode(MQA, 2, 20)
    assert compiling.call_once("j", peers(right), case, CPU) is None
    assert compiling.call_once("j", peers(wrong), case, CPU) == "differs from the oracle by 2.0e+00"
    assert compiling.call_once("j", peers(fails), case, CPU) == "RuntimeError: ninja: build stopped"

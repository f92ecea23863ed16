"""Attention and the cache's ops on a GPU, beside a copy of the same bytes and beside every other library that is there.

First the yardsticks: the bandwidth of a copy from device to device, and a product of large matrices. Then what is ours
alone, while the peers compile; then the cases that have peers, what matters most first, until the time is up. A figure
is that of the device alone: calls are replayed from a CUDA graph, over layers enough that none is found in the cache.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pagedcore import ops
from pagedcore.bench import cache_gpu, cases
from pagedcore.bench.batch import Batch, fill, make_plan, ours, relative_error
from pagedcore.bench.compiling import Background, all_jobs
from pagedcore.bench.measure import COPY, PRODUCT, Bench, Contender, ContextBroken, Machine, find_machine
from pagedcore.bench.peers import PEER_GATE, PEERS, CannotRun
from pagedcore.bench.timing import time_samples
from pagedcore.layout import FP8, KVCache, KVCacheLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagedcore.bench.cases import Case
    from pagedcore.bench.harness import Session
    from pagedcore.bench.peers import Peer

OURS = "pagedcore"
#: ‖out − oracle‖ / ‖oracle‖ of ours, the oracle being float32. `PEER_GATE` is that of others.
GATE = 4e-3
_PEER_SECONDS = 150.0  # that peers have to compile, from when they are started


def run(session: Session) -> None:
    """The suite. `session.broken` says afterwards if a call broke the device's context, which ended it."""
    machine = find_machine(session)
    jobs = [job for job in all_jobs() if machine.on_gpu and job.name not in session.without]
    limit = min(_PEER_SECONDS, session.time_left() / 2)
    with torch.inference_mode(), Background(jobs, limit) as background:
        if machine.on_gpu:
            ops.warmup(machine.device)
        suite = Suite(Bench(session, machine), grid_of(session), background)
        try:
            suite.yardsticks()
            suite.alone()
            suite.beside_peers()
        except ContextBroken as broken:
            session.note(f"the device can be used no more: {broken}")


def grid_of(session: Session) -> cases.Grid:
    """What is measured, by how much of it was asked for."""
    if session.rehearse:
        return cases.TINY
    return cases.QUICK if session.quick else cases.FULL


class Suite:
    """The parts of a run."""

    def __init__(self, bench: Bench, grid: cases.Grid, background: Background) -> None:
        self.bench = bench
        self.session: Session = bench.session
        self.machine: Machine = bench.machine
        self.grid = grid
        self.background = background

    def yardsticks(self) -> None:
        """What shares are shares of. A run that goes on from another measures its own."""
        self._yardsticks()
        self.machine.settle()  # their memory is no longer used

    def _yardsticks(self) -> None:
        machine, grid = self.machine, self.grid
        source = torch.empty(grid.copy_bytes, dtype=torch.uint8, device=machine.device)
        target = torch.empty_like(source)
        left, right = torch.randn(2, grid.product, grid.product, device=machine.device).to(torch.bfloat16)
        product = torch.empty_like(left)
        samples = {
            COPY: machine.clock.sample(lambda _: target.copy_(source), 1, 1e-3),
            PRODUCT: machine.clock.sample(lambda _: torch.mm(left, right, out=product), 1, 1e-3),
        }
        times = time_samples(machine.clock, samples, seconds=1.0 if machine.on_gpu else 0.0)
        moved, computed = 2 * grid.copy_bytes, 2 * grid.product**3
        machine.copy_rate = moved / times[COPY].median
        machine.product_rate = computed / times[PRODUCT].median
        if COPY not in self.session.done:
            self.bench.add(f"copy of {grid.copy_bytes >> 20} MiB", COPY, times[COPY], moved, "GB/s")
            self.bench.add(f"product of {grid.product} squared", PRODUCT, times[PRODUCT], computed, "TFLOP/s")
            self.session.finish(COPY)

    def alone(self) -> None:
        """What has no peers: moving bytes, fp8 beside 16 bits, fixed splits, both orders of a large pool."""
        parts: dict[str, Callable[[], None]] = {
            "cache ops": lambda: cache_gpu.run(self.bench, self.grid.moved),
            "fp8": self._fp8,
            "splits": self._splits,
            "orders": self._orders,
        }
        for name, part in parts.items():
            if self.bench.may_begin(name):
                self.bench.guarded(name, OURS, part, own=True)
                self.session.finish(name)

    def _fp8(self) -> None:
        """Codes beside the 16 bits that they stand for."""
        base = cases.decode(cases.LLAMA_8B, *self.grid.fp8)
        formats = {"fp8/" + grain: replace(base, kv_format=FP8, granularity=grain) for grain in ("tensor", "token")}
        contenders = {name: self._ours(self._batch(case)) for name, case in (formats | {"bfloat16": base}).items()}
        self.bench.compare("fp8 " + base.name, contenders, "us", dict.fromkeys(formats, ("bfloat16",)))

    def _splits(self) -> None:
        """Items cut by the planner, not at all, and at every n keys; and what the plan itself takes."""
        for heads, batch, context in self.grid.first[:2]:
            one = self._batch(cases.decode(heads, batch, context))
            contenders = {"planner": self._ours(one)}
            contenders |= {f"split {size}": self._ours(one, split_size=size) for size in self.grid.splits}
            contenders["plan"] = Contender(lambda one=one: _no_layer(make_plan(one)), 0, own=True)  # type: ignore[misc]
            fixed = [f"split {size}" for size in self.grid.splits]
            self.bench.compare("splits of " + one.case.name, contenders, "us", dict.fromkeys(fixed, ("planner",)))

    def _orders(self) -> None:
        """One layer after another of one large pool, its bytes taken in either order."""
        wanted, layers = self.grid.pool_bytes, self.grid.pool_layers
        size = min(wanted, self.machine.room())
        heads, (batch, context) = cases.LLAMA_8B, self.grid.pool
        if size < wanted:
            self.session.skip(
                "orders", f"pool of {wanted / 2**30:.3g} GiB", f"there is memory for {size / 2**30:.3g} GiB"
            )
        block = KVCacheLayout(1, cases.BLOCK_SIZE, layers, heads.kv, heads.dim, "bfloat16").block_bytes
        count = size // block
        batch = min(batch, (count - 1) // -(-context // cases.BLOCK_SIZE))
        if batch < 1:
            return
        case = cases.decode(heads, batch, context)
        memory = torch.empty(count * block, dtype=torch.uint8, device=self.machine.device)
        contenders = {}
        for order in ("block", "layer"):
            layout = KVCacheLayout(count, cases.BLOCK_SIZE, layers, heads.kv, heads.dim, "bfloat16", order=order)
            kv = KVCache(layout, memory, "torch")
            if order == "block":
                fill(kv)
            contenders["order " + order] = self._ours(Batch(case, self.machine.device, kv=kv))
        name = f"{case.name} of {memory.numel() / 2**30:.3g} GiB"
        self.bench.compare(name, contenders, "GB/s", {"order block": ["order layer"]})

    def beside_peers(self) -> None:
        """What matters most; then the other decode batches, as many as there is time and memory for."""
        shown = cases.shown_to_slow_starters(self.grid)
        for case in [*cases.main_cases(self.grid), *cases.decode_grid(self.grid)]:
            if not self.bench.may_begin(case.name):
                continue
            if case.kv_bytes * cases.num_buffers(case, self.machine.l2) > self.machine.room():
                self.session.skip(case.name, "all", "more than the device's memory")
            else:
                work = partial(self._beside_peers, case, slow_starts=case in shown)
                self.bench.guarded(case.name, OURS, work, own=True)
            self.session.finish(case.name)

    def _beside_peers(self, case: Case, *, slow_starts: bool) -> None:
        batch = self._batch(case)
        contenders, paged = {OURS: self._ours(batch)}, []
        able = [peer for peer in PEERS if case.kind in peer.kinds]
        for name in sorted({peer.name for peer in PEERS} - {peer.name for peer in able}):
            self.session.skip(case.name, name, f"does not take {case.kind} batches")
        for peer in able:
            why = self._why_not(peer, case, slow_starts=slow_starts)
            if why is not None:
                self.session.skip(case.name, peer.name, why)
                continue
            contenders[peer.name] = self._contender(batch, partial(peer.make, batch), PEER_GATE)
            paged += [peer.name] if peer.paged else []
        unit = "TFLOP/s" if case.kind != "decode" else "us" if case.kv_bytes < 2 * self.machine.l2 else "GB/s"
        self.bench.compare(case.name, contenders, unit, {OURS: paged or list(contenders)})

    def _why_not(self, peer: Peer, case: Case, *, slow_starts: bool) -> str | None:
        if not self.machine.on_gpu:
            return "needs a GPU"
        if {peer.name, peer.job} & self.session.without:
            return "left out"
        if peer.slow_start and not slow_starts:
            return "compiles for each shape: measured in few cases"
        return self.background.why_not(peer.job, case.heads.name) if peer.job else None

    def _batch(self, case: Case) -> Batch:
        return Batch(case, self.machine.device, buffers=cases.num_buffers(case, self.machine.l2))

    def _ours(self, batch: Batch, *, split_size: int | None = None) -> Contender:
        return replace(self._contender(batch, partial(ours, batch, split_size), GATE), own=True)

    def _contender(self, batch: Batch, make: Callable[[], Callable[[int], Any]], gate: float) -> Contender:
        work = batch.case.bytes if batch.case.kind == "decode" else batch.case.flops
        return Contender(partial(checked, make, batch, gate), work, len(batch.caches))


def checked(make: Callable[[], Callable[[int], Any]], batch: Batch, gate: float) -> Callable[[int], Any]:
    """A call that gives what the oracle gives over the first layer and the last. Raises CannotRun for one that does
    not: nothing is timed before it is right.
    """
    call = make()
    for layer in sorted({0, len(batch.caches) - 1}):
        error = relative_error(call(layer).reshape(batch.query.shape), batch.reference(layer))
        if not error < gate:
            raise CannotRun(f"differs from the oracle by {error:.1e} in layer {layer}")
    return call


def _no_layer(call: Callable[[], Any]) -> Callable[[int], Any]:
    return lambda _: call()

"""Peers' kernels compiled in the background, by processes of their own, while ours are measured.

A process calls its peers once with a tiny batch of each shape of heads: that compiles what they need into their own
cache on disk, where this process finds it. What has not come by a deadline is not waited for.

    python -m pagedcore.bench.compiling JOB HEADS...        # a line of JSON for each shape of heads
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Self

import torch

from pagedcore.bench.batch import Batch, relative_error
from pagedcore.bench.cases import ALL_HEADS, decode
from pagedcore.bench.peers import PEER_GATE, PEERS, CannotRun, Peer, brief

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

    from pagedcore.bench.cases import Case


@dataclass(frozen=True)
class Job:
    """What one process compiles: kernels of the peers of this name, for these heads."""

    name: str
    heads: tuple[str, ...]


def all_jobs(peers: Iterable[Peer] = PEERS) -> list[Job]:
    """Those of all peers, in the order of their cases."""
    jobs: dict[Job, None] = {}
    names = tuple(heads.name for heads in ALL_HEADS)
    for peer in peers:
        if peer.job:
            jobs |= dict.fromkeys(
                Job(peer.job, part) for part in ([(n,) for n in names] if peer.job_per_heads else [names])
            )
    return list(jobs)


class Background:
    """The jobs at work, one process each. As a context manager it leaves none behind."""

    def __init__(self, jobs: Sequence[Job], seconds: float, command: Sequence[str] | None = None) -> None:
        """`command` starts a job, whose name and heads are its last arguments."""
        self._limit = seconds
        self._end = time.monotonic() + seconds
        self._answers: dict[tuple[str, str], str | None] = {}
        self._news = threading.Condition()
        self._running: dict[Job, subprocess.Popen[str]] = {}
        start = list(command or (sys.executable, "-m", "pagedcore.bench.compiling"))
        for job in jobs:
            process = subprocess.Popen(
                [*start, job.name, *job.heads],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # compilers are its children: one signal ends them all
            )
            self._running[job] = process
            threading.Thread(target=self._listen, args=(job, process.stdout), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listen(self, job: Job, output: IO[str]) -> None:
        with output:
            for line in output:
                with contextlib.suppress(ValueError):  # compilers print too
                    answer = json.loads(line)
                    with self._news:
                        self._answers[job.name, answer["heads"]] = answer["error"]
                        self._news.notify_all()
        self._running[job].wait()
        with self._news:
            del self._running[job]
            self._news.notify_all()

    def why_not(self, job: str, heads: str) -> str | None:
        """None where a job's kernels for these heads are there; else why they are not. Waits for them as long as they
        may take.
        """
        with self._news:
            while (job, heads) not in self._answers and self._works_on(job, heads):
                if not self._news.wait(self._end - time.monotonic()):
                    break
            if (job, heads) in self._answers:
                return self._answers[job, heads]
            if self._works_on(job, heads):
                return f"its kernels were not compiled in {self._limit:.0f} s"
            return "its kernels could not be compiled: the process that did it ended"

    def _works_on(self, job: str, heads: str) -> bool:
        return any(job == at.name and heads in at.heads for at in self._running)

    def close(self) -> None:
        """Ends what is still at work."""
        with self._news:
            running = list(self._running.values())
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def call_once(job: str, peers: Iterable[Peer], case: Case, device: torch.device) -> str | None:
    """What is wrong with a job's peers in a tiny case; None if they compile, run and are right."""
    for peer in peers:
        kind = peer.kinds[0]
        if peer.job != job:
            continue
        batch = Batch(replace(case, kind=kind), device)
        try:
            error = relative_error(peer.make(batch)(0).reshape(batch.query.shape), batch.reference(0))
        except CannotRun as reason:
            return str(reason)
        except Exception as failure:  # noqa: BLE001  # another library's
            return brief(failure)
        if not error < PEER_GATE:
            return f"differs from the oracle by {error:.1e}"
    return None


def _end_with(parent: int) -> None:
    """Ends this process and its compilers once the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Runs one job; says for each shape of heads how it went."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    job, *names = sys.argv[1:]
    for heads in (heads for heads in ALL_HEADS if heads.name in names):
        error = call_once(job, PEERS, decode(heads, 2, 48), torch.device("cuda"))
        sys.stdout.write(json.dumps({"heads": heads.name, "error": error}) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

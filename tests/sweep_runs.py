"""The cases of a sweep in processes of their own, one a core."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import sweep

if TYPE_CHECKING:
    from collections.abc import Callable


class Runs:
    """Cases under way: all that this session's tests of the module will wait for, begun in that order when the first is
    waited for.

    `run_case` gets what a test hands on, the case, and its number. It raises AssertionError for a result that is wrong;
    exceptions have to travel between processes.
    """

    def __init__(
        self,
        request: pytest.FixtureRequest,
        run_case: Callable[..., None],
        prepare: Callable[[], None],
        processes: int | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes or os.cpu_count(), context, prepare)
        self._run_case = run_case
        self._items = [item for item in request.session.items if getattr(item, "module", None) is request.module]
        self._under_way: dict[tuple[str, int], Future[None]] = {}

    def wait(self, test: str, index: int, *handed_on: Any) -> None:
        """The outcome of case `index` of a test with the parameters `index` and `case`."""
        if (test, index) not in self._under_way:
            for item in self._items:
                if getattr(item, "originalname", None) == test:
                    i, case = item.callspec.params["index"], item.callspec.params["case"]
                    self._under_way[test, i] = self._pool.submit(self._run_case, *handed_on, case, i)
        self._under_way[test, index].result()

    def all_pass(self, cases: list[sweep.Case], *handed_on: Any) -> None:
        """Runs other cases, and fails with all of those that do."""
        under_way = [self._pool.submit(self._run_case, *handed_on, case, i) for i, case in enumerate(cases)]
        errors = [(case, run.exception()) for case, run in zip(cases, under_way, strict=True)]
        failed = [f"{sweep.case_id(case)}: {error}" for case, error in errors if error is not None]
        assert not failed, f"{len(failed)} of {len(cases)} cases:\n" + "\n".join(failed)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def numbered(cases: list[sweep.Case]) -> list[Any]:
    """Parameters `index` and `case` of a test."""
    return [pytest.param(i, case, id=f"{i}-{sweep.case_id(case)}") for i, case in enumerate(cases)]

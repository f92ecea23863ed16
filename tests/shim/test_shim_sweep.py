"""A thousand cases of attention and more on the GPU's kernels: every two values of every two axes meet in one.

The cases run in processes, one a core, all of them from the first that is waited for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import sweep
import sweep_worker
import torch
from pairwise import Rule
from sweep_runs import Runs, numbered

if TYPE_CHECKING:
    from collections.abc import Iterator

AXES = {
    **sweep.AXES,
    "kernel": ("tiled", "generic"),
    "grid": (1, 3, 16),  # multiprocessors
    "far": (False, True),  # blocks 2^31 elements apart
}


CODES_DIMS = (64, 128)  # of tiles over codes


def _generic_work(heads: tuple[int, int], head_dim: int, query_len: int, length: str) -> int:
    """Multiply-adds of the generic kernel, which reads K and V once a row: 20 million are about a second."""
    return heads[0] * query_len * head_dim * sweep.LENGTHS[length](query_len, 128)


def _at_most(tiled: float, generic: float) -> Rule:
    """What a case costs, in the units of `sweep.work` and of `_generic_work`."""

    def holds(kernel: str, *case: Any) -> bool:
        return _generic_work(*case) <= generic if kernel == "generic" else sweep.affordable(*case, most=tiled)

    return Rule(("kernel", "heads", "head_dim", "query_len", "length"), holds)


RULES = [
    # What the tiled kernels take.
    Rule(("kernel", "dtype"), lambda kernel, dtype: kernel == "generic" or dtype != torch.float32),
    Rule(("kernel", "head_dim"), lambda kernel, dim: kernel == "generic" or dim in sweep.TILED_HEAD_DIMS),
    Rule(
        ("kernel", "codes", "head_dim"),
        lambda kernel, codes, dim: kernel == "generic" or not codes or dim in CODES_DIMS,
    ),
    Rule(("kernel", "v_head_dim"), lambda kernel, dim: kernel == "generic" or dim is None),
    Rule(("kernel", "order"), lambda kernel, order: kernel == "generic" or order != "strided"),
    Rule(("far", "order"), lambda far, order: not far or order == "HND"),  # it makes strides of its own
    Rule(("far", "length", "block_size"), lambda far, length, size: not far or (length != "4097" and size >= 16)),
]
# One array as far as a case may go, for the pairs that only large ones have; then many small ones, most of them without
# codes: else these would be three of four that the generic kernel runs.
SMALL = [*RULES, _at_most(10_000, 2.5e6)]
CASES = sweep.cases(AXES, [*RULES, _at_most(sweep.MOST_WORK, 2e7)])
CASES += sweep.cases(AXES, SMALL, count=200)
CASES += sweep.cases({**AXES, "codes": (None,)}, SMALL, count=1000 - len(CASES))

# For the builds that check every access, which are three times slower.
CHECKED = sweep.cases(
    {**AXES, "head_dim": (64, 80, 128, 33), "query_len": (1, 2, 5, 17), "grid": (3,), "far": (False,)},
    [*RULES, _at_most(12_000, 2e6)],
)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    on_gpu = os.environ.get("PAGEDCORE_TEST_SHIM") == "cuda"  # four processes share it
    runs = Runs(request, sweep_worker.run_case, sweep_worker.prepare, 4 if on_gpu else None)
    yield runs
    runs.close()


@pytest.mark.parametrize(("index", "case"), numbered(CASES))
def test_sweep(plain_shim: Any, runs: Runs, index: int, case: sweep.Case) -> None:
    runs.wait("test_sweep", index, plain_shim.__file__)


@pytest.mark.parametrize(("index", "case"), numbered(CHECKED))
def test_sweep_races(race_shim: Any, runs: Runs, index: int, case: sweep.Case) -> None:
    runs.wait("test_sweep_races", index, race_shim.__file__)


@pytest.mark.parametrize(("index", "case"), numbered(CHECKED))
def test_sweep_address(address_shim: Any, runs: Runs, index: int, case: sweep.Case) -> None:
    runs.wait("test_sweep_address", index, address_shim.__file__)


def test_the_sweep_is_as_large_as_it_says() -> None:
    assert len(CASES) >= 1000
    used = {axis: {repr(case[axis]) for case in CASES} for axis in AXES}
    assert used == {axis: set(map(repr, values)) for axis, values in AXES.items()}


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("head_dim", AXES["head_dim"])
@pytest.mark.parametrize("kernel", AXES["kernel"])
def test_product(plain_shim: Any, runs: Runs, kernel: str, head_dim: int) -> None:
    """Every combination of dtype, heads, length and query length as well."""
    axes = {**AXES, "kernel": (kernel,), "head_dim": (head_dim,)}
    cases = sweep.product(("dtype", "heads", "length", "query_len"), axes, [*RULES, _at_most(sweep.MOST_WORK, 2e7)])
    assert bool(cases) == (kernel == "generic" or head_dim in sweep.TILED_HEAD_DIMS)
    runs.all_pass(cases, plain_shim.__file__)

"""A thousand cases of attention and more on the CPU's kernels: every two values of every two axes meet in one.

Each case runs under every instruction set that the machine has, against one oracle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cpu_sweep_worker
import pytest
import sweep
from pairwise import Rule
from sweep_runs import Runs, numbered

if TYPE_CHECKING:
    from collections.abc import Iterator

AXES = {
    **sweep.AXES,
    "num_threads": (1, 2, 5),
    "far": (False, True),  # blocks 2^31 elements apart
}


def _at_most(multiply_adds: float) -> Rule:
    """What a case costs, nearly all of it in the oracle: 20 million are about a fifth of a second."""

    def holds(heads: tuple[int, int], head_dim: int, query_len: int, length: str) -> bool:
        return heads[0] * query_len * head_dim * sweep.LENGTHS[length](query_len, 128) <= multiply_adds

    return Rule(("heads", "head_dim", "query_len", "length"), holds)


RULES = [
    Rule(("causal", "window"), lambda causal, window: causal or window is None),  # else refused
    Rule(("far", "order"), lambda far, order: not far or order == "HND"),  # it makes strides of its own
    Rule(("far", "length", "block_size"), lambda far, length, size: not far or (length != "4097" and size >= 16)),
]
# One array with longer cases, for the pairs that only these have; then many small ones.
CASES = sweep.cases(AXES, [*RULES, _at_most(2e7)])
CASES += sweep.cases(AXES, [*RULES, _at_most(1e6)], count=1000 - len(CASES))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    runs = Runs(request, cpu_sweep_worker.run_case, cpu_sweep_worker.prepare)
    yield runs
    runs.close()


@pytest.mark.parametrize(("index", "case"), numbered(CASES))
def test_sweep(runs: Runs, index: int, case: sweep.Case) -> None:
    runs.wait("test_sweep", index)


def test_the_sweep_is_as_large_as_it_says() -> None:
    assert len(CASES) >= 1000
    used = {axis: {repr(case[axis]) for case in CASES} for axis in AXES}
    assert used == {axis: set(map(repr, values)) for axis, values in AXES.items()}


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("head_dim", AXES["head_dim"])
def test_product(runs: Runs, head_dim: int) -> None:
    """Every combination of dtype, heads, length and query length as well."""
    axes = {**AXES, "head_dim": (head_dim,)}
    runs.all_pass(sweep.product(("dtype", "heads", "length", "query_len"), axes, [*RULES, _at_most(1e8)]))

"""The covering arrays that the sweeps are made of."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from pairwise import Rule, completed, covering_arrays, possible_pairs

AXES: dict[str, list[Any]] = {
    "a": [1, 2, 3],
    "b": ["x", "y"],
    "c": [None, 0.5, 2.0, 3.0],
    "d": [True, False],
    "e": list(range(7)),
}
RULES = [
    Rule(("a", "b"), lambda a, b: not (a == 3 and b == "x")),
    Rule(("a", "b", "d"), lambda a, b, d: not (a == 1 and b == "y" and d)),
    Rule(("e", "a"), lambda e, a: e < 6 or a == 3),
]


def brute_force(axes: dict[str, list[Any]], rules: list[Rule]) -> set[tuple[Any, ...]]:
    """Every pair of every case that keeps the rules."""
    pairs = set()
    for values in itertools.product(*axes.values()):
        case = dict(zip(axes, values, strict=True))
        if all(rule.holds(*(case[name] for name in rule.axes)) for rule in rules):
            pairs.update(itertools.combinations(sorted(case.items(), key=lambda item: item[0]), 2))
    return pairs


def pairs_in(cases: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {
        pair for case in cases for pair in itertools.combinations(sorted(case.items(), key=lambda item: item[0]), 2)
    }


@pytest.mark.parametrize("rules", [[], RULES], ids=["free", "with rules"])
def test_every_pair_is_covered_and_no_rule_broken(rules: list[Rule]) -> None:
    for cases in itertools.islice(covering_arrays(AXES, rules), 5):
        assert pairs_in(cases) == brute_force(AXES, rules)
        assert len(cases) < 60  # of 336


def test_possible_pairs_are_what_some_case_has() -> None:
    named = {((a, AXES[a][i]), (b, AXES[b][j])) for (a, i), (b, j) in possible_pairs(AXES, RULES)}
    assert named == brute_force(AXES, RULES)


def test_arrays_differ_and_come_again() -> None:
    first, second = itertools.islice(covering_arrays(AXES, RULES), 2)
    assert first != second
    assert first == next(covering_arrays(AXES, RULES))


def test_random_axes() -> None:
    rng = random.Random(0)
    for _ in range(20):
        axes = {name: list(range(rng.randint(1, 5))) for name in "pqrst"}
        limit = rng.randint(4, 9)
        rules = [Rule(tuple("pqrs"), lambda *values, limit=limit: sum(values) <= limit)]
        assert pairs_in(next(covering_arrays(axes, rules))) == brute_force(axes, rules)


def test_a_case_is_completed_where_the_rules_leave_one() -> None:
    rng = random.Random(0)
    for a, d, e in itertools.product(AXES["a"], AXES["d"], AXES["e"]):
        case = completed({"a": a, "d": d, "e": e}, AXES, RULES, rng)
        allowed = e < 6 or a == 3
        assert (case is not None) == allowed
        assert case is None or all(rule.holds(*(case[name] for name in rule.axes)) for rule in RULES)

"""Covering arrays: few cases in which every two values of every two axes meet.

Most faults of a kernel need two circumstances at once (a page size and a window, say), and few need three; all pairs of
ten axes fit in a hundred cases where all combinations would be millions.
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Case = dict[str, Any]  # axis -> value
Pair = tuple[tuple[str, int], tuple[str, int]]  # two of (axis, index of a value)


class Rule(NamedTuple):
    """What no case may break: `holds` gets the values of `axes`, in that order."""

    axes: tuple[str, ...]
    holds: Callable[..., bool]


def _allowed(chosen: Mapping[str, int], axes: Mapping[str, Sequence[Any]], rules: Sequence[Rule]) -> bool:
    """Whether no rule is broken by the axes chosen so far."""
    known = chosen.keys()
    for rule in rules:
        if known >= set(rule.axes) and not rule.holds(*[axes[name][chosen[name]] for name in rule.axes]):
            return False
    return True


def _complete(
    chosen: dict[str, int],
    rest: Sequence[str],
    axes: Mapping[str, Sequence[Any]],
    rules: Sequence[Rule],
    order: Callable[[str, dict[str, int]], list[int]],
) -> dict[str, int] | None:
    """`chosen` with a value for every axis of `rest`, tried in the order given; None if the rules leave none."""
    if not rest:
        return chosen
    name = rest[0]
    decided = [rule for rule in rules if name in rule.axes]  # the others were kept before, or wait for an axis yet
    for value in order(name, chosen):
        more = {**chosen, name: value}
        if _allowed(more, axes, decided):
            whole = _complete(more, rest[1:], axes, rules, order)
            if whole is not None:
                return whole
    return None


def _by_rules(names: Sequence[str], rules: Sequence[Rule]) -> list[str]:
    """The axes of the first rule first, those of none last: what breaks a rule is seen before others are tried."""
    return sorted(names, key=lambda name: next((i for i, rule in enumerate(rules) if name in rule.axes), len(rules)))


def pairs_of(chosen: Mapping[str, int]) -> Iterator[Pair]:
    """All pairs in a case, each with its axes in the order of their names."""
    return itertools.combinations(sorted(chosen.items()), 2)


def possible_pairs(axes: Mapping[str, Sequence[Any]], rules: Sequence[Rule] = ()) -> set[Pair]:
    """The pairs that some case which keeps the rules has."""
    bound = sorted({name for rule in rules for name in rule.axes})
    found = set()
    for a, b in itertools.combinations(sorted(axes), 2):
        for i, j in itertools.product(range(len(axes[a])), range(len(axes[b]))):
            chosen = {a: i, b: j}
            rest = _by_rules([name for name in bound if name not in chosen], rules)
            in_order = lambda name, _: list(range(len(axes[name])))  # noqa: E731
            if _allowed(chosen, axes, rules) and _complete(chosen, rest, axes, rules, in_order) is not None:
                found.add(((a, i), (b, j)))
    return found


def covering_arrays(axes: Mapping[str, Sequence[Any]], rules: Sequence[Rule] = ()) -> Iterator[list[Case]]:
    """Without end, lists of cases that keep the rules, each with every possible pair, and each with other triples."""
    pairs = possible_pairs(axes, rules)
    for seed in itertools.count():
        yield _cover(set(pairs), axes, rules, random.Random(seed))


def _cover(
    missing: set[Pair], axes: Mapping[str, Sequence[Any]], rules: Sequence[Rule], rng: random.Random
) -> list[Case]:
    """Cases with all these pairs.

    Each starts from a pair that is still missing, and takes for one axis after another, in random order, the value that
    adds the most missing pairs.
    """
    cases = []
    while missing:
        first, second = rng.choice(sorted(missing))
        rest = [name for name in axes if name not in (first[0], second[0])]
        rng.shuffle(rest)
        rest = _by_rules(rest, rules)

        def most_missing(name: str, chosen: dict[str, int]) -> list[int]:
            values = list(range(len(axes[name])))
            rng.shuffle(values)
            gain = {v: sum(_pair((name, v), other) in missing for other in chosen.items()) for v in values}
            return sorted(values, key=lambda v: -gain[v])

        chosen = _complete(dict((first, second)), rest, axes, rules, most_missing)
        assert chosen is not None, "a possible pair has a case"
        missing.difference_update(pairs_of(chosen))
        cases.append({name: axes[name][chosen[name]] for name in axes})
    return cases


def completed(fixed: Case, axes: Mapping[str, Sequence[Any]], rules: Sequence[Rule], rng: random.Random) -> Case | None:
    """A case with these values, its other axes drawn at random; None if the rules leave none."""
    chosen = {name: list(axes[name]).index(value) for name, value in fixed.items()}
    if not _allowed(chosen, axes, rules):
        return None
    rest = _by_rules([name for name in axes if name not in chosen], rules)
    whole = _complete(chosen, rest, axes, rules, lambda name, _: rng.sample(range(len(axes[name])), len(axes[name])))
    return None if whole is None else {name: axes[name][whole[name]] for name in axes}


def _pair(a: tuple[str, int], b: tuple[str, int]) -> Pair:
    return (a, b) if a < b else (b, a)

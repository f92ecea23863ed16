"""The end of an answer is a matter of its text, not of the tokens that the text comes in."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagedcore.stop_strings import cut_at_stop


def answer(pieces, stops):
    """What a caller reads, piece by piece, and whether a stop string ended it."""
    given_out, held = "", ""
    for i, piece in enumerate(pieces):
        text, held, stopped = cut_at_stop(held + piece, stops, last=i == len(pieces) - 1)
        given_out += text
        if stopped:
            return given_out, True
    assert held == "", "nothing waits after the last piece"
    return given_out, False


def partitions(text):
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(text)]
        yield [text[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("xabc", ("abc", "b"), ("xa", True)),  # "b" is complete first, though "abc" begins first
        ("xabc", ("abc", "bc"), ("x", True)),  # both are complete at once: the longer one
        ("xabab", ("abac",), ("xabab", False)),
        ("aabaac", ("aac",), ("aab", True)),
        ("abcabd", ("abd", "zz"), ("abc", True)),
        ("one. two", (". ",), ("one", True)),
        ("abc", (), ("abc", False)),
    ],
)
def test_every_partition_gives_the_same(text, stops, expected):
    for pieces in partitions(text):
        assert answer(pieces, stops) == expected, pieces


@given(st.text("ab", min_size=1, max_size=9), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_every_partition_of_any_text(text, stops):
    whole = answer([text], stops)
    for pieces in partitions(text):
        assert answer(pieces, stops) == whole, pieces

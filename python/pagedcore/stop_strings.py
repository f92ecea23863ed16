"""Where an answer's text ends because a string in it says so."""

from __future__ import annotations

from collections.abc import Sequence


def cut_at_stop(text: str, stops: Sequence[str], *, last: bool) -> tuple[str, str, bool]:
    """Splits text that is not given out yet: (what can be given out, what must wait, whether a stop string was found).

    What waits is the longest end of the text that a stop string begins with: the next token may complete it. With
    ``last`` nothing waits. A stop string itself is in none of the two. How a text is cut does not depend on the pieces
    it comes in. O(len(text) * len(stops)).

    >>> cut_at_stop("one. two", (". ",), last=False)
    ('one', '', True)
    >>> cut_at_stop("one.", (". ",), last=False)
    ('one', '.', False)
    """
    # The first to be complete counts, not the first to begin: it is what ends the answer where tokens are short.
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    if found:
        _, place = min(found)
        return text[:place], "", True
    waiting = 0 if last else max((_begins_at_end(text, stop) for stop in stops), default=0)
    cut = len(text) - waiting
    return text[:cut], text[cut:], False


def _begins_at_end(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` begins with, fewer than all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

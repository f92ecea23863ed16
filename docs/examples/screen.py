"""Text on a terminal: how many cells it takes, and where it is broken."""

from __future__ import annotations

import shutil
import unicodedata


def columns(most: int = 120) -> int:
    """Cells of a line that can be written without the terminal breaking it."""
    return min(most, shutil.get_terminal_size().columns - 1)


def cells(text: str) -> int:
    """Cells that a text takes: two for a wide character, none for one that sits on another."""
    return sum(_cells_of(character) for character in text)


def _cells_of(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def plain(text: str) -> str:
    """A text on one line, without characters that a terminal would obey instead of showing them."""
    return "".join(c if c.isprintable() or _cells_of(c) == 0 else "\ufffd" for c in " ".join(text.split()))


def shorten(text: str, width: int) -> str:
    """As much of a text as fits, with a mark where it was cut."""
    if cells(text) <= width:
        return text
    part = _take(text, width - 4)
    return f"{part[: part.rfind(' ')] if ' ' in part else part} ..."


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most ``width`` cells, broken between words, and inside of one only if it is longer than a line."""
    lines, line = [], ""
    for word in text.split():
        if line and cells(line) + 1 + cells(word) <= width - len(indent):
            line += f" {word}"
            continue
        if line:
            lines.append(indent + line)
        while cells(word) > width - len(indent):
            part = _take(word, width - len(indent))
            lines.append(indent + part)
            word = word[len(part) :]
        line = word
    return [*lines, indent + line] if line else lines


def _take(text: str, width: int) -> str:
    """The beginning of a text that fits, at least one character."""
    taken = 0
    for place, character in enumerate(text):
        taken += _cells_of(character)
        if taken > width and place:
            return text[:place]
    return text

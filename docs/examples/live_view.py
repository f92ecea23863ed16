"""A small live view of a running engine: redrawn in place in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from pagedcore.outputs import EngineStats
from screen import columns

_REDRAW_EVERY = 0.2  # seconds, in a terminal
_PRINT_EVERY = 5.0  # seconds, elsewhere
_RATE_OVER = 3.0  # seconds that the shown tokens/s are averaged over
_NARROWEST = 60  # columns; in fewer a line could be broken by the terminal, which an update in place does not survive


class LiveView:
    """Shows requests done, tokens/s, running and waiting requests, and blocks in use. Call `update` after each step."""

    def __init__(self, total: int, out: TextIO = sys.stdout) -> None:
        self._total = total
        self._out = out
        self._in_place = out.isatty() and os.environ.get("TERM") != "dumb" and columns() >= _NARROWEST
        self._color = self._in_place and not os.environ.get("NO_COLOR")
        self._started = time.monotonic()
        self._shown = 0.0
        self._lines = 0
        self._history: list[tuple[float, int]] = [(self._started, 0)]  # (time, tokens sampled)

    def update(self, stats: EngineStats, done: int, *, final: bool = False) -> None:
        """Shows the state, if the last time is long enough ago or it is the final one."""
        now = time.monotonic()
        if not final and now - self._shown < (_REDRAW_EVERY if self._in_place else _PRINT_EVERY):
            return
        self._shown = now
        self._history.append((now, stats.sampled_tokens))
        while len(self._history) > 2 and self._history[1][0] < now - _RATE_OVER:
            del self._history[0]
        then, before = self._history[0]
        if final:
            then, before = self._started, 0
        rate = (stats.sampled_tokens - before) / max(now - then, 1e-9)
        if self._in_place:
            self._draw(stats, done, rate, now - self._started)
        else:
            self._print(stats, done, rate, now - self._started)

    def _print(self, stats: EngineStats, done: int, rate: float, seconds: float) -> None:
        used = stats.last_step_blocks if stats.running else stats.blocks_used  # blocks of the last step are given back
        average = " on average" if stats.running + stats.waiting == 0 else ""
        print(
            f"{seconds:5.1f} s  {done}/{self._total} answered, {rate:.0f} tokens/s{average}, {stats.running} running, "
            f"{stats.waiting} waiting, {used} of {stats.num_blocks} blocks in use",
            file=self._out,
            flush=True,
        )

    def _draw(self, stats: EngineStats, done: int, rate: float, seconds: float) -> None:
        used, total = stats.last_step_blocks, stats.num_blocks
        digits = len(f"{max(self._total, total):,}")
        counts = (("tokens/s", f"{rate:,.0f}"), ("running", stats.running), ("waiting", stats.waiting))
        lines = [
            self._row("answered", done, self._total, digits, "32", ""),
            self._row("blocks", used, total, digits, "36", " in use"),
            " · ".join([f"{self._bold(str(value))} {name}" for name, value in counts] + [f"{seconds:.1f} s"]),
        ]
        up = f"\x1b[{self._lines}F" if self._lines else ""
        self._out.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
        self._out.flush()
        self._lines = len(lines)

    def _row(self, name: str, count: int, total: int, digits: int, color: str, unit: str) -> str:
        """``name  count of total  bar  percent``, as wide as the screen, at most 100 columns."""
        share = max(0.0, min(1.0, count / total))
        before, after = f"{name:8}  {count:>{digits},} of {total:>{digits},}  ", f"  {share:4.0%}"
        bar = self._bar(share, columns(100) - len(before) - len(after) - len(" in use"), color)
        return before + bar + after + unit

    def _bar(self, share: float, width: int, color: str) -> str:
        full = round(share * width)
        text, rest = "█" * full, "░" * (width - full)
        return f"\x1b[{color}m{text}\x1b[0m{rest}" if self._color else text + rest

    def _bold(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if self._color else text

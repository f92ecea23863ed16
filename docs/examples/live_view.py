"""A small live view of a running engine: redrawn in place in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TextIO

from pagedcore.engine import EngineStats

_REDRAW_EVERY = 0.2  # seconds, in a terminal
_PRINT_EVERY = 5.0  # seconds, elsewhere
_RATE_OVER = 3.0  # seconds that the shown tokens/s are averaged over


class LiveView:
    """Shows requests done, tokens/s, running and waiting requests, and blocks in use. Call `update` after each step."""

    def __init__(self, total: int, out: TextIO = sys.stdout) -> None:
        self._total = total
        self._out = out
        self._in_place = out.isatty() and os.environ.get("TERM") != "dumb"
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
        print(
            f"{seconds:5.1f} s  {done}/{self._total} answered, {rate:.0f} tokens/s, {stats.running} running, "
            f"{stats.waiting} waiting, {stats.last_step_blocks} of {stats.num_blocks} blocks in use",
            file=self._out,
            flush=True,
        )

    def _draw(self, stats: EngineStats, done: int, rate: float, seconds: float) -> None:
        width = max(40, min(100, shutil.get_terminal_size().columns - 1))
        bar = width - 36
        used, total = stats.last_step_blocks, stats.num_blocks
        answered = self._bar(done / self._total, bar, "32")
        in_use = self._bar(used / total, bar, "36")
        counts = (("tokens/s", f"{rate:,.0f}"), ("running", stats.running), ("waiting", stats.waiting))
        lines = [
            f"answered {done:6,} of {self._total:<6,} {answered} {seconds:5.1f} s",
            f"blocks   {used:6,} of {total:<6,} {in_use} in use",
            "   ".join(f"{self._bold(str(value))} {name}" for name, value in counts),
        ]
        up = f"\x1b[{self._lines}F" if self._lines else ""
        self._out.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
        self._out.flush()
        self._lines = len(lines)

    def _bar(self, share: float, width: int, color: str) -> str:
        full = round(max(0.0, min(1.0, share)) * width)
        text, rest = "█" * full, "░" * (width - full)
        return f"\x1b[{color}m{text}\x1b[0m{rest}" if self._color else text + rest

    def _bold(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if self._color else text

"""A step between its plan and its end, written down so that an interrupt at any point loses nothing of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import starmap
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pagedcore._core import StepPlan, StepResult
    from pagedcore.request import Change, Sequence

T = TypeVar("T")


def at_once(into: list[T], function: Callable[..., T], *arguments: object) -> None:
    """``into.append(function(*arguments))``, with no moment between the call and the append at which a signal handler
    could run and the result be lost. ``function`` must be compiled code.
    """
    into.extend(starmap(function, [arguments]))


@dataclass(eq=False)
class Flight:
    """What is known of a step so far. Each field is assigned once, when it is known in full."""

    plans: list[StepPlan | None] = field(default_factory=list)  # none or one: what the scheduler planned
    samples: list[tuple[Sequence, int, bool]] = field(default_factory=list)  # whose, the token, whether it failed
    results: list[StepResult] = field(default_factory=list)  # none or one: the scheduler has the samples
    changes: list[Change] | None = None  # of the answers, once they are decided
    errors: dict[str, str] = field(default_factory=dict)  # of requests that fail in this step
    ended: dict[str, str] = field(default_factory=dict)  # requests that end with it as a whole, and why
    preemptions: dict[str, int] = field(default_factory=dict)  # how many each has had then, of those it preempted
    totals: tuple[int, int] = (0, 0)  # token_steps and slot_steps of `EngineStats` with it
    time: float = field(default_factory=time.monotonic)  # when its tokens were sampled

    @property
    def plan(self) -> StepPlan | None:
        """The plan, if there is one."""
        return self.plans[0] if self.plans else None

    @property
    def step(self) -> int:
        """The plan's number; 0 without a plan."""
        plan = self.plan
        return 0 if plan is None else plan.step

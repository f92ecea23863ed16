"""A request while the engine has it: what was asked, its answers so far, and how a step changes them.

Changing an answer has two halves, so that an interrupt anywhere loses no token and gives none twice: `Sequence.change`
decides and changes nothing, `Change.apply` only assigns and may be repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pagedcore.outputs import CompletionOutput, RequestMetrics, RequestOutput, SequenceText
from pagedcore.stop_strings import cut_at_stop
from pagedcore.tokenizer import NO_TEXT, TextState

if TYPE_CHECKING:
    import numpy as np

    from pagedcore.params import SamplingParams
    from pagedcore.tokenizer import Detokenizer

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """One call of `Engine.add_request`."""

    request_id: str
    prompt: str | None
    prompt_tokens: np.ndarray  # int32 [prompt_len], read-only
    params: SamplingParams
    stop_token_ids: frozenset[int]
    metrics: RequestMetrics
    sequences: list[Sequence] = field(default_factory=list)
    error: str | None = None

    @property
    def finished(self) -> bool:
        """All its answers have ended."""
        return all(sequence.answer.finish_reason for sequence in self.sequences)


@dataclass(eq=False)
class Sequence:
    """One answer of a request."""

    request: Request
    index: int
    key: int  # of its random numbers
    answer: SequenceText = field(default_factory=SequenceText)
    detokenizer: Detokenizer | None = None
    state: TextState = NO_TEXT  # the detokenizer's
    held: str = ""  # text that may turn out to be the beginning of a stop string

    def change(self, token: int | None, reason: str | None = None) -> Change:
        """What a token (None: the answer only ends) does to the answer. Changes nothing.

        ``reason`` is why the scheduler ended it, if it did. Whatever a detokeniser raises passes through.
        """
        answer = self.answer
        change = Change(
            self, len(answer.token_ids), len(answer.pieces), () if token is None else (token,), finish_reason=reason
        )
        if self.detokenizer is None:
            return change
        if reason == "stop" and token in self.request.stop_token_ids:
            token = None  # counted, not shown
        new, state = self.detokenizer.after(self.state, token, last=reason is not None)
        text, held, stopped = cut_at_stop(self.held + new, self.request.params.stop, last=reason is not None)
        if stopped:
            change = replace(change, finish_reason="stop", unasked=reason is None)
        return replace(change, text=text, state=state, held=held)

    def ending(self, reason: str) -> Change:
        """The answer ends here, with what was held back of its text if that can be had."""
        try:
            return self.change(None, reason)
        except Exception:
            logger.exception("detokenising request %r failed", self.request.request_id)
            return self.unchanged(reason)

    def unchanged(self, reason: str, token: int | None = None) -> Change:
        """The answer ends here, and nothing is added to its text."""
        tokens = () if token is None else (token,)
        return Change(self, len(self.answer.token_ids), len(self.answer.pieces), tokens, finish_reason=reason)


@dataclass(frozen=True, eq=False)
class Change:
    """What is added to one answer, and how long it was before."""

    sequence: Sequence
    num_tokens: int
    num_pieces: int
    tokens: tuple[int, ...]
    text: str = ""
    state: TextState = NO_TEXT
    held: str = ""
    finish_reason: str | None = None
    unasked: bool = False  # the answer ended for a reason that the scheduler does not know yet

    def apply(self) -> None:
        """Makes it so. Doing it again changes nothing."""
        sequence, answer = self.sequence, self.sequence.answer
        answer.token_ids[self.num_tokens :] = self.tokens
        answer.pieces[self.num_pieces :] = (self.text,) if self.text else ()
        sequence.state = self.state
        sequence.held = self.held
        answer.finish_reason = self.finish_reason


@dataclass(eq=False)
class News:
    """What a caller has not been told of a request: from where on, for each answer that changed."""

    request: Request
    since: dict[int, tuple[int, int]] = field(default_factory=dict)  # index: tokens, pieces told

    def note(self, change: Change) -> None:
        """Remembers the first change of each answer. Doing it again changes nothing."""
        self.since.setdefault(change.sequence.index, (change.num_tokens, change.num_pieces))

    def output(self) -> RequestOutput:
        """The request as it is now: the answers that changed, or all of them if it has ended. Changes nothing."""
        request, finished = self.request, self.request.finished
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_tokens,
            [
                CompletionOutput(sequence.index, sequence.answer, self.since.get(sequence.index))
                for sequence in request.sequences
                if finished or sequence.index in self.since
            ],
            finished,
            replace(request.metrics),  # a copy: the request's own go on
            request.error,
        )


def changes_of_step(
    samples: Iterable[tuple[Sequence, int, bool]],
    reasons: Mapping[tuple[str, int], str],
    requests: Mapping[str, Request],
) -> tuple[list[Change], dict[str, str]]:
    """What a step's samples do to the answers, and which requests fail, with the error.

    samples: (sequence, token, failed) of each sample; reasons: why the scheduler ended (request id, index). Changes
    nothing.
    """
    errors: dict[str, str] = {}
    changes: dict[Sequence, Change] = {}
    broken: list[Request] = []
    for sequence, token, failed in samples:
        request = sequence.request
        reason = reasons.get((request.request_id, sequence.index))
        if failed:
            errors[request.request_id] = "the model's logits are not finite numbers"
            changes[sequence] = sequence.ending(reason or "error")
            continue
        try:
            changes[sequence] = sequence.change(token, reason)
        except Exception as error:  # a decoder of somebody else's; the other requests go on
            logger.exception("detokenising request %r failed", request.request_id)
            errors[request.request_id] = f"detokenising failed: {error!r}"
            changes[sequence] = sequence.unchanged("error", token)
            broken.append(request)
    for (request_id, index), reason in reasons.items():  # ended without a sample in this step
        sequence = requests[request_id].sequences[index]
        if sequence not in changes:
            changes[sequence] = sequence.ending(reason)
    for sequence in (sequence for request in broken for sequence in request.sequences):
        change = changes.get(sequence)
        if change is not None and change.finish_reason is None:
            changes[sequence] = replace(change, finish_reason="error")
        elif change is None and sequence.answer.finish_reason is None:
            changes[sequence] = sequence.unchanged("error")
    return list(changes.values()), errors


def changes_of_end(request: Request, reason: str) -> list[Change]:
    """The end of what is left of a request. Changes nothing."""
    return [sequence.ending(reason) for sequence in request.sequences if sequence.answer.finish_reason is None]

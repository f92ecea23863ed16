"""What the engine gives back: the state of a request after a step, or its final state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

#: Why a sequence ended. ``stop``: a stop token was sampled, or a stop string written; ``length``: max_tokens or the
#: longest sequence is reached; ``abort``: its request was aborted; ``error``: its logits were not numbers, or its step
#: failed (see `RequestOutput.error`).
FINISH_REASONS = ("stop", "length", "abort", "error")


@dataclass
class RequestMetrics:
    """Times of one request on the monotonic clock, in seconds, and what the cache did for it."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from `add_request` to the first sampled token; None before."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def queue_time(self) -> float | None:
        """Seconds from `add_request` to the first step that computed a token of it; None before."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time


@dataclass(eq=False)
class SequenceText:
    """One sequence's answer while it grows: append-only, so that outputs can share it."""

    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None


class CompletionOutput:
    """One answer of a request as it was when this output was made. O(1) to make; text is joined when asked for."""

    __slots__ = (
        "_answer",
        "_num_pieces",
        "_num_pieces_before",
        "_num_tokens",
        "_num_tokens_before",
        "finish_reason",
        "index",
    )

    def __init__(self, index: int, answer: SequenceText, since: tuple[int, int] | None = None) -> None:
        self.index = index  # which of the request's n answers
        self.finish_reason = answer.finish_reason  # None while it is being written
        self._answer = answer
        self._num_tokens = len(answer.token_ids)
        self._num_pieces = len(answer.pieces)
        # since: the tokens and pieces that were told before; None: all of them
        self._num_tokens_before, self._num_pieces_before = since or (self._num_tokens, self._num_pieces)

    @property
    def num_tokens(self) -> int:
        """Tokens sampled so far, a final stop token included."""
        return self._num_tokens

    @property
    def token_ids(self) -> list[int]:
        """The sampled ids so far, a final stop token included."""
        return self._answer.token_ids[: self._num_tokens]

    @property
    def text(self) -> str:
        """The text so far, without a final stop token; empty for a model without a tokenizer."""
        return "".join(self._answer.pieces[: self._num_pieces])

    @property
    def new_token_ids(self) -> list[int]:
        """The ids that were added since the output before."""
        return self._answer.token_ids[self._num_tokens_before : self._num_tokens]

    @property
    def new_text(self) -> str:
        """The text that was added since the output before; text waits until its last character is complete."""
        return "".join(self._answer.pieces[self._num_pieces_before : self._num_pieces])

    @property
    def finished(self) -> bool:
        """True once it has a finish_reason."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        what = f"index={self.index}, num_tokens={self.num_tokens}, finish_reason={self.finish_reason!r}"
        return f"CompletionOutput({what}, text={self.text!r})"


@dataclass(frozen=True, eq=False)
class RequestOutput:
    """A request after a step in which it got tokens, or when it ended."""

    request_id: str
    prompt: str | None  # None where the prompt was given as token ids
    prompt_tokens: np.ndarray = field(repr=False)  # int32 [prompt_len], read-only
    outputs: list[CompletionOutput]  # the answers that got a token or ended; in the last output all n, in order
    finished: bool  # all n answers have ended: this is the request's last output
    metrics: RequestMetrics
    error: str | None = None  # why answers ended with reason "error"

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt's ids as a list, made when asked for. O(prompt)."""
        ids: list[int] = self.prompt_tokens.tolist()
        return ids


@dataclass(frozen=True)
class EngineStats:
    """Where the engine stands. Counters run since it was made; a step counts once it is complete."""

    running: int  # requests that hold blocks
    waiting: int  # requests in the line, preempted ones included
    num_blocks: int  # blocks that can be had: without the null block
    blocks_used: int  # held by requests; at rest 0
    blocks_cached: int  # held by nobody, but findable
    peak_blocks_used: int
    block_size: int  # tokens
    block_bytes: int
    last_step_blocks: int  # blocks used while the last step ran
    token_steps: int  # summed over all steps: tokens in the blocks used, one in a shared block counted once
    slot_steps: int  # summed over all steps: slots of the blocks used
    steps: int
    computed_tokens: int  # prompt and answer tokens that went through the model
    sampled_tokens: int
    preemptions: int
    prefix_query_tokens: int  # prompt tokens looked up in the prefix cache
    prefix_hit_tokens: int  # and found there
    block_copies: int  # copy-on-write

    @property
    def kv_utilization(self) -> float:
        """Share of the slots of used blocks that held a token, averaged over all steps so far."""
        return self.token_steps / self.slot_steps if self.slot_steps else 1.0

    @property
    def peak_bytes_used(self) -> int:
        """The most bytes of the pool that were in use at a time."""
        return self.peak_blocks_used * self.block_bytes

"""A request while the engine has it: what was asked, and its answers so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pagedcore.outputs import RequestMetrics, RequestOutput, SequenceText

if TYPE_CHECKING:
    from pagedcore.sampling import SamplingParams
    from pagedcore.tokenizer import Detokenizer


@dataclass
class Sequence:
    """One answer of a request."""

    request: Request
    index: int
    key: int  # of its random numbers
    answer: SequenceText = field(default_factory=SequenceText)
    detokenizer: Detokenizer | None = None


@dataclass
class Request:
    """One call of `Engine.add_request`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    metrics: RequestMetrics
    sequences: list[Sequence] = field(default_factory=list)
    error: str | None = None

    @property
    def finished(self) -> bool:
        """All its answers have ended."""
        return all(sequence.answer.finish_reason for sequence in self.sequences)

    def output(self, sequences: list[Sequence] | None = None) -> RequestOutput:
        """Its state with the answers of these sequences, or of all of them."""
        told = self.sequences if sequences is None else sequences
        outputs = [sequence.answer.tell(sequence.index) for sequence in told]
        return RequestOutput(
            self.request_id, self.prompt, self.prompt_token_ids, outputs, self.finished, self.metrics, self.error
        )

"""The baseline of answer_prompts.py: transformers' `generate` over left-padded batches, with the same figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria


@dataclass(frozen=True)
class Figures:
    """What one way of answering the prompts came to."""

    requests: int
    prompt_tokens: int
    output_tokens: int  # a final end-of-text token included, padding not
    seconds: float
    times_to_first_token: list[float]  # seconds from the start, for each request
    kv_bytes: int  # most KV memory in use at a time
    kv_share: float  # share of that memory that held tokens, averaged over the steps
    prefix_hit_tokens: int = 0
    block_copies: int = 0
    preemptions: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second, prompts included in the time."""
        return self.output_tokens / self.seconds

    def first_token(self, percentile: int) -> float:
        """A percentile of the times to the first token, in seconds."""
        times = sorted(self.times_to_first_token)
        return statistics.quantiles(times, n=100, method="inclusive")[percentile - 1] if len(times) > 1 else times[0]

    def as_json(self) -> dict[str, Any]:
        """The figures under the names and units that the JSON file has."""
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "seconds": round(self.seconds, 3),
            "output_tokens_per_second": round(self.tokens_per_second, 2),
            "time_to_first_token_median": round(self.first_token(50), 3),
            "time_to_first_token_p90": round(self.first_token(90), 3),
            "kv_bytes": self.kv_bytes,
            "kv_share_holding_tokens": round(self.kv_share, 4),
            "prefix_hit_tokens": self.prefix_hit_tokens,
            "block_copies": self.block_copies,
            "preemptions": self.preemptions,
        }


_TELL_EVERY = 5.0  # seconds


class _Watch(StoppingCriteria):
    """Never stops anything; notes when the first step was done, and tells every few seconds how far it has come."""

    def __init__(self, started: float, on_progress: Callable[[float, int], None]) -> None:
        self.first_step: float | None = None
        self._started = self._told = started
        self._on_progress = on_progress
        self._steps = 0

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        now = time.monotonic()
        self._steps += 1
        if self.first_step is None:
            self.first_step = now
        if now - self._told >= _TELL_EVERY:
            self._told = now
            self._on_progress(now - self._started, self._steps)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def answer_in_padded_batches(
    directory: Path,
    prompts: Sequence[list[int]],
    max_tokens: Sequence[int],
    *,
    batch_size: int,
    dtype: torch.dtype,
    kv_bytes_per_token: int,
    on_progress: Callable[[float, int], None] = lambda _seconds, _steps: None,
) -> tuple[Figures, list[list[int]]]:
    """Greedy answers to the prompts, in their order, ``batch_size`` at a time, each batch padded to its longest prompt.

    A batch runs until its last answer has ended, and its cache has a place for every sequence and every position.
    Every request is there from the start, so a later batch waits for the earlier ones. ``on_progress`` gets seconds and
    the batch's steps every few seconds. Returns the figures and the answers' token ids.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=False).eval()
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    pad = model.generation_config.pad_token_id or 0
    answers: list[list[int]] = []
    times: list[float] = []
    slots = held = most_slots = 0
    started = time.monotonic()
    for first in range(0, len(prompts), batch_size):
        batch, limits = prompts[first : first + batch_size], max_tokens[first : first + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        watch = _Watch(started, on_progress)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=max(limits), do_sample=False, stopping_criteria=[watch]
            )
        steps = out.shape[1] - longest
        for prompt, row, limit in zip(batch, out[:, longest:].tolist(), limits, strict=True):
            end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
            answers.append(row[: min(end, limit)])
            times.append((watch.first_step or started) - started)
            # A sequence that has ended keeps its place, and all of it is padding to no use from then on.
            held += sum(len(prompt) + step for step in range(min(end, limit)))
        slots += sum(len(batch) * (longest + step) for step in range(steps))
        most_slots = max(most_slots, len(batch) * (longest + steps))
    figures = Figures(
        requests=len(prompts),
        prompt_tokens=sum(map(len, prompts)),
        output_tokens=sum(map(len, answers)),
        seconds=time.monotonic() - started,
        times_to_first_token=times,
        kv_bytes=most_slots * kv_bytes_per_token,
        kv_share=held / slots,
    )
    return figures, answers

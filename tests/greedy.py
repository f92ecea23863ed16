"""Are an engine's greedy tokens those of transformers' `generate`? Equal up to rounding, and no further."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

#: A difference counts only where the best logit is at least this far above the one of the token that was taken.
NEAR_TIE = 1e-4


class Reference:
    """A model as transformers runs it: contiguous cache, one prompt at a time, float32."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        # Eager: the one form of attention that every family has.
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._answers: dict[tuple[tuple[int, ...], int, bool], list[int]] = {}

    def generate(self, prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
        """The greedy answer, a final end-of-text token included. Remembered."""
        key = (tuple(prompt), max_tokens, ignore_eos)
        if key not in self._answers:
            ids = torch.tensor([list(prompt)])
            options = {"eos_token_id": -1} if ignore_eos else {}
            with torch.inference_mode():
                out = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, **options
                )
            self._answers[key] = out[0, len(prompt) :].tolist()
        return self._answers[key]

    @torch.inference_mode()
    def gaps(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """How far each token of an answer is below the best one, given the tokens before it."""
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].double()
        taken = logits.gather(1, torch.tensor(list(answer))[:, None])[:, 0]
        return (logits.max(dim=-1).values - taken).tolist()

    def check(self, prompt: Sequence[int], answer: Sequence[int], max_tokens: int, stop: Collection[int] = ()) -> None:
        """Fails unless ``answer`` is what `generate` gives, but for near-ties: there either token may be taken, and
        from there on the answer is compared with what the model says after the tokens that were taken. Without stop
        tokens the answer goes on to max_tokens."""
        expected = self.generate(prompt, max_tokens, ignore_eos=not stop)
        if list(answer) == expected:
            return
        gaps = self.gaps(prompt, answer)
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        assert gaps[worst] < NEAR_TIE, (
            f"token {worst} of the answer to {len(prompt)} tokens is {answer[worst]}, {gaps[worst]:.3g} below the best "
            f"got {list(answer)}, expected {expected}"
        )
        assert len(answer) == max_tokens or answer[-1] in stop, (
            f"the answer stops after {len(answer)} of {max_tokens} tokens without a reason"
        )
        assert not any(token in stop for token in answer[:-1]), f"the answer goes on after a stop token: {list(answer)}"


def run_all(engine: Any, requests: dict[str, tuple[Sequence[int], Any]]) -> dict[str, Any]:
    """Adds (prompt, params) by id, steps until all are done, and returns each request's final answers as lists of
    ids.
    """
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    answers: dict[str, dict[int, list[int]]] = {request_id: {} for request_id in requests}
    while engine.has_unfinished:
        for output in engine.step():
            for completion in output.outputs:
                answers[output.request_id].setdefault(completion.index, []).extend(completion.new_token_ids)
    return {request_id: [tokens for _, tokens in sorted(by_index.items())] for request_id, by_index in answers.items()}

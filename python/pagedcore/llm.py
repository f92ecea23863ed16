"""Prompts in, answers out: the engine behind two calls."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Self

from pagedcore.engine import Engine
from pagedcore.errors import InvalidArgumentError, UnknownRequestError, UnsupportedError
from pagedcore.models import LoadedModel
from pagedcore.outputs import RequestOutput
from pagedcore.params import SamplingParams

if TYPE_CHECKING:
    from pagedcore.engine import Prompt

    Message = Mapping[str, Any]


class LLM:
    """A model that answers many prompts at once.

    >>> with LLM("path/to/model") as llm:                                               # doctest: +SKIP
    ...     for output in llm.generate(["Hello,", "Once upon a time"], SamplingParams(max_tokens=20)):
    ...         print(output.outputs[0].text)

    Takes the arguments of `Engine`. Use as a context manager, or call `close`.
    """

    def __init__(self, model: str | os.PathLike[str] | LoadedModel, **options: Any) -> None:
        self.engine = Engine(model, **options)
        ids = map("llm-{}".format, itertools.count())
        self._free_ids = itertools.filterfalse(self.engine.in_use, ids)  # an id may be the choice of somebody else

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answers all prompts; the outputs are in their order.

        Args:
            prompts: One prompt or a list of them: text, or token ids.
            params: For all, or one for each.
            progress: Show a progress bar on stderr, where that is a terminal.

        All prompts are checked before the first one runs; the errors are those of `Engine.add_request`. If the call is
        interrupted, what it added is aborted. Requests that were added through `engine` run along, and their news waits
        for `Engine.step`.
        """
        return self._run(_prompt_list(prompts), params, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or a list of them, in the model's chat format.

        Args:
            messages: ``[{"role": "user", "content": "..."}, ...]``, or a list of such lists.
            params: As in `generate`.
            progress: As in `generate`.
            **template: Handed to the model's chat template.

        Raises UnsupportedError for a model without a tokenizer or a chat template, InvalidArgumentError for messages
        it refuses.
        """
        conversations = _conversation_list(messages)
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise UnsupportedError(
                f"{self.engine.model.name} has no tokenizer", hint="use generate with token ids", argument="messages"
            )
        return self._run(
            [tokenizer.encode_chat(conversation, **template) for conversation in conversations], params, progress
        )

    def _run(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, progress: bool
    ) -> list[RequestOutput]:
        every = _params_list(params, len(prompts))
        requests = [
            self.engine.prepare(next(self._free_ids), prompt, each) for prompt, each in zip(prompts, every, strict=True)
        ]
        results: dict[str, RequestOutput] = {}
        unanswered = {request.request_id for request in requests}
        bar = _ProgressBar(len(requests), progress)
        try:
            for request in requests:
                self.engine.add_prepared(request)
            # One that somebody else aborts is told to them. As a rule `any` looks at one id.
            while any(map(self.engine.in_use, unanswered)):
                new_tokens = 0
                for output in self.engine.step(only=unanswered):
                    new_tokens += sum(len(completion.new_token_ids) for completion in output.outputs)
                    if output.finished:
                        results[output.request_id] = output
                        unanswered.discard(output.request_id)
                        bar.finished()
                bar.tokens(new_tokens)
        finally:
            bar.close()
            for request in requests:
                self.engine.discard(request.request_id)
        if unanswered:  # aborted through the engine by somebody else
            request_id = min(unanswered)
            raise UnknownRequestError(
                f"{len(unanswered)} of {len(requests)} prompts got no answer, {request_id!r} first: "
                "the engine no longer has them",
                request_id=request_id,
            )
        return [results[request.request_id] for request in requests]

    def close(self) -> None:
        """Closes the engine. Idempotent."""
        self.engine.close()

    def __enter__(self) -> Self:
        self.engine.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ProgressBar:
    """Requests done and output tokens per second, on stderr; nothing where that is no terminal."""

    def __init__(self, total: int, shown: bool) -> None:
        from tqdm import tqdm

        # disable=None: tqdm shows nothing unless its file is a terminal
        self._bar = tqdm(total=total, desc="answers", unit="req", disable=None if shown else True, dynamic_ncols=True)
        self._tokens = 0

    def finished(self) -> None:
        self._bar.update(1)

    def tokens(self, count: int) -> None:
        self._tokens += count
        if not self._bar.disable:
            elapsed = self._bar.format_dict["elapsed"]
            self._bar.set_postfix_str(f"{self._tokens / elapsed:.0f} tok/s" if elapsed else "", refresh=False)
            self._bar.update(0)

    def close(self) -> None:
        self._bar.close()


def _prompt_list(prompts: Any) -> list[Any]:
    """One prompt becomes a list of one. Token ids of one prompt are told from a list of prompts by their first
    element.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, bytearray, Mapping)) or not hasattr(prompts, "__len__"):
        raise InvalidArgumentError(
            f"prompts is {type(prompts).__name__}; a list of texts or of token ids is needed", argument="prompts"
        )
    if hasattr(prompts, "ndim"):  # an array: one prompt a row
        return list(prompts) if prompts.ndim > 1 else [prompts]
    if len(prompts) and isinstance(prompts[0], Integral):
        return [prompts]
    return list(prompts)


def _conversation_list(messages: Any) -> list[Sequence[Message]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidArgumentError(
            "messages is not a list of messages",
            hint='[{"role": "user", "content": "..."}]',
            argument="messages",
            got=type(messages).__name__,
        )
    conversations = [messages] if isinstance(messages[0], Mapping) else list(messages)
    for conversation in conversations:
        if isinstance(conversation, (str, bytes)) or not isinstance(conversation, Sequence) or not conversation:
            raise InvalidArgumentError(
                f"a conversation is {conversation!r}, not a list of messages", argument="messages"
            )
        for message in conversation:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
                raise InvalidArgumentError(
                    f"a message is {message!r}; it needs a role and content", argument="messages", got=message
                )
    return conversations


def _params_list(params: Any, count: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or isinstance(params, (str, bytes)):
        raise InvalidArgumentError(
            f"params is {type(params).__name__}, not SamplingParams", argument="params", got=type(params).__name__
        )
    if len(params) != count:
        raise InvalidArgumentError(
            f"{len(params)} params for {count} prompts", argument="params", got=len(params), expected=count
        )
    return list(params)

"""Text to token ids and back; back one token at a time.

A token is not a piece of text: a character's UTF-8 bytes may be spread over several tokens, and what a token decodes
to may depend on its neighbours (SentencePiece drops the space before the first token it is given). So new tokens are
decoded together with a few before them, and text is given out only when it can no longer change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pagedcore.errors import InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: What a decoder writes for bytes that are not, or not yet, UTF-8.
_REPLACEMENT = "\ufffd"

#: Most tokens of a character that are not its last one: UTF-8 has at most four bytes for it, and a token at least one.
_INCOMPLETE = 3

#: Tokens that stay in the decoding window for context after their text was given out; more where a character would be
#: cut.
_CONTEXT = 5

#: The last tokens of a prompt that a `Detokenizer` looks at: context that begins with a whole character, and one that
#: the answer completes.
PROMPT_CONTEXT = _CONTEXT + _INCOMPLETE + _INCOMPLETE

#: Tokens that may stay undecided. A character has at most four bytes, so more than these are no character in the
#: making.
_MAX_UNDECIDED = 12

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _has_files(location: str) -> bool:
    """True if a model directory, or a repository of the hub, has anything that a tokenizer is read from."""
    from transformers.utils import cached_file

    if Path(location).is_dir():
        return any(Path(location, name).is_file() for name in _FILES)
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(location, name, **quietly) is not None for name in _FILES)


class Tokenizer:
    """A Hugging Face tokenizer with the few calls that the engine needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.hf = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)  # Rust, a quarter of the time of the Python call

    @classmethod
    def load(cls, location: str, **options: Any) -> Tokenizer | None:
        """The tokenizer beside a model, or None where there is none. A broken one is an InvalidArgumentError.

        ``options`` are arguments of from_pretrained.
        """
        from transformers import AutoTokenizer

        failure: Exception | None = None
        try:
            tokenizer = AutoTokenizer.from_pretrained(location, **options)
        except Exception as error:  # noqa: BLE001  # it raises whatever the files' readers do; told below
            failure = error
        # Asked last, when a repository's files are here. Without any, transformers makes some tokenizers up.
        if "gguf_file" not in options and not _has_files(location):
            logger.info("no tokenizer in %s: token ids only", location)
            return None
        if failure is not None:
            raise InvalidArgumentError(
                f"the tokenizer of {location} could not be read: {failure}", argument="model", got=location
            ) from failure
        return cls(tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, if the tokenizer has one."""
        token: int | None = self.hf.eos_token_id
        return token

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model wants around a text. O(length)."""
        return list(self.hf(text, add_special_tokens=True)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> list[int]:
        """Token ids of a conversation in the model's chat format, ending where the assistant's answer begins.

        Raises UnsupportedError if the model has no chat template, InvalidArgumentError if the template refuses the
        messages.
        """
        if not self.hf.chat_template:
            raise UnsupportedError(
                "this model has no chat template", hint="use generate with a text prompt", argument="messages"
            )
        try:
            conversation = [dict(message) for message in messages]
            options = {"tokenize": True, "add_generation_prompt": True, "return_dict": False, **template}
            return list(self.hf.apply_chat_template(conversation, **options))
        except Exception as error:  # templates raise whatever their author chose
            raise InvalidArgumentError(
                f"the chat template refused the messages: {error}", argument="messages"
            ) from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, without special tokens. O(length)."""
        if self._backend is not None:
            text = self._backend.decode(token_ids, skip_special_tokens=True)
        else:
            text = self.hf.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def detokenizer(self) -> Detokenizer:
        """What turns answers into text as they grow; one is enough for all of them."""
        return Detokenizer(self.decode)


class TextState(NamedTuple):
    """How far one sequence's text has come."""

    window: tuple[int, ...] = ()  # context, then tokens not given out in full
    settled: int = 0  # leading tokens of the window whose text is out
    given: int = 0  # characters of the window's text that are out


NO_TEXT = TextState()


class Detokenizer:
    """Turns a sequence's tokens into text as they come. O(1) per token, amortised. It keeps no state of its own:
    `begin` makes one, and `after` says what a token makes of it.

    The pieces joined are what `decode` gives for all tokens at once. Two exceptions, both of text that is broken
    anyway: byte runs that are no UTF-8 keep the readable characters before them (some decoders replace the whole
    run), and a run of more than twelve such tokens is given out as it is.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode

    def begin(self, prompt_token_ids: Iterable[int] = ()) -> TextState:
        """The state before the first token. The end of the prompt is context, so that the first word keeps its
        leading space. ``prompt_token_ids`` can be its last few tokens only (`PROMPT_CONTEXT`).
        """
        tokens = tuple(int(token) for token in prompt_token_ids)
        # A character that the prompt leaves incomplete comes out with the answer.
        for undecided in range(min(_INCOMPLETE, len(tokens)) + 1):
            end = len(tokens) - undecided
            context, text = self._context(tokens[:end])
            if not text.endswith(_REPLACEMENT):
                return TextState((*context, *tokens[end:]), len(context), len(text))
        context, text = self._context(tokens)  # these bytes are no character in the making
        return TextState(context, len(context), len(text))

    def after(self, state: TextState, token: int | None, *, last: bool = False) -> tuple[str, TextState]:
        """Adds a token, if there is one: the text that is now certain, often a word, empty while a character is
        incomplete; and the state then. With ``last`` the rest is certain too: an incomplete character comes out as
        U+FFFD.
        """
        window = state.window if token is None else (*state.window, token)
        text = self._decode(window)
        waiting = text.endswith(_REPLACEMENT) and len(window) - state.settled <= _MAX_UNDECIDED and not last
        if waiting:
            text = text.rstrip(_REPLACEMENT)
        new = text[state.given :]
        given = max(state.given, len(text))
        if waiting:
            return new, TextState(window, state.settled, given)
        if len(window) > 4 * _CONTEXT:  # slide: amortised, as decoding the context anew costs about a token
            window, text = self._context(window)
            given = len(text)
        return new, TextState(window, len(window), given)

    def _context(self, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """The last few of these tokens, and what they decode to. They begin with a whole character if any does: bytes
        that begin within one make some decoders give up every byte up to the next word.
        """
        shortest = tokens[-_CONTEXT:]
        for length in range(_CONTEXT, _CONTEXT + _INCOMPLETE + 1):
            context = tokens[-length:]
            text = self._decode(context) if context else ""
            if not text.startswith(_REPLACEMENT):
                return context, text
            if length >= len(tokens):
                break
        return shortest, self._decode(shortest)

"""Every exception that pagedcore raises.

Each class derives from `PagedCoreError` and from the builtin that fits, so that ``except ValueError`` and
``except PagedCoreError`` both work. The numbers of the message are attributes as well, and ``hint`` says what to
do about it. The Rust core and the kernels raise these same classes.
"""

from __future__ import annotations

from typing import Any


class PagedCoreError(Exception):
    """Base of all errors. ``hint`` says what to do; numbers named in the message are attributes.

    Attributes are passed as keywords and default to None, so that instances survive pickling.
    """

    hint: str = ""

    def __init__(self, message: str = "", *, hint: str = "", **attributes: Any) -> None:
        super().__init__(message)
        if hint:
            self.hint = hint
        for name, value in attributes.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        # Not super().__str__(): KeyError shows the repr of its message.
        message = str(self.args[0]) if self.args else ""
        return f"{message} (hint: {self.hint})" if self.hint else message


class InvalidArgumentError(PagedCoreError, ValueError):
    """An argument has a value that the call does not take. Attributes: argument, got, expected."""

    argument: str | None = None
    got: Any = None
    expected: Any = None


class UnsupportedError(InvalidArgumentError):
    """A valid combination that this version does not do. Attributes: argument, got, expected (what is supported)."""


class TokenOutOfRangeError(InvalidArgumentError):
    """A token id outside the vocabulary. Attributes: token, position, vocab_size."""

    token: int | None = None
    position: int | None = None
    vocab_size: int | None = None


class RequestTooLargeError(PagedCoreError, ValueError):
    """A request that could never run, even alone. Attributes: needed, limit (in the unit the message names)."""

    needed: int | None = None
    limit: int | None = None


class DuplicateRequestError(PagedCoreError, ValueError):
    """A request id that is still in use. Attribute: request_id."""

    request_id: Any = None


class UnknownRequestError(PagedCoreError, KeyError):
    """No request with this id. Attribute: request_id."""

    request_id: Any = None


class StaleHandleError(PagedCoreError, KeyError):
    """A sequence, node or namespace handle that was freed, or never existed. Attributes: kind, handle."""

    kind: str | None = None
    handle: int | None = None


class BlockError(PagedCoreError, ValueError):
    """A block id that is out of range, null, not allocated, or already published. Attributes: block, num_blocks."""

    block: int | None = None
    num_blocks: int | None = None


class OutOfBlocksError(PagedCoreError, MemoryError):
    """Not enough blocks; nothing was allocated. Attributes: needed, free (free plus evictable blocks)."""

    needed: int | None = None
    free: int | None = None


class StepError(PagedCoreError, RuntimeError):
    """Steps were begun, completed, updated or cancelled out of order. Attributes: step, expected."""

    step: int | None = None
    expected: int | None = None


class ClosedError(PagedCoreError, RuntimeError):
    """The object was closed."""


class CorruptionError(PagedCoreError, RuntimeError):
    """An invariant does not hold. One of the core's is raised by every later call too, until the core is closed; one
    that a device's kernels met fails the step.

    A bug in pagedcore, or the caller released or committed blocks that were somebody else's.
    """


class ForkedProcessError(PagedCoreError, RuntimeError):
    """The core was used in a child of os.fork(): its state belongs to the parent. Create a new one in the child."""

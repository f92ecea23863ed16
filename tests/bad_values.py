"""Values that arguments must refuse, and with which exception. All are made anew for each use."""

from __future__ import annotations

import array
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from pagedcore.errors import (
    BlockError,
    InvalidArgumentError,
    PagedCoreError,
    StaleHandleError,
    StepError,
    TokenOutOfRangeError,
    UnknownRequestError,
)

VOCAB = 1000


class Index:
    """Not an int, though it can be used as one."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> Any:
        return self.value


class Raises:
    """Fails in every protocol that is tried on it."""

    def __index__(self) -> int:
        raise TypeError("no index")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("no array")

    def __len__(self) -> int:
        raise TypeError("no len")


@dataclass(frozen=True)
class Bad:
    """Values that an argument must refuse, and with what."""

    error: tuple[type[BaseException], ...]
    values: Callable[[], list[Any]]


WRONG_NUMBERS = Bad(
    (TypeError,),
    lambda: [
        "1",
        b"1",
        1.0,
        1.5,
        math.nan,
        math.inf,
        True,
        False,
        np.True_,
        1j,
        Decimal(1),
        Fraction(1),
        [1],
        (1,),
        {},
        set(),
        object(),
        Raises(),
        Index("1"),
        Index(1.5),
        len,
        int,
        ...,
        np.float64(1),
        np.array([1, 2]),
        np.array(1.5),
        range(1),
    ],
)
NOT_NONE = Bad((TypeError,), lambda: [None])
NEGATIVE = Bad((InvalidArgumentError,), lambda: [-1, -(2**31), -(2**63), -(2**63) - 1, -(2**64), -(10**30), Index(-1)])
HUGE = Bad((InvalidArgumentError,), lambda: [2**63, 2**64 - 1, 2**64, 10**30, Index(2**64), 1 << 5000])
# Representable, but far more than there is: which error depends on the call.
TOO_MUCH = Bad((PagedCoreError,), lambda: [2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, np.int64(2**40)])
ZERO = Bad((InvalidArgumentError,), lambda: [0, Index(0), np.int32(0)])

WRONG_ARRAYS = Bad(
    (TypeError,),
    lambda: [
        None,
        5,
        1.5,
        "12",
        "",
        object(),
        Raises(),
        {},
        {1: 2},
        {1},
        iter([1]),
        (i for i in [1]),
        len,
        list,
        ...,
        True,
        b"\x01\x00\x00\x00",
        bytearray(8),
        memoryview(b"abcd"),
        [1, None],
        [1, "2"],
        [1, 2.0],
        [True],
        [np.True_],
        [[1], [2]],
        [object()],
        (1, 1j),
        [Raises()],
        np.ones(2),
        np.ones(2, np.float32),
        np.ones(2, bool),
        np.ones(2, np.uint32),
        np.ones(2, np.int16),
        np.ones(2, np.uint64),
        np.ones(2, ">i4"),
        np.ones(2, ">i8"),
        np.array(["1"]),
        np.array([b"1"]),
        np.array([1, None], object),
        np.array(["2020"], "M8[s]"),
        np.zeros(2, [("a", "i4")]),
        array.array("f", [1.0]),
        array.array("H", [1]),
        np.ones(2, np.complex64),
        [Index(None)],
    ],
)
WRONG_SHAPES = Bad(
    (InvalidArgumentError,),
    lambda: [
        np.ones((1, 1), np.int32),
        np.ones((2, 2), np.int64),
        np.array(1, np.int32),
        np.int32(1),
        np.int64(1),
        np.ones((0, 3), np.int32),
        range(2**40),
        range(2**70),
        np.broadcast_to(np.int32(1), 2**40),
        np.broadcast_to(np.int64(1), 2**29),
        np.frombuffer(bytes(9), np.uint8)[1:].view(np.int32),
    ],
)
WRONG_TOKENS = Bad(
    (TokenOutOfRangeError,),
    lambda: [
        [1, -1],
        [2**31],
        [2**63],
        [2**64],
        [-(2**70)],
        (VOCAB,),
        range(VOCAB - 1, VOCAB + 1),
        np.array([-1], np.int32),
        np.array([2**40]),
        np.array([VOCAB], np.int32),
        array.array("q", [1, -5]),
        [1, Index(-1)],
        np.array([1, 2**31 - 1])[::-1],
        np.array([-(2**63)]),
    ],
)
WRONG_BLOCKS = Bad(
    (BlockError,),
    lambda: [
        [0],
        [-1],
        [2**31],
        [2**64],
        [60],
        np.array([0], np.int32),
        np.array([-1]),
        np.array([2**40]),
        [1, 2, 2**31 - 1],
    ],
)
STALE = Bad((StaleHandleError,), lambda: [-1, 2**64, 10**30, 2**63, 2**64 - 1, 0xDEAD_0000_0003, Index(-7)])
WRONG_TEXT = Bad((TypeError,), lambda: [None, 5, b"a", 1.5, [], ["a"], object(), str, bytearray(b"a"), np.array("a")])
LONE_SURROGATE = Bad((InvalidArgumentError,), lambda: ["\ud800", "a\udfffb"])
WRONG_FLAGS = Bad((TypeError,), lambda: [None, 0, 1, "yes", "", 1.0, [], np.array(True), object()])
WRONG_EXTRA_KEYS = Bad(
    (TypeError,), lambda: [None, "abc", b"abc", 5, {}, {"a"}, [1.5], [None], (True,), [("a",)], iter(["a"])]
)
HUGE_EXTRA_KEYS = Bad((InvalidArgumentError,), lambda: [[2**63], (-(2**64),), ["\ud800"]])
WRONG_CONTENT = Bad(
    (TypeError,),
    lambda: [
        None,
        5,
        "a",
        {},
        [5],
        ["abc"],
        [[0, 1, b"k"]],
        [("0", 1, b"")],
        [(0, 1.5, b"")],
        [(0, 1, "k")],
        [(0, True, b"")],
    ],
)
BAD_CONTENT = Bad(
    (InvalidArgumentError,),
    lambda: [
        [()],
        [(1,)],
        [(0, 1, b"", 3)],
        [(0, 0, b"")],
        [(5, 1, b"")],
        [(0, 2**63, b"")],
        [(-(2**64), 1, b"")],
        [(0, 1, bytes(257))],  # not a digest
        [(0, 9, bytes([i])) for i in range(17)],  # too many at one position
    ],
)
UNKNOWN_REQUESTS = Bad((UnknownRequestError,), lambda: ["", "nobody", "r1 ", "ü" * 1000])
WRONG_STEPS = Bad((StepError,), lambda: [10**6, 2**62, 2**63 - 1])
WRONG_OUTS = Bad(
    (TypeError,),
    lambda: [
        5,
        "abc",
        [0] * 64,
        (0,) * 64,
        {},
        object(),
        np.zeros(64),
        np.zeros(64, np.uint32),
        np.zeros(64, np.int16),
        np.zeros(64, ">i4"),
        bytearray(256),
        array.array("f", [0.0] * 64),
    ],
)
BAD_OUTS = Bad(
    (InvalidArgumentError,),
    lambda: [np.zeros((8, 8), np.int32), np.zeros((64, 1), np.int64), b""],
)

SIZE = [WRONG_NUMBERS, NOT_NONE, NEGATIVE, HUGE, TOO_MUCH]
POSITIVE = [*SIZE, ZERO]
OPTIONAL_SIZE = [WRONG_NUMBERS, NEGATIVE, HUGE]
STEP = [WRONG_NUMBERS, NEGATIVE, HUGE, WRONG_STEPS]
TOKENS = [WRONG_ARRAYS, WRONG_SHAPES, WRONG_TOKENS]
ANY_TOKENS = [
    WRONG_ARRAYS,
    WRONG_SHAPES,
    Bad((TokenOutOfRangeError,), lambda: [[-1], [2**31], np.array([2**31]), [2**64]]),
]
BLOCKS = [WRONG_ARRAYS, WRONG_SHAPES, WRONG_BLOCKS]
COMMIT_BLOCKS = [WRONG_ARRAYS, WRONG_SHAPES, Bad((BlockError, InvalidArgumentError), WRONG_BLOCKS.values)]
HANDLE = [WRONG_NUMBERS, NOT_NONE, STALE]
TEXT = [WRONG_TEXT, LONE_SURROGATE]
FLAG = [WRONG_FLAGS]
NAMESPACE = {"tenant": TEXT, "cache_salt": TEXT, "extra_keys": [WRONG_EXTRA_KEYS, HUGE_EXTRA_KEYS]}
CONTENT = [WRONG_CONTENT, BAD_CONTENT]
REQUEST = [WRONG_TEXT, LONE_SURROGATE, UNKNOWN_REQUESTS]

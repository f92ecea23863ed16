"""The exceptions: what they derive from, what they carry, and that the core raises each of them."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
from pagedcore import BlockPool, KVCacheManager, KVGroup, PrefixCache, Scheduler, SchedulerConfig, errors
from pagedcore.errors import PagedCoreError

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, PagedCoreError)]
BUILTIN = {
    errors.InvalidArgumentError: ValueError,
    errors.UnsupportedError: ValueError,
    errors.TokenOutOfRangeError: ValueError,
    errors.RequestTooLargeError: ValueError,
    errors.DuplicateRequestError: ValueError,
    errors.UnknownRequestError: KeyError,
    errors.StaleHandleError: KeyError,
    errors.BlockError: ValueError,
    errors.OutOfBlocksError: MemoryError,
    errors.StepError: RuntimeError,
    errors.ClosedError: RuntimeError,
    errors.CorruptionError: RuntimeError,
    errors.ForkedProcessError: RuntimeError,
}


@pytest.mark.parametrize("cls", CLASSES)
def test_each_derives_from_the_builtin_that_fits(cls: type[PagedCoreError]) -> None:
    assert issubclass(cls, Exception)
    assert cls is PagedCoreError or issubclass(cls, BUILTIN[cls])
    assert cls.__doc__


@pytest.mark.parametrize("cls", CLASSES)
def test_each_survives_pickling(cls: type[PagedCoreError]) -> None:
    error = cls("it went wrong", hint="do better", argument="n", needed=5)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is cls
        assert str(again) == "it went wrong (hint: do better)"
        assert (again.argument, again.needed, again.hint) == ("n", 5, "do better")
    assert str(cls("plain")) == "plain", "also where the builtin shows the repr"
    assert str(cls()) == ""


def scheduler(**kwargs: int) -> Scheduler:
    sizes = {"num_blocks": 9, "block_size": 4, "max_num_seqs": 2, "max_model_len": 64, "max_num_batched_tokens": 16}
    return Scheduler(SchedulerConfig(**{**sizes, **kwargs}))


def raise_unsupported() -> None:
    KVCacheManager(8, groups=(KVGroup(window=4),))


def raise_token() -> None:
    KVCacheManager(8, vocab_size=100).add(np.array([5, 100]))


def raise_too_large() -> None:
    scheduler().add_request("big", range(40), max_tokens=1)


def raise_duplicate() -> None:
    one = scheduler()
    one.add_request("a", [1], 1)
    one.add_request("a", [1], 1)


def raise_stale() -> None:
    manager = KVCacheManager(8)
    seq = manager.add([1])
    manager.free(seq)
    manager.add([1])  # in the same place
    manager.append(seq, [1])


def raise_published() -> None:
    pool = BlockPool(8, block_size=1)
    cache = PrefixCache(pool)
    blocks, ns = pool.allocate(1), cache.namespace()
    cache.commit([1], blocks, ns)
    cache.commit([2], blocks, ns)


def raise_out_of_blocks() -> None:
    manager = KVCacheManager(4, block_size=2)
    seq = manager.add(range(9))
    manager.allocate_slots(seq, 9)


RAISED = [
    (lambda: BlockPool(1), errors.InvalidArgumentError, {"argument": "num_blocks", "got": 1}),
    (lambda: BlockPool(8).allocate(-1), errors.InvalidArgumentError, {"argument": "n", "got": -1, "expected": 0}),
    (raise_unsupported, errors.UnsupportedError, {"argument": "groups", "got": 4}),
    (raise_token, errors.TokenOutOfRangeError, {"token": 100, "position": 1, "vocab_size": 100}),
    (raise_too_large, errors.RequestTooLargeError, {"needed": 10, "limit": 8}),
    (raise_duplicate, errors.DuplicateRequestError, {"request_id": "a"}),
    (lambda: scheduler().abort("b"), errors.UnknownRequestError, {"request_id": "b"}),
    (raise_stale, errors.StaleHandleError, {"kind": "sequence"}),
    (lambda: BlockPool(8).release([8]), errors.BlockError, {"block": 8, "num_blocks": 8}),
    (raise_published, errors.BlockError, {"block": 1}),
    (raise_out_of_blocks, errors.OutOfBlocksError, {"needed": 5, "free": 3}),
    (lambda: BlockPool(8).complete_step(3), errors.StepError, {"step": 3, "expected": 0}),
    (lambda: scheduler().update(1, []), errors.StepError, {"step": 1}),
]


@pytest.mark.parametrize(("call", "error", "attributes"), RAISED, ids=lambda value: getattr(value, "__name__", ""))
def test_the_core_raises_it_with_its_numbers(call, error, attributes) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for name, value in attributes.items():
        assert getattr(caught.value, name) == value, name
        assert name in ("kind", "argument", "expected") or str(value) in str(caught.value)


def test_each_class_is_raised_somewhere() -> None:
    """CorruptionError and ForkedProcessError are in test_robustness.py; nothing of levels 0 to 3 can be closed."""
    raised = {error for _, error, _ in RAISED}
    elsewhere = {errors.CorruptionError, errors.ForkedProcessError, errors.ClosedError, PagedCoreError}
    assert raised | elsewhere == set(CLASSES)

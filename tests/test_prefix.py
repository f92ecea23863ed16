"""Level 1 through Python: what was committed is found, shared, merged and evicted."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from pagedcore import BlockPool, PrefixCache
from pagedcore.errors import (
    BlockError,
    InvalidArgumentError,
    OutOfBlocksError,
    StaleHandleError,
    StepError,
    TokenOutOfRangeError,
)

SIZE = 4


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(16, block_size=SIZE)


@pytest.fixture
def cache(pool: BlockPool) -> PrefixCache:
    return PrefixCache(pool)


def publish(cache: PrefixCache, tokens, ns: int, **kwargs: object):
    """Commits the tokens in blocks of their own and lets go of them."""
    commit = cache.commit(tokens, cache.pool.allocate(len(tokens) // SIZE), ns, **kwargs)
    cache.pool.release(commit.blocks)
    return commit


def test_a_committed_prefix_is_found(cache: PrefixCache, pool: BlockPool) -> None:
    ns = cache.namespace()
    blocks = pool.allocate(3)
    commit = cache.commit(range(10), blocks, ns)  # the last block is not full
    assert commit.blocks.tolist() == blocks.tolist()
    pool.release(commit.blocks)
    assert (pool.num_cached, pool.num_used) == (2, 0)

    assert cache.probe(range(12), ns) == 8
    assert cache.probe([0, 1, 2, 3, 9, 9, 9, 9], ns) == 4
    assert cache.probe(range(12), ns, max_tokens=7) == 4
    assert cache.probe([], ns) == 0
    hit = cache.acquire(np.arange(12, dtype=np.int32), ns)
    assert (hit.num_tokens, hit.blocks.tolist(), hit.node) == (8, blocks[:2].tolist(), commit.node)
    assert hit.blocks.dtype == np.int32
    assert pool.num_used == 2
    pool.release(hit.blocks)
    cache.check()


def test_a_probe_leaves_no_trace(cache: PrefixCache, pool: BlockPool) -> None:
    ns = cache.namespace()
    publish(cache, range(8), ns)
    before = cache.stats(), pool.stats()
    assert cache.probe(range(8), ns) == 8
    assert (cache.stats(), pool.stats()) == before


def test_a_miss_holds_nothing(cache: PrefixCache, pool: BlockPool) -> None:
    hit = cache.acquire(range(8), cache.namespace())
    assert (hit.num_tokens, len(hit.blocks), hit.node) == (0, 0, None)
    assert pool.num_used == 0


def test_namespaces_keep_prompts_apart(cache: PrefixCache) -> None:
    keys = [
        {},
        {"tenant": "a"},
        {"cache_salt": "a"},
        {"extra_keys": ("a",)},
        {"extra_keys": (b"a",)},
        {"extra_keys": (1,)},
        {"extra_keys": ["1"]},
        {"extra_keys": ("a", "")},
    ]
    namespaces = [cache.namespace(**key) for key in keys]
    assert len(set(namespaces)) == len(keys)
    publish(cache, range(4), namespaces[1])
    assert [cache.probe(range(4), ns) for ns in namespaces] == [0, 4, 0, 0, 0, 0, 0, 0]
    assert cache.namespace(tenant="a") == namespaces[1]


def test_a_namespace_vanishes_when_empty_and_unheld(cache: PrefixCache, pool: BlockPool) -> None:
    ns = cache.namespace(tenant="a")
    publish(cache, range(4), ns)
    assert cache.drop_namespace(ns) == 0
    assert cache.probe(range(4), ns) == 4, "its block keeps it alive"
    assert cache.evict(1) == 1
    with pytest.raises(StaleHandleError) as caught:
        cache.probe(range(4), ns)
    assert (caught.value.kind, caught.value.handle) == ("namespace", ns)
    assert isinstance(caught.value, KeyError)
    again = cache.namespace(tenant="a")
    assert again != ns
    publish(cache, range(4), again)
    assert cache.drop_namespace(again, purge=True) == 1
    assert pool.num_cached == 0


def test_equal_blocks_are_merged(cache: PrefixCache, pool: BlockPool) -> None:
    ns = cache.namespace()
    first, second = pool.allocate(2), pool.allocate(2)
    assert cache.commit(range(8), first, ns).blocks.tolist() == first.tolist()
    step = pool.begin_step()
    merged = cache.commit(range(8), second, ns)
    assert merged.blocks.tolist() == first.tolist(), "the caller's references moved"
    assert [pool.ref_count(b) for b in first] == [2, 2]
    assert pool.num_fenced == 2, "a step in flight may still read the duplicates"
    pool.complete_step(step)
    assert pool.num_fenced == 0
    assert cache.stats()["merged"] == 2


def test_a_commit_goes_on_from_a_node(cache: PrefixCache, pool: BlockPool) -> None:
    ns = cache.namespace()
    head = publish(cache, range(4), ns)
    tail = publish(cache, range(4, 8), ns, parent=head.node)
    assert cache.probe(range(8), ns) == 8
    assert cache.acquire(range(8), ns).node == tail.node
    other = cache.namespace(tenant="other")
    with pytest.raises(InvalidArgumentError, match="parent"):
        cache.commit(range(4), pool.allocate(1), other, parent=head.node)


def test_eviction_takes_children_first(cache: PrefixCache, pool: BlockPool) -> None:
    ns = cache.namespace()
    publish(cache, range(12), ns)
    assert [cache.evict(1), cache.probe(range(12), ns)] == [1, 8]
    assert [cache.evict(9), cache.probe(range(12), ns)] == [2, 0]
    assert pool.num_free == 15


def test_an_allocation_evicts_the_least_recently_used(cache: PrefixCache, pool: BlockPool) -> None:
    ns = cache.namespace()
    prompts = [[i] * SIZE for i in range(15)]
    for prompt in prompts:
        publish(cache, prompt, ns)
    pool.release(cache.acquire(prompts[0], ns).blocks)
    pool.allocate(14)
    assert [cache.probe(p, ns) for p in prompts] == [SIZE] + [0] * 14
    with pytest.raises(OutOfBlocksError) as caught:
        pool.allocate(2)
    assert caught.value.free == 1
    pool.check()


def test_what_a_step_reads_is_not_evicted(cache: PrefixCache, pool: BlockPool) -> None:
    ns = cache.namespace()
    step = pool.begin_step()
    publish(cache, range(4), ns)
    assert pool.num_cached == 1
    assert cache.evict(1) == 0
    assert cache.probe(range(4), ns) == 4, "a fence delays reuse, not findability"
    pool.complete_step(step)
    assert cache.evict(1) == 1


def test_a_reset_withdraws_everything(cache: PrefixCache, pool: BlockPool) -> None:
    ns = cache.namespace()
    held = cache.commit(range(4), pool.allocate(1), ns).blocks
    publish(cache, range(4, 8), ns)
    assert cache.reset() == 2
    assert cache.probe(range(4), ns) == 0
    assert (pool.num_used, pool.num_cached) == (1, 0)
    pool.release(held)
    assert pool.num_free == 15


def test_content_keys_tell_images_apart(cache: PrefixCache) -> None:
    ns = cache.namespace()
    tokens = [7] * 8
    publish(cache, tokens, ns, content_keys=[(2, 6, b"cat")])
    assert cache.probe(tokens, ns) == 0
    assert cache.probe(tokens, ns, content_keys=[(2, 6, b"dog")]) == 0
    assert cache.probe(tokens, ns, content_keys=[(3, 6, b"cat")]) == 0
    assert cache.probe(tokens, ns, content_keys=((2, 6, b"cat"),)) == 8
    assert cache.acquire(tokens, ns, content_keys=[(2, 3, b"cat")]).num_tokens == 0


def test_a_failed_commit_changes_nothing(cache: PrefixCache, pool: BlockPool) -> None:
    ns = cache.namespace()
    published = cache.commit(range(8), pool.allocate(2), ns).blocks
    own = pool.allocate(2)
    before = cache.stats(), pool.stats()
    failures = [
        (BlockError, (range(20, 28), [own[0], 15], ns)),
        (BlockError, (range(20, 28), [own[0], own[0]], ns)),
        (BlockError, (range(20, 28), [own[0], published[0]], ns)),
        (InvalidArgumentError, (range(20, 28), own[:1], ns)),
        (InvalidArgumentError, (range(3), own, ns)),
        (StaleHandleError, (range(20, 28), own, ns + 1)),
        (StaleHandleError, (range(20, 28), own, ns, 2**40)),
        (StepError, (range(20, 28), own, ns, None, 3)),
        (TokenOutOfRangeError, ([-1] * 8, own, ns)),
    ]
    for error, arguments in failures:
        with pytest.raises(error):
            cache.commit(*arguments)
        assert (cache.stats(), pool.stats()) == before
        cache.check()


def test_tokens_are_int32(cache: PrefixCache) -> None:
    ns = cache.namespace()
    for token in (-1, 2**31, 2**63, -(2**63), 2**70):
        with pytest.raises(TokenOutOfRangeError) as caught:
            cache.probe([5, token], ns)
        assert (caught.value.token, caught.value.position) == (token, 1)
    with pytest.raises(TokenOutOfRangeError) as caught:
        cache.probe(np.array([0, 0, -3]), ns)
    assert (caught.value.token, caught.value.position) == (-3, 2)


def test_a_pool_has_one_cache(pool: BlockPool, cache: PrefixCache) -> None:
    with pytest.raises(InvalidArgumentError, match="has a prefix cache already"):
        PrefixCache(pool)
    assert "num_nodes=0" in repr(cache)


def test_a_cache_keeps_its_pool_alive() -> None:
    cache = PrefixCache(BlockPool(8, block_size=2))
    gc.collect()
    ns = cache.namespace()
    publish_blocks = cache.pool.allocate(2)
    assert repr(cache.commit([1, 2, 3, 4], publish_blocks, ns)).startswith("Commit(num_blocks=2")
    assert repr(cache.acquire([1, 2], ns)).startswith("PrefixHit(num_tokens=2")

"""Random calls of levels 0 to 2 through Python against naive models, with every invariant checked after each call."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule
from pagedcore import BlockPool, KVCacheManager, PrefixCache
from pagedcore.errors import OutOfBlocksError, StaleHandleError

SIZE = 2
NUM_BLOCKS = 14
TENANTS = ("", "t")

Key = tuple[str, tuple[int, ...]]  # a tenant, and all tokens up to the end of the block

# Few different tokens, so that prompts share prefixes.
tokens_of_blocks = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(
    lambda bits: [b for bit in bits for b in (bit, 7)]
)


class PoolAndCache(RuleBasedStateMachine):
    """The model knows references, fences and the trie exactly; of evictions, only which are allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, SIZE)
        self.cache = PrefixCache(self.pool)
        self.namespaces = {tenant: self.cache.namespace(tenant) for tenant in TENANTS}
        self.refs: Counter[int] = Counter()
        self.fences: Counter[int] = Counter()
        self.trie: dict[Key, int] = {}
        self.newest = 0
        self.in_flight: set[int] = set()

    # The model ------------------------------------------------------------------------------------------------------

    @property
    def watermark(self) -> int:
        return min(self.in_flight, default=self.newest + 1) - 1

    @property
    def published(self) -> dict[int, Key]:
        return {block: key for key, block in self.trie.items()}

    def pending(self, block: int) -> bool:
        return self.fences[block] > self.watermark

    def states(self) -> Counter[str]:
        published = self.published
        counts: Counter[str] = Counter()
        for block in range(1, NUM_BLOCKS):
            if self.refs[block]:
                counts["used"] += 1
            elif block in published:
                counts["cached"] += 1
            else:
                counts["fenced" if self.pending(block) else "free"] += 1
        return counts

    def evictable(self) -> set[Key]:
        pinned = [key for key, block in self.trie.items() if self.refs[block] or self.pending(block)]
        return {key for key in self.trie if not any(p[0] == key[0] and p[1][: len(key[1])] == key[1] for p in pinned)}

    def forget(self, keys: set[Key]) -> None:
        """Takes evicted nodes out of the model, if they may be evicted."""
        assert keys <= self.evictable()
        for key in keys:
            del self.trie[key]
        for tenant, tokens in self.trie:
            assert len(tokens) == SIZE or (tenant, tokens[:-SIZE]) in self.trie, "a child without its parent"

    def drop(self, block: int, fence: int) -> None:
        assert self.refs[block] > 0
        self.refs[block] -= 1
        if fence > self.watermark:
            self.fences[block] = max(self.fences[block], fence)

    def hit(self, tenant: str, tokens: list[int]) -> list[int]:
        blocks = []
        for end in range(SIZE, len(tokens) + 1, SIZE):
            block = self.trie.get((tenant, tuple(tokens[:end])))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def held(self, data: st.DataObject, limit: int = 4) -> list[int]:
        """Some of the references that the caller holds, a block perhaps more than once."""
        everything = sorted(self.refs.elements())
        if not everything:
            return []
        places = data.draw(st.lists(st.integers(0, len(everything) - 1), max_size=limit, unique=True))
        return [everything[i] for i in places]

    # Level 0 --------------------------------------------------------------------------------------------------------

    @rule(n=st.integers(0, 7))
    def allocate(self, n: int) -> None:
        free, evictable = self.states()["free"], self.evictable()
        if n > free + len(evictable):
            with pytest.raises(OutOfBlocksError) as caught:
                self.pool.allocate(n)
            assert (caught.value.needed, caught.value.free) == (n, free + len(evictable))
            return
        blocks = self.pool.allocate(n).tolist()
        assert len(set(blocks)) == n
        assert not any(self.refs[block] or self.pending(block) for block in blocks)
        evicted = {self.published[block] for block in blocks if block in self.published}
        assert len(evicted) == max(0, n - free)
        self.forget(evicted)
        self.refs.update(blocks)

    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        blocks = self.held(data)
        self.pool.retain(np.array(blocks, np.int64))
        self.refs.update(blocks)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.held(data, limit=8)
        after = data.draw(st.none() | st.integers(0, self.newest))
        self.pool.release(blocks, after_step=after)
        for block in blocks:
            self.drop(block, self.newest if after is None else after)

    @rule(data=st.data())
    def release_too_much(self, data: st.DataObject) -> None:
        blocks = self.held(data)
        wrong = data.draw(st.sampled_from([0, NUM_BLOCKS, *(b for b in range(1, NUM_BLOCKS) if not self.refs[b])]))
        before = self.pool.stats()
        with pytest.raises(ValueError, match="block"):
            self.pool.release([*blocks, wrong])
        assert self.pool.stats() == before

    @precondition(lambda self: len(self.in_flight) < 4)
    @rule()
    def begin_step(self) -> None:
        self.newest += 1
        assert self.pool.begin_step() == self.newest
        self.in_flight.add(self.newest)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def complete_step(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.in_flight)))
        self.pool.complete_step(step)
        self.in_flight.remove(step)

    # Level 1 --------------------------------------------------------------------------------------------------------

    @rule(tenant=st.sampled_from(TENANTS), tokens=tokens_of_blocks, tail=st.integers(0, SIZE - 1), data=st.data())
    def commit(self, tenant: str, tokens: list[int], tail: int, data: st.DataObject) -> None:
        """Commits behind what is known already, with blocks of the caller's that the trie does not have."""
        known = self.hit(tenant, tokens)
        start = data.draw(st.integers(0, len(known)))
        own = [block for block in sorted(self.refs) if self.refs[block] and block not in self.published]
        needed = len(tokens) // SIZE - start
        if needed > len(own):
            return
        blocks = data.draw(st.permutations(own))[:needed]
        parent = None
        if start:
            parent = self.cache.acquire(tokens[: start * SIZE], self.namespaces[tenant])
            self.refs.update(parent.blocks.tolist())
        commit = self.cache.commit(
            tokens[start * SIZE :] + [9] * tail, blocks, self.namespaces[tenant], parent=parent and parent.node
        )
        expected = []
        for i, block in enumerate(blocks, start=start + 1):
            key = (tenant, tuple(tokens[: i * SIZE]))
            canonical = self.trie.setdefault(key, block)
            if canonical != block:
                self.refs[canonical] += 1
                self.drop(block, self.newest)
            expected.append(canonical)
        assert commit.blocks.tolist() == expected
        assert (commit.node is None) == (not tokens)

    @rule(tenant=st.sampled_from(TENANTS), tokens=tokens_of_blocks, limit=st.none() | st.integers(0, 9))
    def acquire(self, tenant: str, tokens: list[int], limit: int | None) -> None:
        expected = self.hit(tenant, tokens[:limit])
        assert self.cache.probe(tokens, self.namespaces[tenant], max_tokens=limit) == len(expected) * SIZE
        found = self.cache.acquire(tokens, self.namespaces[tenant], max_tokens=limit)
        assert found.blocks.tolist() == expected
        assert found.num_tokens == len(expected) * SIZE
        assert (found.node is None) == (not expected)
        self.refs.update(expected)

    @rule(n=st.integers(0, 5))
    def evict(self, n: int) -> None:
        evictable = self.evictable()
        assert self.cache.evict(n) == min(n, len(evictable))
        gone = {key for key in self.trie if self.cache.probe(list(key[1]), self.namespaces[key[0]]) < len(key[1])}
        assert len(gone) == min(n, len(evictable))
        self.forget(gone)

    @rule(tenant=st.sampled_from(TENANTS), everything=st.integers(0, 3))
    def purge(self, tenant: str, everything: int) -> None:
        keys = [key for key in self.trie if key[0] == tenant or not everything]
        if everything:
            old = self.namespaces[tenant]
            assert self.cache.drop_namespace(old, purge=True) == len(keys)
            with pytest.raises(StaleHandleError):
                self.cache.probe([1], old)
            self.namespaces[tenant] = self.cache.namespace(tenant)
        else:
            assert self.cache.reset() == len(keys)
        for key in keys:
            del self.trie[key]

    @invariant()
    def agrees(self) -> None:
        self.cache.check()
        pool, states = self.pool, self.states()
        counts = {"free": pool.num_free, "cached": pool.num_cached, "used": pool.num_used, "fenced": pool.num_fenced}
        assert counts == {name: states[name] for name in counts}
        assert [pool.ref_count(block) for block in range(NUM_BLOCKS)] == [self.refs[b] for b in range(NUM_BLOCKS)]
        for tenant, tokens in self.trie:
            assert self.cache.probe(list(tokens), self.namespaces[tenant]) == len(tokens)
        assert self.cache.stats()["num_evictable"] == len(self.evictable())


@dataclass
class Sequence:
    """What a sequence should be."""

    tokens: list[int]
    tenant: str
    computed: int
    written: int  # positions that hold their tag
    preempted: bool = False


@dataclass
class Read:
    """What a step that is in flight may read: slots, and what they held when it began."""

    slots: dict[int, int] = field(default_factory=dict)


class Manager(RuleBasedStateMachine):
    """A memory of tags: each computed position of each sequence holds the tag of its tokens up to there, always."""

    sequences: Bundle[int] = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.manager = KVCacheManager(16, SIZE, vocab_size=100)
        self.memory = np.zeros((16, SIZE), np.int64)
        self.model: dict[int, Sequence] = {}
        self.reads: dict[int, Read] = {}
        self.tables: dict[int, list[int]] = {}

    @staticmethod
    def tags(sequence: Sequence, start: int, stop: int) -> list[int]:
        return [hash((sequence.tenant, *sequence.tokens[: i + 1])) for i in range(start, stop)]

    def changed(self, seq: int, first: int) -> None:
        """A table kept on a device is patched from the entry that was named on."""
        table = self.manager.block_table(seq).tolist()
        kept = self.tables.get(seq, [])[:first]
        assert kept == table[: len(kept)]
        self.tables[seq] = kept + table[len(kept) :]
        assert first <= len(table)

    @rule(target=sequences, tokens=tokens_of_blocks, cut=st.integers(0, 1), tenant=st.sampled_from(TENANTS))
    def add(self, tokens: list[int], cut: int, tenant: str) -> int:
        tokens = tokens[: len(tokens) - cut]
        ns = self.manager.cache.namespace(tenant)
        hit = self.manager.cache.probe(tokens[:-1], ns)
        self.manager.cache.drop_namespace(ns)
        seq = self.manager.add(np.array(tokens, np.int32), tenant=tenant)
        assert self.manager.num_computed_tokens(seq) == hit
        assert seq not in self.model
        self.model[seq] = Sequence(tokens, tenant, hit, hit)
        self.tables[seq] = self.manager.block_table(seq).tolist()
        return seq

    @rule(seq=sequences, tokens=st.lists(st.integers(0, 3), max_size=4))
    def append(self, seq: int, tokens: list[int]) -> None:
        self.manager.append(seq, tokens)
        self.model[seq].tokens += tokens

    @rule(seq=sequences, n=st.integers(0, 9), lookahead=st.integers(0, 3))
    def allocate_and_write(self, seq: int, n: int, lookahead: int) -> None:
        sequence = self.model[seq]
        if sequence.preempted:
            with pytest.raises(ValueError, match="preempted"):
                self.manager.allocate_slots(seq, n, lookahead)
            return
        before = self.manager.stats()
        try:
            first = self.manager.allocate_slots(seq, n, num_lookahead_tokens=lookahead)
        except OutOfBlocksError:
            assert self.manager.stats() == before
            return
        self.changed(seq, first)
        assert self.manager.allocate_slots(seq, n, lookahead) == len(self.tables[seq]), "idempotent"
        self.memory[self.manager.take_blocks_to_zero()] = 0
        copies = self.manager.take_block_copies()
        assert not set(copies[:, 0].tolist()) & set(copies[:, 1].tolist())
        for src, dst in copies:
            self.memory[dst] = self.memory[src]
        stop = min(sequence.computed + n, len(sequence.tokens))
        slots = self.manager.slot_mapping(seq, sequence.computed, stop).tolist()
        for slot, tag in zip(slots, self.tags(sequence, sequence.computed, stop), strict=True):
            assert slot >= SIZE, "the null block is never written"
            self.memory.reshape(-1)[slot] = tag
        sequence.written = max(sequence.computed, stop)

    @rule(seq=sequences, keep=st.integers(0, 2))
    def commit(self, seq: int, keep: int) -> None:
        """What was written becomes computed, all of it or but for a few positions."""
        sequence = self.model[seq]
        if sequence.preempted:
            return
        computed = max(sequence.computed, sequence.written - keep)
        self.changed(seq, self.manager.commit(seq, computed))
        sequence.computed = computed

    @rule(seq=sequences, token=st.integers(0, 3))
    def decode(self, seq: int, token: int) -> None:
        """A token more and all of it computed, as a server does it: what most calls are about."""
        self.append(seq, [token])
        if self.model[seq].preempted:
            self.preempt_or_resume(seq)
        self.allocate_and_write(seq, len(self.model[seq].tokens) - self.model[seq].computed, 0)
        self.commit(seq, 0)

    @rule(target=sequences, seq=sequences, n=st.integers(1, 3), token=st.integers(0, 3))
    def fork(self, seq: int, n: int, token: int):
        children = self.manager.fork(seq, n)
        parent = self.model[seq]
        for child in children:
            self.model[child] = Sequence(
                list(parent.tokens), parent.tenant, parent.computed, parent.computed, parent.preempted
            )
            self.tables[child] = self.manager.block_table(child).tolist()
        self.decode(children[0], token)
        return multiple(*children)

    @rule(seq=sequences, data=st.data())
    def truncate(self, seq: int, data: st.DataObject) -> None:
        sequence = self.model[seq]
        length = data.draw(st.integers(1, len(sequence.tokens)))
        self.changed(seq, self.manager.truncate(seq, length))
        sequence.tokens = sequence.tokens[:length]
        sequence.computed = min(sequence.computed, length)
        # What was written beyond is to be written again; and what a step in flight reads there may be overwritten.
        sequence.written = sequence.computed
        for read in self.reads.values():
            read.slots.clear()

    @rule(seq=sequences)
    def preempt_or_resume(self, seq: int) -> None:
        sequence = self.model[seq]
        if sequence.preempted:
            sequence.computed = self.manager.resume(seq)
            sequence.preempted = False
            assert sequence.computed < len(sequence.tokens)
        else:
            self.manager.preempt(seq)
            sequence.preempted, sequence.computed = True, 0
        sequence.written = sequence.computed
        self.tables[seq] = self.manager.block_table(seq).tolist()

    @rule(seq=consumes(sequences))
    def free(self, seq: int) -> None:
        self.manager.free(seq)
        del self.model[seq], self.tables[seq]
        with pytest.raises(StaleHandleError):
            self.manager.num_tokens(seq)

    @precondition(lambda self: len(self.reads) < 3)
    @rule()
    def begin_step(self) -> None:
        step = self.manager.pool.begin_step()
        self.reads[step] = read = Read()
        for seq, sequence in self.model.items():
            slots = self.manager.slot_mapping(seq, 0, sequence.computed).tolist()
            read.slots.update(zip(slots, self.memory.reshape(-1)[slots].tolist(), strict=True))

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def complete_step(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.reads)))
        for slot, held in self.reads.pop(step).slots.items():
            assert self.memory.reshape(-1)[slot] == held, "a block was reused under a step that reads it"
        self.manager.pool.complete_step(step)

    @rule(n=st.integers(0, 12))
    def evict(self, n: int) -> None:
        if n == 12:
            self.manager.cache.reset()
        else:
            self.manager.cache.evict(n % 4)

    @invariant()
    def agrees(self) -> None:
        manager = self.manager
        manager.check()
        assert manager.stats()["num_sequences"] == len(self.model)
        for seq, sequence in self.model.items():
            assert manager.num_computed_tokens(seq) == sequence.computed
            assert manager.token_ids(seq).tolist() == sequence.tokens
            assert manager.is_preempted(seq) == sequence.preempted
            slots = manager.slot_mapping(seq, 0, sequence.computed)
            assert self.memory.reshape(-1)[slots].tolist() == self.tags(sequence, 0, sequence.computed)
            assert manager.block_table(seq).tolist() == self.tables[seq]

    def teardown(self) -> None:
        for seq in self.model:
            self.manager.free(seq)
        for step in self.reads:
            self.manager.pool.complete_step(step)
        self.manager.check()
        assert self.manager.pool.num_used == self.manager.pool.num_fenced == 0
        self.manager.cache.reset()
        assert self.manager.pool.num_free == 15


TestPoolAndCache = PoolAndCache.TestCase
TestPoolAndCache.settings = settings(max_examples=80, stateful_step_count=60)
TestManager = Manager.TestCase
TestManager.settings = settings(max_examples=80, stateful_step_count=60)

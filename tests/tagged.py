"""A model that is exact: each slot of its KV cache holds a tag, and the next token is a hash of all tags it reads.

A stale, foreign, uncomputed or wrongly copied slot changes the output, and no float noise hides it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pagedcore import StepPlan

POISON = -(2**40)  # what an unwritten slot holds
# A weight for each position, so that tokens in another order hash to something else.
WEIGHTS = np.random.default_rng(1).integers(1, 2**31, 1 << 13)


def tag(token: NDArray[np.integer] | int, position: NDArray[np.integer] | int) -> NDArray[np.int64]:
    """What is written for a token at a position."""
    return np.asarray(token, np.int64) * 65_537 + np.asarray(position, np.int64) * 31 + 7


def digest(tags: NDArray[np.int64], vocab_size: int) -> int:
    """The next token after these tags."""
    with np.errstate(over="ignore"):
        return int((tags * WEIGHTS[: len(tags)]).sum() % 1_000_003 % vocab_size)


def alone(
    prompt: Sequence[int], max_tokens: int, vocab_size: int, index: int = 0, stop: Sequence[int] = ()
) -> list[int]:
    """The output of a sequence that runs by itself, with no cache at all. Index > 0 differs in its first token."""
    tokens = list(prompt)
    for i in range(max_tokens):
        first = index if i == 0 else 0
        token = (digest(tag(np.array(tokens), np.arange(len(tokens))), vocab_size) + first) % vocab_size
        tokens.append(token)
        if token in stop:
            break
    return tokens[len(prompt) :]


class TaggedModel:
    """Runs plans over a cache of tags, and keeps a table of its own that only `table_updates` change."""

    def __init__(self, num_blocks: int, block_size: int, rows: int, width: int, vocab_size: int) -> None:
        self.slots = np.full((num_blocks, block_size), POISON, np.int64)
        self.table = np.zeros((rows, width), np.int64)
        self.vocab_size = vocab_size

    def run(self, plan: StepPlan) -> NDArray[np.int64]:
        """Zeroes, copies, writes and reads as the plan says; returns the digest for each sample."""
        block_size = self.slots.shape[1]
        self.slots[plan.blocks_to_zero] = POISON
        for src, dst in plan.block_copies:
            self.slots[dst] = self.slots[src]
        starts, positions, mapping = plan.query_start_loc, plan.positions, plan.slot_mapping
        assert len(set(mapping.tolist())) == plan.num_tokens, "a slot is written once in a step"
        assert (mapping >= block_size).all(), "the null block is never written"
        self.slots.reshape(-1)[mapping] = tag(plan.input_ids, positions)
        places = plan.table_updates[:, :2].tolist()
        assert len(set(map(tuple, places))) == len(places), "a device applies the changes in any order"
        for row, index, block in plan.table_updates:
            self.table[row, index] = block
        ends = {}
        for i in range(plan.num_seqs):
            seq_len = int(plan.seq_lens[i])
            assert positions[starts[i] : starts[i + 1]].tolist() == list(
                range(seq_len - starts[i + 1] + starts[i], seq_len)
            )
            blocks = -(-seq_len // block_size)
            assert self.table[plan.rows[i], :blocks].tolist() == plan.block_table[i, :blocks].tolist()
            ends[int(starts[i + 1]) - 1] = i
        samples = np.zeros(plan.num_samples, np.int64)
        for k, token in enumerate(plan.logits_indices):
            i = ends[int(token)]
            seq_len = int(plan.seq_lens[i])
            tags = self.slots[plan.block_table[i]].reshape(-1)[:seq_len]
            assert (tags != POISON).all(), "a slot is read that was not written"
            samples[k] = digest(tags, self.vocab_size)
        return samples

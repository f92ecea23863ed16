"""When a decode step reads the blocks that all of its sequences begin with once for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagedcore._core import StepPlan
    from pagedcore.layout import KVCacheLayout

#: Bytes of one layer's K and V that need not be read again, from which on the engine reads a prefix once. One pass for
#: all is arithmetic on every query row, and a merge, where a pass for each waits for memory, or for a processor's cache
#: that holds the prefix. Measured on one thread (AVX-512; 3 to 32 KV heads, float32 and bfloat16; the shapes of
#: `python -m pagedcore.bench cascade`): slower wherever it saved less than 22 MB, within 13 % either way or slower up to
#: 48 MB, as fast or faster from there on, and 1.2 to 6.8 times as fast where it saved 130 MB or more.
LEAST_SAVED_BYTES = 64_000_000


def shared_blocks(plan: StepPlan, layout: KVCacheLayout) -> int:
    """Blocks that all sequences of a decode step begin with, if it pays to read them once; else 0.

    Each sequence's query is behind them. O(sequences * blocks) where it pays, else O(sequences).
    """
    others = plan.num_seqs - 1
    if others < 1 or plan.num_tokens != plan.num_seqs:
        return 0
    least = -(-LEAST_SAVED_BYTES // (others * layout.layer_block_bytes))
    most = (int(plan.seq_lens.min()) - 1) // layout.block_size
    if most < least:
        return 0
    table = plan.block_table[:, :most]
    if (table[:, least - 1] != table[0, least - 1]).any():  # which tells as a rule
        return 0
    differs = (table != table[0]).any(axis=0)
    count = int(differs.argmax()) if differs.any() else most
    return count if count >= least else 0

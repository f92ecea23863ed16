"""When a decode step reads the blocks that all of its sequences begin with once for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagedcore._core import StepPlan
    from pagedcore.layout import KVCacheLayout

#: Bytes of one layer's K and V that need not be read again, from which on the engine reads a prefix once. One pass for
#: all is arithmetic on every query row, and a merge, where a pass for each waits for memory, or for a processor's cache
#: that holds the prefix. Processor time of one thread (AVX-512; the shapes of `python -m pagedcore.bench cascade` and
#: some more, float32 and bfloat16): 0.4 to 1.02 times as fast where less than 48 MB were saved, 1.03 to 6.8 times from
#: there on, and at least 1.2 times from 130 MB on.
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

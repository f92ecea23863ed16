"""One forward pass of a step plan: the plan's arrays in, the logits of the rows to sample out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pagedcore import ops
from pagedcore.attention import AttentionStep

if TYPE_CHECKING:
    from pagedcore._core import StepPlan
    from pagedcore.layout import KVCache
    from pagedcore.models import LoadedModel


class ModelRunner:
    """Runs a model over the pages of one KV cache."""

    def __init__(self, model: LoadedModel, kv: KVCache) -> None:
        self._module = model.module
        self._kv = kv
        self._layers = [kv.layer(layer.index) for layer in model.layers]

    def execute(self, plan: StepPlan) -> torch.Tensor:
        """Zeroes and copies the blocks that the plan says, computes its tokens, and returns the logits of its samples.

        Returns float [num_samples, vocab_size]: row k belongs to ``plan.logits_indices[k]``. The plan's arrays are
        read in place, so it must not be updated before this returns.
        """
        with torch.inference_mode():
            return self._execute(plan)

    def _execute(self, plan: StepPlan) -> torch.Tensor:
        if len(plan.blocks_to_zero):  # zero first, then copy, then write
            ops.zero_blocks(self._kv, torch.from_numpy(plan.blocks_to_zero))
        if len(plan.block_copies):
            ops.copy_blocks(self._kv, torch.from_numpy(plan.block_copies))
        step = AttentionStep(
            layers=self._layers,
            slot_mapping=torch.from_numpy(plan.slot_mapping),
            block_table=torch.from_numpy(plan.block_table),
            seq_lens=torch.from_numpy(plan.seq_lens),
            query_start_loc=torch.from_numpy(plan.query_start_loc),
            max_query_len=plan.max_query_len,
            max_seq_len=plan.max_seq_len,
        )
        result = self._module(
            input_ids=torch.from_numpy(plan.input_ids).unsqueeze(0),
            position_ids=torch.from_numpy(plan.positions).unsqueeze(0),
            use_cache=False,
            logits_to_keep=torch.from_numpy(plan.logits_indices),
            pagedcore_step=step,
        )
        return result.logits[0]

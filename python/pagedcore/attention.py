"""The attention of every layer, as transformers calls it: `AttentionInterface` name ``"pagedcore"``.

A model set to this name calls `paged_attention_forward` once per layer with the queries, keys and values of all tokens
of the step in one row of a batch of one (``[1, heads, tokens, head_dim]``; rotary embeddings and norms applied). What
the layer does not know, the step's pages, comes as the forward keyword ``pagedcore_step``, an `AttentionStep`.

The name is registered without a mask function, so transformers builds no mask: the kernels derive causality and the
window from the lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from pagedcore import ops
from pagedcore.errors import InvalidArgumentError, UnsupportedError

NAME = "pagedcore"


class LayerCache(NamedTuple):
    """The KV cache of one layer."""

    k_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, head_dim]
    v_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, v_head_dim]
    k_scale: torch.Tensor | None = None  # of a cache of codes: what they are multiplied by, as the ops have it
    v_scale: torch.Tensor | None = None


@dataclass
class AttentionStep:
    """Where the tokens of one step are written to, and what each of them may read. Shared by all layers."""

    layers: list[LayerCache]
    sinks: list[torch.Tensor | None]  # per layer: float32 [num_heads], as `LayerShape` has it
    slot_mapping: torch.Tensor  # int64 [num_tokens], block * block_size + offset
    block_table: torch.Tensor  # int32 [num_seqs, max_blocks]
    seq_lens: torch.Tensor  # int32 [num_seqs], tokens in the cache once this step's are written
    query_start_loc: torch.Tensor  # int32 [num_seqs + 1]
    max_query_len: int
    max_seq_len: int | None  # None: not known, as in a recorded step
    block_table_rows: torch.Tensor | None = None  # int32 [num_seqs]: the table's row of each sequence; None: row i
    workspace: torch.Tensor | None = None  # uint8, on a device: `ops.attention_workspace_size` bytes
    num_shared_blocks: int = 0  # that all sequences begin with and that are to be read once
    _plans: dict[tuple[int | None, ...], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def shared_blocks(self, window: int | None) -> int:
        """Blocks that layers with this window read once: none where it may hide a part of them."""
        hides = window is not None and (self.max_seq_len is None or window < self.max_seq_len)
        return 0 if hides else self.num_shared_blocks

    def plan(self, query: torch.Tensor, v_cache: torch.Tensor, window: int | None) -> torch.Tensor | None:
        """The work plan of layers with these heads and this window: made by the first of them, and shared by all that
        agree. None on the CPU, whose kernels plan by themselves.
        """
        if self.workspace is None:
            return None
        num_tokens, num_heads, head_dim = query.shape
        num_kv_heads, v_head_dim = v_cache.shape[1], v_cache.shape[3]
        key = (window, num_heads, num_kv_heads, head_dim, v_head_dim)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = ops.plan_attention(
                self.seq_lens,
                self.query_start_loc,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                v_head_dim=v_head_dim,
                num_tokens=num_tokens,
                max_query_len=self.max_query_len,
                window=window,
                dtype=query.dtype,
            )
        return plan


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer was seen to ask for."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None
    sinks: torch.Tensor | None = field(default=None, compare=False, repr=False)  # float32 [num_heads]


@dataclass
class AttentionProbe:
    """Passed as ``pagedcore_step`` it computes nothing and notes what every layer asks for."""

    layers: list[LayerShape] = field(default_factory=list)


def register() -> None:
    """Makes the name known to transformers. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged_attention_forward)


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,  # [num_heads]: attention sinks
    pagedcore_step: AttentionStep | AttentionProbe | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Writes this step's keys and values to their slots, then attends over the pages.

    Returns ``(out [1, num_tokens, num_heads, head_dim], None)``. Raises UnsupportedError for an option that changes the
    result and is not implemented (position biases).
    """
    if type(pagedcore_step) is AttentionStep:
        k_cache, v_cache, k_scale, v_scale = pagedcore_step.layers[module.layer_idx]
        ops.reshape_and_cache(
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            k_cache,
            v_cache,
            pagedcore_step.slot_mapping,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        queries = query[0].transpose(0, 1)
        shared = pagedcore_step.shared_blocks(sliding_window)
        if shared:
            attend = partial(ops.cascade_attention, num_shared_blocks=shared)
        else:
            plan = pagedcore_step.plan(queries, v_cache, sliding_window)
            attend = partial(ops.paged_attention, plan=plan, workspace=pagedcore_step.workspace)
        out = attend(
            queries,
            k_cache,
            v_cache,
            pagedcore_step.block_table,
            pagedcore_step.seq_lens,
            pagedcore_step.query_start_loc,
            scale=scaling,
            window=sliding_window,
            softcap=0.0 if softcap is None else softcap,
            sinks=pagedcore_step.sinks[module.layer_idx],
            k_scale=k_scale,
            v_scale=v_scale,
            max_query_len=pagedcore_step.max_query_len,
            max_seq_len=pagedcore_step.max_seq_len,
            block_table_rows=pagedcore_step.block_table_rows,
        )
        return out.unsqueeze(0), None
    if not isinstance(pagedcore_step, AttentionProbe):
        raise InvalidArgumentError(
            f'attention "{NAME}" was called without its step',
            hint="such a model runs inside pagedcore.Engine, or with pagedcore_step=AttentionStep(...)",
            argument="pagedcore_step",
            got=pagedcore_step,
        )
    _check_options(module, attention_mask, options)
    pagedcore_step.layers.append(
        LayerShape(
            module.layer_idx,
            query.shape[1],
            key.shape[1],
            key.shape[3],
            value.shape[3],
            sliding_window,
            None if s_aux is None else s_aux.float(),
        )
    )
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


#: Arguments that models pass to attention, that change its result, and that are not handed on to the kernels.
_REFUSED = {
    "position_bias": "position biases",
    "alibi": "ALiBi biases",
    "head_mask": "head masks",
}


def _check_options(module: torch.nn.Module, attention_mask: torch.Tensor | None, options: dict[str, Any]) -> None:
    """Raises UnsupportedError if a layer asks for what the kernels would silently leave out.

    Called while probing only: what a layer passes is fixed by the model's configuration, so one look is enough.
    """
    for name, what in _REFUSED.items():
        if options.get(name) is not None:
            raise UnsupportedError(
                f"{type(module).__name__} uses {what} ({name}), which paged attention does not take",
                hint="choose a model without it",
                argument=name,
            )
    if attention_mask is not None:
        raise UnsupportedError(
            f"{type(module).__name__} passes a mask of its own; paged attention is causal, with or without a window",
            argument="attention_mask",
        )
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedError(f"{type(module).__name__} is not causal", argument="is_causal")
    if options.get("dropout"):
        raise UnsupportedError("attention dropout is for training", hint="call model.eval()", argument="dropout")

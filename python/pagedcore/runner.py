"""One forward pass of a step plan: the plan's arrays in, the logits of the rows to sample out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch

from pagedcore import ops
from pagedcore.attention import AttentionStep, LayerCache
from pagedcore.errors import CorruptionError
from pagedcore.graphs import CudaRecorder, DecodeGraphs
from pagedcore.shared_prefix import shared_blocks
from pagedcore.staging import DeviceStaging, HostStaging

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pagedcore._core import SchedulerConfig, StepPlan
    from pagedcore.graphs import Recorder
    from pagedcore.layout import KVCache
    from pagedcore.models import LoadedModel
    from pagedcore.staging import Staged, StepTensors


class Runner(Protocol):
    """What computes an engine's steps."""

    def on_stream(self) -> AbstractContextManager[object]:
        """Where the device and the stream of the steps are torch's current ones: for `execute`, and for what is done
        with its results.
        """

    def execute(self, plan: StepPlan, numbers: NDArray[np.float64]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Zeroes and copies the blocks that the plan says, computes its tokens, and returns the logits of its samples,
        with the ``numbers`` that these are drawn by, which travel with the plan's arrays.

        Returns (float [num_samples, vocab_size]: row k belongs to ``plan.logits_indices[k]``; ``numbers`` beside the
        logits, or None if it is empty), both valid until the next call. The plan must not be updated before this
        returns.
        """

    def check(self) -> None:
        """Raises CorruptionError if a step since the last call had an index out of range. Call it once the step's
        tokens are there: on a device nobody could look at the indices before. A step without samples is not waited for,
        so what it met is told with a later one; and a device has one record for all engines on it.
        """


def make_runner(model: LoadedModel, kv: KVCache, config: SchedulerConfig, *, cuda_graphs: bool = True) -> Runner:
    """The runner for the model's device."""
    if model.device.type == "cpu":
        return HostRunner(model, kv)
    recorder = CudaRecorder(model.device) if cuda_graphs else None
    return DeviceRunner(model, kv, config, recorder)


class Forward:
    """A model over the pages of one KV cache."""

    def __init__(self, model: LoadedModel, kv: KVCache, workspace: torch.Tensor | None) -> None:
        self._module = model.module
        self._kv = kv
        self._layers = [LayerCache(*kv.layer(layer.index), *kv.scales(layer.index)) for layer in model.layers]
        self._sinks = [layer.sinks for layer in model.layers]
        self._workspace = workspace

    def prepare(self, staged: Staged) -> None:
        """What is done to the cache and the table before the pass: zero first, then copy, then write."""
        if staged.blocks_to_zero is not None:
            ops.zero_blocks(self._kv, staged.blocks_to_zero)
        if staged.block_copies is not None:
            ops.copy_blocks(self._kv, staged.block_copies)
        if staged.table_updates is not None:
            ops.update_block_table(staged.tensors.block_table, staged.table_updates)

    def run(
        self, tensors: StepTensors, max_query_len: int, max_seq_len: int | None, num_shared_blocks: int = 0
    ) -> torch.Tensor:
        """The pass itself: logits float [num_samples, vocab_size]."""
        step = AttentionStep(
            layers=self._layers,
            sinks=self._sinks,
            slot_mapping=tensors.slot_mapping,
            block_table=tensors.block_table,
            seq_lens=tensors.seq_lens,
            query_start_loc=tensors.query_start_loc,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            block_table_rows=tensors.rows,
            workspace=self._workspace,
            num_shared_blocks=num_shared_blocks,
        )
        result = self._module(
            input_ids=tensors.input_ids.unsqueeze(0),
            position_ids=tensors.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=tensors.logits_indices,
            pagedcore_step=step,
        )
        logits: torch.Tensor = result.logits[0]
        return logits


class HostRunner:
    """Runs a model on the CPU, over the plan's own arrays."""

    def __init__(self, model: LoadedModel, kv: KVCache) -> None:
        self._forward = Forward(model, kv, workspace=None)
        self._layout = kv.layout
        self._staging = HostStaging()

    def on_stream(self) -> AbstractContextManager[object]:
        """See `Runner`: the CPU has none."""
        return nullcontext()

    def execute(self, plan: StepPlan, numbers: NDArray[np.float64]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Runner`. The plan's arrays are read in place."""
        with torch.inference_mode():
            staged = self._staging.stage(plan, numbers)
            self._forward.prepare(staged)
            shared = shared_blocks(plan, self._layout)
            logits = self._forward.run(staged.tensors, plan.max_query_len, plan.max_seq_len, shared)
            return logits, staged.numbers

    def check(self) -> None:
        """See `Runner`: the CPU's kernels look before they read."""


class DeviceRunner:
    """Runs a model on a device: one copy to it a step, decode steps replayed where they can be recorded.

    Everything, block copies and table updates included, goes to the stream that was current where the runner was made,
    whichever is current where a step is run: steps follow each other there, and the memory of the weights and the cache
    belongs to it.
    """

    def __init__(self, model: LoadedModel, kv: KVCache, config: SchedulerConfig, recorder: Recorder | None) -> None:
        self._device = model.device
        self._stream = torch.cuda.current_stream(model.device) if model.device.type == "cuda" else None
        with self.on_stream(), torch.inference_mode():
            workspace = torch.empty(_workspace_size(model, config), dtype=torch.uint8, device=model.device)
            self._forward = Forward(model, kv, workspace)
            self._staging = DeviceStaging(
                model.device,
                max_num_tokens=config.max_num_batched_tokens,
                max_num_seqs=config.max_num_seqs,
                max_blocks=-(-config.max_model_len // config.block_size),
                steps_in_flight=config.max_steps_in_flight,
            )
            self._graphs: DecodeGraphs | None = None
            ops.warmup(model.device)
            if recorder is not None:
                self._graphs = DecodeGraphs(
                    self._staging, self._decode, recorder, min(config.max_num_seqs, config.max_num_batched_tokens)
                )

    def on_stream(self) -> AbstractContextManager[object]:
        """See `Runner`."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def execute(self, plan: StepPlan, numbers: NDArray[np.float64]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Runner`."""
        with torch.inference_mode():
            recording = self._graphs.recording_for(plan) if self._graphs else None
            if recording is None:
                staged = self._staging.stage(plan, numbers)
                self._forward.prepare(staged)
                return self._forward.run(staged.tensors, plan.max_query_len, plan.max_seq_len), staged.numbers
            staged = self._staging.stage_decode(plan, numbers, recording.batch)
            self._forward.prepare(staged)
            recording.replay()
            return recording.logits[: plan.num_seqs], staged.numbers

    def check(self) -> None:
        """See `Runner`."""
        if faults := ops.device_errors(self._device):
            raise CorruptionError(f"the kernels met {'; '.join(faults)}")

    def _decode(self, tensors: StepTensors) -> torch.Tensor:
        # The lengths of the steps to come are not known; nothing is chosen by them.
        return self._forward.run(tensors, 1, None)


def _workspace_size(model: LoadedModel, config: SchedulerConfig) -> int:
    """Bytes for every step's attention; all layers have one shape."""
    shape = model.layers[0]
    return ops.attention_workspace_size(
        config.max_num_batched_tokens,
        config.max_num_seqs,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        v_head_dim=shape.v_head_dim,
        dtype=model.dtype,
        device=model.device,
    )

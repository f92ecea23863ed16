"""A step's arrays where the model reads them: in place on the CPU, on a device by one copy a step.

A plan's arrays are ranges of one buffer on the host. The CPU reads them there. A device gets them, and the numbers
that its samples are drawn by, packed into pinned memory, with one asynchronous copy, and into the same device memory at
every step, so that a recorded decode step (`graphs`) finds its arguments where they were when it was recorded. The
block table is not sent: it lives on the device, a row for each running sequence, and takes what changed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pagedcore.draws import NUM_NUMBERS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedcore._core import StepPlan

_ALIGNMENT = 16  # bytes: every array begins on one

#: (source, destination) pairs, and blocks to zero, that travel with the other arrays. A step of a scheduler by itself
#: has at most one pair a sequence; what is more, from sequences of other owners, is sent by a copy of its own, for
#: which the host waits.
_PAIRS_PER_SEQUENCE = 2

_NUMPY_DTYPES: dict[torch.dtype, type] = {torch.int32: np.int32, torch.int64: np.int64, torch.float64: np.float64}


@dataclass(frozen=True, eq=False)
class StepTensors:
    """The arrays that a forward pass reads, on the model's device. T tokens, S sequences, K samples."""

    input_ids: torch.Tensor  # int32 [T]
    positions: torch.Tensor  # int32 [T]
    slot_mapping: torch.Tensor  # int64 [T]
    query_start_loc: torch.Tensor  # int32 [S + 1]
    seq_lens: torch.Tensor  # int32 [S]
    logits_indices: torch.Tensor  # int32 [K]
    block_table: torch.Tensor  # int32 [S, width], or [max_num_seqs, width] with rows
    rows: torch.Tensor | None  # int32 [S]: the table's row of each sequence; None: row i for sequence i


@dataclass(frozen=True, eq=False)
class Staged:
    """A step on the device: what is done before the forward pass, in this order, and what the pass reads."""

    blocks_to_zero: torch.Tensor | None  # int32 [z]; None: nothing to do
    block_copies: torch.Tensor | None  # int32 [n, 2]
    table_updates: torch.Tensor | None  # int32 [m, 3], of `StepTensors.block_table`
    tensors: StepTensors
    numbers: torch.Tensor | None  # float64 [.., M]: `Draws.numbers`; None: every sample is greedy


class HostStaging:
    """For models on the CPU: the plan's own arrays, read in place until the plan is updated or cancelled."""

    def stage(self, plan: StepPlan, numbers: NDArray[np.float64]) -> Staged:
        """O(1): nothing is copied."""
        return Staged(
            blocks_to_zero=torch.from_numpy(plan.blocks_to_zero) if len(plan.blocks_to_zero) else None,
            block_copies=torch.from_numpy(plan.block_copies) if len(plan.block_copies) else None,
            table_updates=None,
            tensors=StepTensors(
                input_ids=torch.from_numpy(plan.input_ids),
                positions=torch.from_numpy(plan.positions),
                slot_mapping=torch.from_numpy(plan.slot_mapping),
                query_start_loc=torch.from_numpy(plan.query_start_loc),
                seq_lens=torch.from_numpy(plan.seq_lens),
                logits_indices=torch.from_numpy(plan.logits_indices),
                block_table=torch.from_numpy(plan.block_table),
                rows=None,
            ),
            numbers=torch.from_numpy(numbers) if numbers.size else None,
        )


@dataclass(frozen=True)
class _Place:
    """Where an array lies in the packed bytes."""

    name: str
    dtype: torch.dtype
    begin: int
    count: int

    @property
    def end(self) -> int:
        return self.begin + self.count * int(self.dtype.itemsize)

    def tensor(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[self.begin : self.end].view(self.dtype)


@functools.lru_cache(maxsize=256)  # decode steps come in few sizes
def _places(num_tokens: int, num_seqs: int, num_samples: int) -> tuple[_Place, ...]:
    """The arrays of a forward pass, one after another. The same sizes always give the same places."""
    sizes = {
        "slot_mapping": (torch.int64, num_tokens),
        "input_ids": (torch.int32, num_tokens),
        "positions": (torch.int32, num_tokens),
        "query_start_loc": (torch.int32, num_seqs + 1),
        "seq_lens": (torch.int32, num_seqs),
        "rows": (torch.int32, num_seqs),
        "logits_indices": (torch.int32, num_samples),
    }
    places: list[_Place] = []
    for name, (dtype, count) in sizes.items():
        places.append(_Place(name, dtype, _aligned(places[-1].end) if places else 0, count))
    return tuple(places)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class DeviceStaging:
    """For models on a device: pinned host memory for each step in flight and one more, and device memory that is
    written by one copy on the current stream.

    A part of the ring is filled again only after an event says that the copy out of it is over. The device memory needs
    no such care: who reads it comes earlier on the same stream.

    Args:
        device: Where the model is. A CPU device works, with no pinning: so it is tested.
        max_num_tokens: Tokens of a step.
        max_num_seqs: Rows of the block table.
        max_blocks: Blocks of a sequence, the table's columns.
        steps_in_flight: Steps whose copies may be under way when the next is staged.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        max_num_tokens: int,
        max_num_seqs: int,
        max_blocks: int,
        steps_in_flight: int = 1,
    ) -> None:
        self._table = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        # Beside the pass's arrays: table updates of some newcomers with a whole row each and of one block a sequence
        # (the scheduler plans no more), and the copies and blocks to zero of an ordinary step: no more than are new.
        extras = 3 * (4 * max_blocks + max_num_tokens + 2 * max_num_seqs) + 3 * _PAIRS_PER_SEQUENCE * max_num_seqs
        extras += max_num_tokens
        numbers = 8 * NUM_NUMBERS * max_num_seqs
        pass_end = _places(max_num_tokens, max_num_seqs, max_num_seqs)[-1].end
        size = pass_end + numbers + 4 * extras + 5 * _ALIGNMENT
        self._device = device
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._ring = [_Slot(size, device) for _ in range(steps_in_flight + 1)]
        self._next = 0
        self._decode: dict[int, StepTensors] = {}  # by number of sequences: always at one place, so made once

    def stage(self, plan: StepPlan, numbers: NDArray[np.float64]) -> Staged:
        """Sends a plan's arrays and ``numbers``, which its samples are drawn by, any shape. O(their bytes) on the host,
        no waiting for the device but for the ring.
        """
        slot, places = self._pack(plan, plan.num_tokens, plan.num_seqs, len(plan.logits_indices))
        return self._send(slot, places, plan, numbers, self._tensors(places))

    def stage_decode(self, plan: StepPlan, numbers: NDArray[np.float64], batch: int) -> Staged:
        """`stage` for a plan of one token and one sample a sequence, filled up to ``batch`` sequences by empty ones:
        one query token, seq_len 0, slot −1. The tensors are those of `decode_tensors`, which comes first.
        """
        slot, places = self._pack(plan, batch, batch, batch)
        used = plan.num_seqs
        at = {place.name: slot.array(place) for place in places}
        at["slot_mapping"][used:] = -1
        for name in ("input_ids", "positions", "seq_lens", "rows"):
            at[name][used:] = 0
        at["query_start_loc"][used:] = np.arange(used, batch + 1)
        at["logits_indices"][used:] = np.arange(used, batch)
        return self._send(slot, places, plan, numbers, self._decode[batch])

    def decode_tensors(self, batch: int) -> StepTensors:
        """Where `stage_decode` puts a step of ``batch`` sequences. Until then they are all empty ones, so that a pass
        over them does nothing: for recording.
        """
        places = _places(batch, batch, batch)
        tensors = self._decode[batch] = self._tensors(places)
        self._memory[: places[-1].end].zero_()  # rows, lengths, ids and positions
        tensors.slot_mapping.fill_(-1)
        tensors.query_start_loc.copy_(torch.arange(batch + 1))
        tensors.logits_indices.copy_(torch.arange(batch))
        return tensors

    def _pack(
        self, plan: StepPlan, num_tokens: int, num_seqs: int, num_samples: int
    ) -> tuple[_Slot, tuple[_Place, ...]]:
        """The plan's arrays in the next part of the ring, in places for as many tokens, sequences and samples."""
        slot = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        slot.wait()
        places = _places(num_tokens, num_seqs, num_samples)
        for place in places:
            array = getattr(plan, place.name)
            slot.array(place)[: len(array)] = array
        return slot, places

    def _send(
        self,
        slot: _Slot,
        places: tuple[_Place, ...],
        plan: StepPlan,
        numbers: NDArray[np.float64],
        tensors: StepTensors,
    ) -> Staged:
        """Adds what is done before and after the pass, and copies all of it at once."""
        end = places[-1].end
        extras: list[torch.Tensor | None] = []
        # The numbers first: for them there is always room.
        for array in (numbers, plan.blocks_to_zero, plan.block_copies, plan.table_updates):
            dtype = torch.float64 if array is numbers else torch.int32
            place = _Place("", dtype, _aligned(end), array.size)
            if not array.size:
                extras.append(None)
            elif place.end > len(self._memory):
                extras.append(torch.from_numpy(array).to(self._device))
            else:
                slot.array(place)[:] = array.reshape(-1)
                extras.append(place.tensor(self._memory).view(array.shape))
                end = place.end
        slot.copy_to(self._memory, end)
        there, zero, copies, updates = extras
        return Staged(zero, copies, updates, tensors, there)

    def _tensors(self, places: tuple[_Place, ...]) -> StepTensors:
        at = {place.name: place.tensor(self._memory) for place in places}
        return StepTensors(**at, block_table=self._table)


class _Slot:
    """Host memory of one step, and the event after its copy."""

    def __init__(self, size: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
        self._host: NDArray[np.uint8] = self._bytes.numpy()
        self._copied: Any = torch.cuda.Event() if cuda else None

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def array(self, place: _Place) -> NDArray[Any]:
        return self._host[place.begin : place.end].view(_NUMPY_DTYPES[place.dtype])

    def copy_to(self, memory: torch.Tensor, size: int) -> None:
        memory[:size].copy_(self._bytes[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

"""The ops that move the cache's bytes on a GPU, beside what torch's indexing takes for the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pagedcore import ops
from pagedcore.bench.batch import fill, relative_error
from pagedcore.bench.cases import BLOCK_SIZE, LLAMA_8B
from pagedcore.bench.measure import Bench, Contender
from pagedcore.bench.peers import CannotRun
from pagedcore.layout import KVCacheLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = Callable[[int], Any]

_LAYERS = 32  # of a model of 8 billion parameters
_HEADS = LLAMA_8B
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Op:
    """One op as ours does it and as torch's indexing does, on one of some buffers. ``written`` is what both write to,
    after ``poison`` overwrote what they write there for buffer 0; ``bytes`` what one call moves.
    """

    name: str
    ours: Call
    indexing: Call
    written: torch.Tensor
    poison: Callable[[], Any]
    bytes: int
    buffers: int
    error: float = 0.0  # that is allowed between the two


def run(bench: Bench, token_counts: tuple[int, ...]) -> None:
    """Every op at every size."""
    device, l2 = bench.machine.device, bench.machine.l2
    for tokens in token_counts:
        for op in [*block_ops(tokens, device, l2), merge_op(tokens, device, l2)]:
            bench.compare(f"{op.name} {tokens} tokens", contenders(op), "us", {"pagedcore": ["torch"]})


def contenders(op: Op) -> dict[str, Contender]:
    """Ours and torch's: each is timed if it writes what torch's writes."""

    def prepare(which: Call) -> Call:
        found = []
        for call in (op.indexing, which):
            op.poison()
            call(0)
            found.append(op.written.clone())
        want, got = found
        if not (torch.equal(got, want) if op.error == 0 else relative_error(got, want) < op.error):
            raise CannotRun("does not write what torch's indexing writes")
        return which

    return {
        "pagedcore": Contender(lambda: prepare(op.ours), op.bytes, op.buffers, own=True),
        "torch": Contender(lambda: prepare(op.indexing), op.bytes, op.buffers),
    }


def block_ops(tokens: int, device: torch.device, l2: int) -> list[Op]:
    """Writing so many tokens to one layer; moving as many blocks of all layers as they fill. In random places."""
    count = -(-tokens // BLOCK_SIZE)
    block_bytes = KVCacheLayout(1, BLOCK_SIZE, _LAYERS, _HEADS.kv, _HEADS.dim, "bfloat16").block_bytes
    moved, row = count * block_bytes, _HEADS.kv * _HEADS.dim * _DTYPE.itemsize
    turns = _turns(2 * moved, l2)
    layout = KVCacheLayout(2 * count * turns, BLOCK_SIZE, _LAYERS, _HEADS.kv, _HEADS.dim, "bfloat16")
    kv = layout.allocate(str(device), library="torch")
    fill(kv)
    data, (k_cache, v_cache) = kv.data, kv.layer(0)
    source, target = torch.randperm(layout.num_blocks, device=device).view(2, turns, count)
    pairs, ids = torch.stack([source, target], -1).int(), target.int()
    staging = torch.empty(count, block_bytes, dtype=torch.uint8, device=device)

    writes = _turns(4 * tokens * row, l2)
    key, value = torch.randn(2, writes, tokens, _HEADS.kv, _HEADS.dim, device=device).to(_DTYPE)
    places = layout.num_blocks * BLOCK_SIZE
    slots = torch.stack([torch.randperm(places, device=device)[:tokens] for _ in range(writes)])

    def write(i: int) -> None:
        blocks, offsets = slots[i] // BLOCK_SIZE, slots[i] % BLOCK_SIZE
        k_cache[blocks, :, offsets] = key[i]
        v_cache[blocks, :, offsets] = value[i]

    def write_ours(i: int) -> None:
        ops.reshape_and_cache(key[i], value[i], k_cache, v_cache, slots[i])

    def forget() -> None:
        data.index_fill_(0, target[0], 1)

    return [
        Op("reshape_and_cache", write_ours, write, data, lambda: data.fill_(1), tokens * (4 * row + 8), writes),
        Op(
            "gather_blocks",
            lambda i: ops.gather_blocks(kv, ids[i], staging),
            lambda i: torch.index_select(data, 0, target[i], out=staging),
            staging,
            lambda: staging.fill_(1),
            2 * moved,
            turns,
        ),
        Op(
            "scatter_blocks",
            lambda i: ops.scatter_blocks(kv, ids[i], staging),
            lambda i: data.index_copy_(0, target[i], staging),
            data,
            forget,
            2 * moved,
            turns,
        ),
        Op(
            "copy_blocks",
            lambda i: ops.copy_blocks(kv, pairs[i]),
            lambda i: data.index_copy_(0, target[i], data[source[i]]),
            data,
            forget,
            2 * moved,
            turns,
        ),
        Op(
            "zero_blocks",
            lambda i: ops.zero_blocks(kv, ids[i]),
            lambda i: data.index_fill_(0, target[i], 0),
            data,
            forget,
            moved,
            turns,
        ),
    ]


def merge_op(tokens: int, device: torch.device, l2: int) -> Op:
    """Two partial outputs as one."""
    size = 3 * tokens * _HEADS.query * (_HEADS.dim * _DTYPE.itemsize + 4)
    turns = _turns(size, l2)
    shape = (turns, tokens, _HEADS.query)
    o_a, o_b = torch.randn(2, *shape, _HEADS.dim, device=device).to(_DTYPE)
    lse_a, lse_b = torch.randn(2, *shape, device=device)
    out, lse = torch.empty_like(o_a), torch.empty_like(lse_a)

    def merge(i: int) -> None:
        share = torch.sigmoid(lse_a[i] - lse_b[i])[..., None]
        out[i] = share * o_a[i] + (1 - share) * o_b[i]
        torch.logaddexp(lse_a[i], lse_b[i], out=lse[i])

    def merge_ours(i: int) -> None:
        ops.merge_states(o_a[i], lse_a[i], o_b[i], lse_b[i], out=out[i], lse=lse[i])

    return Op("merge_states", merge_ours, merge, out[0], lambda: out.fill_(1), size, turns, error=1e-2)


def _turns(num_bytes: int, l2: int) -> int:
    """Buffers to be used in turn so that none is found in the cache."""
    return max(1, -(-2 * l2 // num_bytes))

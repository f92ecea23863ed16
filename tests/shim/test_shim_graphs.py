"""Every op as part of a recorded step, which is run with other contents of the same memory: what a CUDA graph does. The
results are those of the op by itself, to the bit, and nothing is allocated. On a GPU these are CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from codes import Quantized
from pagedcore import ops
from reference import Batch, make_batch

if TYPE_CHECKING:
    from gpus import ShimGpu

Contents = Callable[[int], dict[str, torch.Tensor]]

# By name: contents of a call's memory, as a seed says; what the call does with it; what then holds its results.
CALLS: dict[str, tuple[Contents, Callable[[Any], None], tuple[str, ...]]] = {}
NAN = float("nan")


def call(name: str, contents: Contents, *results: str) -> Any:
    """Adds a function of a namespace of tensors to `CALLS`."""

    def add(function: Callable[[Any], None]) -> Callable[[Any], None]:
        CALLS[name] = (contents, function, results)
        return function

    return add


def normal(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(torch.bfloat16)


def indices(seed: int, count: int, below: int) -> torch.Tensor:
    return torch.randperm(below, generator=torch.Generator().manual_seed(seed))[:count].int()


# --------------------------------------------------------------------------------------------------------- cache ops


def rows_to_write(seed: int) -> dict[str, torch.Tensor]:
    randn = normal(seed)
    slots = indices(seed, 5, 24).long()
    slots[seed] = -1
    caches = {"k_cache": randn(6, 2, 4, 64), "v_cache": randn(6, 2, 4, 24)}
    return {"key": randn(5, 2, 64), "value": randn(5, 2, 24), "slots": slots, **caches}


def rows_to_quantise(scales: Callable[[], torch.Tensor]) -> Callable[[int], dict[str, torch.Tensor]]:
    def contents(seed: int) -> dict[str, torch.Tensor]:
        rows = rows_to_write(seed)
        codes = {name: torch.full(rows[name].shape, 0x55, dtype=torch.uint8) for name in ("k_cache", "v_cache")}
        return rows | codes | {"k_scale": scales(), "v_scale": scales() / (seed + 1)}

    return contents


@call("reshape_and_cache", rows_to_write, "k_cache", "v_cache")
def _(memory: Any) -> None:
    ops.reshape_and_cache(memory.key, memory.value, memory.k_cache, memory.v_cache, memory.slots)


PER_TOKEN, PER_HEAD = (lambda: torch.full((6, 2, 4), NAN)), (lambda: torch.tensor([0.01, 0.02]))


@call("codes, scales made", rows_to_quantise(PER_TOKEN), "k_cache", "v_cache", "k_scale", "v_scale")
@call("codes, scales given", rows_to_quantise(PER_HEAD), "k_cache", "v_cache")
def _(memory: Any) -> None:
    caches, scales = (memory.k_cache, memory.v_cache), {"k_scale": memory.k_scale, "v_scale": memory.v_scale}
    ops.reshape_and_cache(memory.key, memory.value, *caches, memory.slots, **scales)


def blocks_to_move(seed: int) -> dict[str, torch.Tensor]:
    cache, ids = normal(seed)(8, 2, 4, 24), indices(seed, 4, 8)
    return {"cache": cache, "ids": ids[:2], "pairs": ids.view(2, 2), "staging": normal(seed + 2)(2, 2, 4, 24)}


@call("copy_blocks", blocks_to_move, "cache")
def _(memory: Any) -> None:
    ops.copy_blocks(memory.cache, memory.pairs)


@call("zero_blocks", blocks_to_move, "cache")
def _(memory: Any) -> None:
    ops.zero_blocks(memory.cache, memory.ids)


@call("gather_blocks", blocks_to_move, "staging")
def _(memory: Any) -> None:
    ops.gather_blocks(memory.cache, memory.ids, memory.staging)


@call("scatter_blocks", blocks_to_move, "cache")
def _(memory: Any) -> None:
    ops.scatter_blocks(memory.cache, memory.ids, memory.staging)


def changes_of_a_table(seed: int) -> dict[str, torch.Tensor]:
    places = indices(seed, 4, 12)
    updates = torch.stack([places // 4, places % 4, 100 + places], dim=1).int()
    return {"table": torch.zeros(3, 4, dtype=torch.int32), "updates": updates}


@call("update_block_table", changes_of_a_table, "table")
def _(memory: Any) -> None:
    ops.update_block_table(memory.table, memory.updates)


# --------------------------------------------------------------------------------------------------------- attention


def states(seed: int) -> dict[str, torch.Tensor]:
    randn = normal(seed)
    contents = {f"o_{name}": randn(5, 3, 40) for name in "ab"} | {f"lse_{name}": randn(5, 3).float() for name in "ab"}
    contents["lse_a"][seed] = -float("inf")
    return contents | {
        "sinks": randn(3).float(),
        "out": torch.full((5, 3, 40), NAN).bfloat16(),
        "lse": randn(5, 3).float(),
    }


@call("merge_states", states, "out", "lse")
def _(memory: Any) -> None:
    states = (memory.o_a, memory.lse_a, memory.o_b, memory.lse_b, memory.sinks)
    ops.merge_states(*states, out=memory.out, lse=memory.lse)


QUERIES = [1, 20, 1]


def mixed_batch(seed: int) -> Batch:
    """One sequence with a prompt among two that decode; lengths of as many blocks each, whatever the seed."""
    return make_batch([[70, 40, 5], [80, 33, 9]][seed], QUERIES, dtype=torch.bfloat16, seed=seed)


def of_batch(batch: Batch) -> dict[str, torch.Tensor]:
    """With room for what attention needs, on a GPU of whatever size, and gives."""
    names = ("query", "k_cache", "v_cache", "table", "seq_lens", "starts")
    num_tokens, num_heads, head_dim = batch.query.shape
    sizes = (num_tokens, len(batch.seq_lens), num_heads, batch.k_cache.shape[1], head_dim)
    plan, workspace = (
        max(size(*sizes, split_size=split_size) for split_size in (None, 64))
        for size in (ops.attention_plan_size, ops.attention_workspace_size)
    )
    return {
        **dict(zip(names, batch.args, strict=True)),
        "out": torch.full(batch.query.shape, NAN, dtype=torch.bfloat16),
        "lse": torch.full(batch.query.shape[:2], NAN),
        "plan": torch.full((plan,), 0xFF, dtype=torch.uint8),
        "workspace": torch.full((workspace,), 0xFF, dtype=torch.uint8),
    }


def mixed(seed: int) -> dict[str, torch.Tensor]:
    return of_batch(mixed_batch(seed))


def decoding(seed: int) -> dict[str, torch.Tensor]:
    """With padding, and many pieces to merge."""
    return of_batch(make_batch([[600, 0, 17], [599, 0, 30]][seed], [1, 1, 1], dtype=torch.bfloat16, seed=seed))


def mixed_codes(seed: int) -> dict[str, torch.Tensor]:
    quantized = Quantized(mixed_batch(seed), "token")
    k_scale, v_scale = quantized.scales
    return of_batch(quantized.of_codes) | {"k_scale": k_scale, "v_scale": v_scale}


def attend(memory: Any, **options: Any) -> None:
    tensors = (memory.query, memory.k_cache, memory.v_cache, memory.table, memory.seq_lens, memory.starts)
    ops.paged_attention(*tensors, out=memory.out, lse=memory.lse, workspace=memory.workspace, **options)


@call("split_size", decoding, "out", "lse")
def _(memory: Any) -> None:
    attend(memory, max_query_len=1, split_size=64)


@call("codes", mixed_codes, "out", "lse")
def _(memory: Any) -> None:
    attend(memory, max_query_len=20, k_scale=memory.k_scale, v_scale=memory.v_scale)


@call("two layers and a plan", mixed, "out", "lse")
def _(memory: Any) -> None:
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "num_tokens": 22, "max_query_len": 20}
    ops.plan_attention(memory.seq_lens, memory.starts, out=memory.plan, **sizes)
    for _ in range(2):
        attend(memory, max_query_len=20, plan=memory.plan)


def step_to_take(seed: int) -> dict[str, torch.Tensor]:
    """A step's queries, whose keys are still to be written, in blocks that are not in the table yet."""
    batch = mixed_batch(seed)
    rows, columns = (batch.block_table >= 0).nonzero(as_tuple=True)
    updates = torch.stack([rows, columns, batch.block_table[rows, columns]], dim=1).int()
    slots = []
    for row, length, count in zip(batch.block_table, batch.seq_lens.tolist(), QUERIES, strict=True):
        slots += [int(row[position // 16]) * 16 + position % 16 for position in range(length - count, length)]
    randn = normal(seed)
    changes = {"updates": updates, "slots": torch.tensor(slots), "key": randn(22, 2, 64), "value": randn(22, 2, 64)}
    return of_batch(batch) | changes | {"table": torch.full_like(batch.block_table, -1)}


@call("a mixed step", step_to_take, "out", "lse", "table", "k_cache")
def _(memory: Any) -> None:
    ops.update_block_table(memory.table, memory.updates)
    ops.reshape_and_cache(memory.key, memory.value, memory.k_cache, memory.v_cache, memory.slots)
    attend(memory, max_query_len=20)


@pytest.mark.parametrize("name", list(CALLS))
def test_recorded(gpu: ShimGpu, name: str) -> None:
    contents, function, results = CALLS[name]

    def memory_of(seed: int) -> SimpleNamespace:
        return SimpleNamespace(**{name: gpu.upload(tensor) for name, tensor in contents(seed).items()})

    alone = [memory_of(seed) for seed in (0, 1)]
    for memory in alone:
        function(memory)
    wanted = [[gpu.download(getattr(memory, result)).clone() for result in results] for memory in alone]
    assert not any(same(*pair) for pair in zip(*wanted, strict=True))  # else there is nothing to see

    memory = memory_of(0)
    ops.warmup("cuda")
    before = gpu.allocations()
    replay = gpu.record(lambda: function(memory))
    assert gpu.allocations() == before
    for seed in (1, 0, 1):
        for tensor, value in contents(seed).items():
            gpu.write(getattr(memory, tensor), value)
        replay()
        for result, want in zip(results, wanted[seed], strict=True):
            assert same(gpu.download(getattr(memory, result)), want), (seed, result)
    assert ops.device_errors(0) == []


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(7), other.nan_to_num(7))

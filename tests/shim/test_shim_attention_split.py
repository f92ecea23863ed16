"""How items are cut, on the GPU's kernels: with `split_size` 0 or n a sequence's result depends on itself alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from device import Attention, Device, attend, check_tiled
from reference import make_batch

if TYPE_CHECKING:
    from reference import Batch


def of_sequence(batch: Batch, seq: int) -> Batch:
    """A batch of this one sequence, over the same pages and a table that is wider."""
    start, stop = (int(i) for i in batch.query_start_loc[seq : seq + 2])
    wider = torch.full((1, batch.block_table.shape[1] + 7), -1, dtype=torch.int32)
    wider[0, : batch.block_table.shape[1]] = batch.block_table[seq]
    return type(batch)(
        batch.query[start:stop],
        batch.k_cache,
        batch.v_cache,
        wider,
        batch.seq_lens[seq : seq + 1].clone(),
        torch.tensor([0, stop - start], dtype=torch.int32),
    )


# Lengths, query lengths, and heads: with 17 to a KV head tiles of 128 are taken, also by some sequences alone.
BATCHES = {
    "decode": ([300, 3, 0, 200], [1, 2, 1, 1], (4, 2)),
    "mixed": ([200, 150, 9], [1, 20, 1], (4, 2)),
    "prompts": ([130, 200], [70, 70], (4, 2)),
    "prompts of many heads": ([130, 200], [20, 20], (17, 1)),
    "many heads": ([200, 150, 9], [1, 20, 1], (17, 1)),
}


@pytest.mark.parametrize("split_size", [0, 64, 100, 1000])
@pytest.mark.parametrize("batch", list(BATCHES))
@pytest.mark.parametrize("window", [None, 90])
def test_a_sequence_is_the_same_in_any_company(
    plain_shim: Any, split_size: int, batch: str, window: int | None
) -> None:
    """And on any number of multiprocessors, by whichever kernel the batch takes: bit for bit."""
    lengths, queries, heads = BATCHES[batch]
    everybody = make_batch(lengths, queries, dtype=torch.bfloat16, heads=heads, window=window)
    options: dict[str, Any] = {"window": window}
    out, lse = attend(plain_shim, everybody, "tiled", grid=5, split_size=split_size, **options)
    check_tiled(everybody, out, lse, **options)
    for seq in range(len(everybody.seq_lens)):
        start, stop = (int(i) for i in everybody.query_start_loc[seq : seq + 2])
        alone = of_sequence(everybody, seq)
        for grid in (1, 13):
            one, one_lse = attend(plain_shim, alone, "tiled", grid=grid, split_size=split_size, **options)
            assert torch.equal(one, out[start:stop])
            assert torch.equal(one_lse, lse[start:stop])


@pytest.mark.parametrize("split_size", [0, 128])
def test_a_sequence_that_decodes_is_the_same_beside_prompts(plain_shim: Any, split_size: int) -> None:
    """They have so many rows on the average that tiles of 128 would be taken for all."""
    batch = make_batch([65, 300, 130], [65, 1, 130], dtype=torch.bfloat16, heads=(16, 1))
    out, lse = attend(plain_shim, batch, "tiled", split_size=split_size)
    check_tiled(batch, out, lse)
    alone = attend(plain_shim, of_sequence(batch, 1), "tiled", split_size=split_size)
    assert all(torch.equal(one, other[65:66]) for one, other in zip(alone, (out, lse), strict=True))


@pytest.mark.parametrize("split_size", [0, 64])
def test_fixed_cuts_without_races(race_shim: Any, split_size: int) -> None:
    """On few multiprocessors there are more pieces than wait for others: items are folded in one block, and in many."""
    for name, (lengths, queries, heads) in BATCHES.items():
        batch = make_batch(lengths, queries, dtype=torch.float16, heads=heads if heads[1] == 1 else (2, 1))
        first, *others = (
            attend(race_shim, batch, "tiled", grid=grid, split_size=split_size, launches=2) for grid in (1, 2, 9)
        )
        check_tiled(batch, *first)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), name


@pytest.mark.shim_only
@pytest.mark.parametrize("split_size", [-1, 0, 64])
def test_memory_follows_from_shapes(plain_shim: Any, split_size: int) -> None:
    """Neither lengths nor the table's contents say how much: a recorded step must run with others."""
    sizes = set()
    for lengths in ([5, 6, 7], [300, 0, 100], [250, 299, 300]):
        batch = make_batch(lengths, [1, 1, 1], dtype=torch.bfloat16)
        batch.block_table = torch.zeros(3, 20, dtype=torch.int32)
        with Device(plain_shim) as device:
            fields = Attention(device, batch, split_size=split_size).fields
            fields["num_blocks"] = 60
            sizes.add((plain_shim.plan_bytes(fields), plain_shim.workspace_bytes(fields)))
    assert len(sizes) == 1


@pytest.mark.shim_only
def test_the_planner_cuts_no_small_pieces(plain_shim: Any) -> None:
    """Many multiprocessors and little work: the plan leaves most of them idle rather than merge pieces of 64 keys."""
    batch = make_batch([1024], [1], dtype=torch.bfloat16, heads=(1, 1))
    with Device(plain_shim) as device:
        attention = Attention(device, batch)
        plain_shim.set_multiprocessors(132)
        plan, workspace = (
            device.allocate(size(attention.fields)) for size in (plain_shim.plan_bytes, plain_shim.workspace_bytes)
        )
        plain_shim.paged_attention(attention.fields, plan, workspace)
        total, items_and_blocks = device.download(plan, torch.empty(2, dtype=torch.int64)).tolist()
        assert (total, items_and_blocks & 0xFFFFFFFF, items_and_blocks >> 32) == (16, 1, 8)
        check_tiled(batch, *attention.result())

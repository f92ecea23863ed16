"""Indices that no host has read, on the GPU's kernels: what a CPU would refuse is masked and flagged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from device import FAULTS, Attention, Device, check_tiled
from pagedcore import ops
from pagedcore.errors import InvalidArgumentError
from reference import check, make_batch

if TYPE_CHECKING:
    from reference import Batch

pytestmark = pytest.mark.shim_only  # the kernels by themselves; test_shim_binding.py has flags of every op on a GPU too
KERNELS = pytest.mark.parametrize("kernel", ["generic", "tiled"])


def flagged(shim: Any, batch: Batch, kernel: str, **options: Any) -> set[str]:
    with Device(shim) as device:
        attention = Attention(device, batch, **options)
        attention.launch(kernel, launches=2 if kernel == "tiled" else 1)
        return attention.faults()


@KERNELS
@pytest.mark.parametrize(
    ("lengths", "queries"), [([40, 0, 3], [2, 1, 1]), ([200, 0, 70], [1, 30, 70]), ([], [])], ids=str
)
def test_nothing_is_flagged_where_nothing_is_wrong(
    shim: Any, kernel: str, lengths: list[int], queries: list[int]
) -> None:
    """Padding is not wrong: a query without keys, and tokens of no sequence."""
    batch = make_batch(lengths, queries, dtype=torch.bfloat16)
    batch.query = torch.cat([batch.query, batch.query.new_zeros(3, *batch.query.shape[1:])])
    most: dict[str, Any] = {"max_query_len": max([1, *queries]), "max_seq_len": max([1, *lengths])}
    assert flagged(shim, batch, kernel, **most) == set()


WRONG_STARTS = [[1, 2, 4], [-3, 2, 4], [0, 2, 5], [0, 600_000_000, 600_000_004]]
WRONG: list[dict[str, Any]] = [{"query_start_loc": starts} for starts in WRONG_STARTS]
WRONG += [{"seq_lens": lengths} for lengths in ([-1, 40], [40, -(2**31)])]
WRONG += [{"query_start_loc": [0, 2, 5], "max_query_len": 100}, {"query_start_loc": [0, 10**9, 2 * 10**9]}]
WRONG += [
    {name: most} for name, most in (("max_query_len", 1), ("max_query_len", 0), ("max_seq_len", 39), ("max_seq_len", 0))
]


QUERIES = pytest.mark.parametrize("queries", [[2, 2], [20, 20]], ids=["decode", "mixed"])


def check_refused(shim: Any, kernel: str, wrong: dict[str, Any], queries: list[int]) -> None:
    """Flagged, and refused by the CPU."""
    batch = make_batch([40, 40], queries, dtype=torch.bfloat16, heads=(4, 1))
    limits = {"max_query_len": max(queries)} | {name: value for name, value in wrong.items() if name.startswith("max")}
    for name, value in wrong.items():
        if name.startswith("max"):
            continue
        scaled = [n * queries[0] // 2 if abs(n) < 100 else n for n in value] if name == "query_start_loc" else value
        setattr(batch, name, torch.tensor(scaled, dtype=torch.int32))
    assert flagged(shim, batch, kernel, **limits) - {"plan"} == {"sequence"}  # what has no room in a plan is left out
    with pytest.raises(InvalidArgumentError):
        ops.paged_attention(*batch.args, **limits)


@KERNELS
@pytest.mark.parametrize("wrong", WRONG, ids=str)
@QUERIES
def test_sequences_that_cannot_be(shim: Any, kernel: str, wrong: dict[str, Any], queries: list[int]) -> None:
    """Starts, lengths and limits that the CPU refuses; nothing outside is read or written, which would be an error."""
    check_refused(shim, kernel, wrong, queries)


@KERNELS
@pytest.mark.parametrize("starts", [[0, 2, -5], [0, 3, 1]], ids=str)
@QUERIES
def test_starts_that_fall(plain_shim: Any, kernel: str, starts: list[int], queries: list[int]) -> None:
    """A token is then a sequence's and nobody's, and which of two blocks writes it last is open: no order to check."""
    check_refused(plain_shim, kernel, {"query_start_loc": starts}, queries)


@KERNELS
def test_what_a_table_does_not_have(shim: Any, kernel: str) -> None:
    batch = make_batch([48, 20], [1, 2], dtype=torch.bfloat16)
    batch.block_table[1, 0] = len(batch.k_cache)
    assert flagged(shim, batch, kernel) == {"block"}
    batch = make_batch([48, 20], [1, 2], dtype=torch.bfloat16)
    batch.block_table = batch.block_table[:, :3].contiguous()
    batch.seq_lens[0] = 49
    assert flagged(shim, batch, kernel) == {"length"}


@pytest.mark.parametrize(("kernel", "split_size"), [("tiled", -1), ("tiled", 0), ("tiled", 64), ("generic", -1)])
def test_a_length_without_end(plain_shim: Any, kernel: str, split_size: int) -> None:
    """A length that no table holds, up to the largest: what the table has is attended to, in the time that takes."""
    batch = make_batch([48, 30], [1, 1], dtype=torch.bfloat16)
    batch.block_table = batch.block_table[:, :3].contiguous()
    whole = make_batch([48, 30], [1, 1], dtype=torch.bfloat16)
    batch.seq_lens[0] = 2**31 - 1
    with Device(plain_shim) as device:
        attention = Attention(device, batch, split_size=split_size)
        attention.launch(kernel)
        assert attention.faults() == {"length"}
        (check if kernel == "generic" else check_tiled)(whole, *attention.result())


@KERNELS
def test_tokens_of_no_sequence(shim: Any, kernel: str) -> None:
    """Without any sequence there is one start, and no length to read; what lies behind the start is padding."""
    batch = make_batch([], [], dtype=torch.bfloat16)
    batch.query = torch.ones(3, *batch.query.shape[1:], dtype=torch.bfloat16)
    batch.query_start_loc = torch.tensor([1], dtype=torch.int32)
    with Device(shim) as device:
        attention = Attention(device, batch)
        attention.launch(kernel)
        assert attention.faults() == {"sequence"}
        out, lse = attention.result()
    assert (out[1:] == 0).all()
    assert (lse[1:] == -torch.inf).all()


DECODE = ([300, 130], [1, 1])
MIXED = ([300, 130], [1, 30])
MADE_FOR_OTHERS: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (MIXED, {"window": 90}, {}),
    (MIXED, {"causal": False}, {}),
    (MIXED, {"split_size": 0}, {}),
    (MIXED, {"split_size": 64}, {"split_size": 128}),
    (MIXED, {"max_query_len": 1}, {}),
    (MIXED, {"grid": 5}, {}),
    (MIXED, {"num_seqs": 1}, {}),
    (MIXED, {"num_tokens": 30}, {}),
    (DECODE, {"num_heads": 2}, {}),
    (DECODE, {"num_heads": 2, "num_kv_heads": 1}, {}),
]


@pytest.mark.parametrize(("sizes", "made", "used"), MADE_FOR_OTHERS, ids=str)
def test_a_plan_of_another_call(plain_shim: Any, sizes: Any, made: dict[str, Any], used: dict[str, Any]) -> None:
    """Is not run: the output is as it was, where else work would be left out or done twice."""
    batch = make_batch(*sizes, dtype=torch.bfloat16)
    options = {name: made[name] for name in ("window", "causal", "split_size", "max_query_len") if name in made}
    with Device(plain_shim) as device:
        plan, workspace = device.allocate(1 << 16), device.allocate(1 << 20)
        plain_shim.set_multiprocessors(made.get("grid", 6))
        other = Attention(device, batch, **options)
        other.fields |= {name: made[name] for name in made if name.startswith("num")}
        plain_shim.paged_attention(other.fields, plan, workspace)
        plain_shim.set_multiprocessors(6)
        attention = Attention(device, batch, **used)
        plain_shim.paged_attention(attention.fields, plan, workspace, planned=True)
        assert attention.faults() == {"plan"}
        assert attention.result()[0].isnan().all()
        plain_shim.paged_attention(attention.fields, plan, workspace)  # planned anew
        check_tiled(batch, *attention.result())


def test_words_are_told_apart() -> None:
    """As many here as in the package, in the order of faults.h."""
    assert len(ops._DEVICE_FAULTS) == len(FAULTS) == len(np.unique(FAULTS))

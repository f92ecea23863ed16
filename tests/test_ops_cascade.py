"""cascade_attention: sequences that share their first blocks get what paged_attention gives them, from one read."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codes import GRANULARITIES, Quantized
from pagedcore import KVCacheLayout, ops
from pagedcore.errors import InvalidArgumentError, UnsupportedError
from reference import GARBAGE, SHARED, Batch, check, features, sharing

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


def cascade(batch: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"num_shared_blocks": SHARED, **options}
    out, lse = ops.cascade_attention(*batch.args, return_lse=True, **options)
    return out, lse


OWN = [1, 16, 17, 200, 5, 33]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (9, 3), (7, 1)], ids=str)
@pytest.mark.parametrize("query_lens", [[1] * 6, [1, 16, 2, 17, 5, 1]], ids=["decode", "chunks"])
def test_it_is_attention(dtype: torch.dtype, heads: tuple[int, int], query_lens: list[int]) -> None:
    """Within the gates of paged_attention, over the batch. Of single rows more is allowed: each has the roundings of
    three outputs, and is compared with an algorithm that has one.
    """
    batch = sharing(OWN, query_lens, dtype=dtype, heads=heads)
    check(batch, *cascade(batch), row_factor=5 if dtype != torch.float32 else 2)


@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("order", ["HND", "NHD", "strided"])
@pytest.mark.parametrize("block_size", [1, 16, 48])
def test_shapes(head_dim: int, order: str, block_size: int) -> None:
    batch = sharing([7, 65], [1, 3], head_dim=head_dim, v_head_dim=64, order=order, block_size=block_size)
    check(batch, *cascade(batch))


@pytest.mark.parametrize("options", [("sinks",), ("softcap",), ("causal",), ("sinks", "softcap", "causal")], ids=str)
def test_options(options: tuple[str, ...]) -> None:
    """Sinks count once, though there are two passes."""
    batch = sharing(OWN, [1, 16, 2, 17, 5, 1], heads=(8, 2))
    given = {"scale": 0.2, **features(*options)}
    check(batch, *cascade(batch, **given), **given)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_codes(granularity: str) -> None:
    quantized = Quantized(sharing(OWN, [1] * 6, heads=(8, 2)), granularity)
    k_scale, v_scale = quantized.scales
    check(quantized.exact, *cascade(quantized.of_codes, k_scale=k_scale, v_scale=v_scale))


@pytest.mark.parametrize("at", [0, 2, 5])
def test_padding_sees_nothing(at: int) -> None:
    """Wherever it stands, in rows of seq_len 0 and past the last sequence, and whatever its query holds."""
    own = [*OWN[:at], 0, 0, *OWN[at:]]
    batch = sharing(own, [1] * 8)
    query = torch.cat([batch.query, torch.full((3, 4, 64), NAN)])
    query[at : at + 2] = NAN
    batch = replace(batch, query=query)
    sinks = features("sinks", num_heads=4)
    out, lse = cascade(batch, **sinks)
    padding = [at, at + 1, 8, 9, 10]
    assert (out[padding] == 0).all()
    assert lse[padding].isneginf().all()
    live = [i for i in range(8) if i not in padding]
    want = ops.paged_attention(*batch.args, **sinks)
    torch.testing.assert_close(out[live], want[live], rtol=1e-5, atol=1e-5)


def test_nobody_and_nothing() -> None:
    """Padding alone, no sequence at all, no shared block: as paged_attention."""
    batch = sharing(OWN, [1] * 6)
    out, lse = cascade(replace(batch, seq_lens=torch.zeros_like(batch.seq_lens)))
    assert (out == 0).all()
    assert lse.isneginf().all()
    nobody = (batch.query[:2], *batch.args[1:3], batch.block_table[:0], batch.seq_lens[:0], batch.query_start_loc[:1])
    assert (ops.cascade_attention(*nobody, num_shared_blocks=SHARED) == 0).all()
    sinks = features("sinks", num_heads=4)
    same = zip(
        cascade(batch, num_shared_blocks=0, **sinks),
        ops.paged_attention(*batch.args, return_lse=True, **sinks),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in same)


def test_fewer_blocks_than_are_shared_and_all_rows_of_one_sequence() -> None:
    batch = sharing(OWN, [1] * 6)
    check(batch, *cascade(batch, num_shared_blocks=1))
    alone = sharing([40], [4])
    check(alone, *cascade(alone, num_shared_blocks=5))


def test_a_table_with_rows_of_its_own() -> None:
    batch = sharing(OWN, [1] * 6)
    rows = torch.tensor([4, 0, 7, 2, 5, 1], dtype=torch.int32)
    table = torch.full((8, batch.block_table.shape[1]), GARBAGE, dtype=torch.int32)
    table[rows.long()] = batch.block_table
    check(batch, *cascade(replace(batch, block_table=table), block_table_rows=rows))


def test_a_window_that_hides_nothing() -> None:
    batch = sharing(OWN, [1] * 6)
    check(batch, *cascade(batch, window=248, max_seq_len=248))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_ones_own(dtype: torch.dtype) -> None:
    """A workspace for larger calls, full of NaN; out and lse are written in place; nothing beyond is."""
    batch = sharing(OWN, [1] * 6, dtype=dtype)
    size = ops.cascade_workspace_size(9, 7, 4, 2, 64, dtype=dtype, device="cpu")
    workspace = torch.full((size + 64,), 0xFF, dtype=torch.uint8)
    out, lse = torch.empty(6, 4, 64, dtype=dtype), torch.empty(6, 4)
    got = ops.cascade_attention(
        *batch.args, num_shared_blocks=SHARED, out=out, lse=lse, workspace=workspace[:size], num_threads=2
    )
    assert got[0] is out
    assert got[1] is lse
    assert (workspace[size:] == 0xFF).all()
    assert all(torch.equal(a, b) for a, b in zip(got, cascade(batch), strict=True))


def test_numpy() -> None:
    batch = sharing(OWN, [1] * 6, dtype=torch.float16)
    arrays = [t.numpy() for t in batch.args]
    out, lse = ops.cascade_attention(*arrays, num_shared_blocks=SHARED, return_lse=True)
    assert isinstance(out, np.ndarray)
    want = cascade(batch)
    assert np.array_equal(out, want[0].numpy())
    assert np.array_equal(lse, want[1].numpy())
    views = [memoryview(a) for a in arrays]
    memory = memoryview(np.empty(1 << 16, np.uint8))
    own = ops.cascade_attention(*views, num_shared_blocks=np.int64(SHARED), workspace=memory)
    assert np.array_equal(own, out)
    with pytest.raises(InvalidArgumentError, match=r"^workspace: expected an array, as query is, got Tensor"):
        ops.cascade_attention(*arrays, num_shared_blocks=SHARED, workspace=BYTES)


def change(batch: Batch, name: str, at: int | tuple[int, int], value: int) -> Batch:
    tensor = getattr(batch, name).clone()
    tensor[at] = value
    return replace(batch, **{name: tensor})


BYTES = torch.zeros(1 << 16, dtype=torch.uint8)

REFUSED = [
    (lambda b: change(b, "seq_lens", 2, 48), {}, r"^seq_lens\[2\]: expected 48 tokens or more before .* got 47"),
    (lambda b: change(b, "seq_lens", 4, 20), {}, r"^seq_lens\[4\]: expected 48 tokens or more"),
    (lambda b: change(b, "seq_lens", 3, 999), {}, r"^seq_lens\[3\]: expected at most 288, got 999"),
    (lambda b: b, {"max_seq_len": 100}, r"^seq_lens\[3\]: expected at most 100, got 248"),
    (lambda b: change(b, "block_table", (3, 1), 0), {}, r"^block_table: .* another at index 1 of sequence 3"),
    (lambda b: b, {"num_shared_blocks": -1}, r"^num_shared_blocks: expected 0 or more, and fewer than the 18 columns"),
    (lambda b: b, {"num_shared_blocks": 18}, r"^num_shared_blocks: expected 0 or more"),
    (lambda b: b, {"num_shared_blocks": True}, r"^num_shared_blocks: expected an int, got True"),
    (lambda b: b, {"block_table_rows": torch.full((6,), 6, dtype=torch.int32)}, r"^block_table_rows\[0\]: .*\[0, 6\)"),
    (lambda b: b, {"block_table_rows": torch.zeros(5, dtype=torch.int32)}, r"^block_table_rows: expected num_seqs = 6"),
    (lambda b: replace(b, block_table=b.block_table[:5]), {}, r"^block_table: expected num_seqs = 6, got 5"),
    (lambda b: replace(b, query_start_loc=b.seq_lens), {}, r"^query_start_loc: expected 7 entries"),
    (lambda b: replace(b, query=b.query[0]), {}, r"^query: expected shape"),
    (lambda b: b, {"workspace": torch.empty(99, dtype=torch.uint8)}, r"^workspace: expected \d+ bytes or more, got 99"),
    (lambda b: b, {"workspace": BYTES[:99], "num_shared_blocks": 0}, r"^workspace: expected \d+ bytes or more, got 99"),
    (lambda b: b, {"workspace": torch.empty(99)}, r"^workspace: expected dtype uint8, got float32"),
    (lambda b: b, {"workspace": BYTES[1:]}, r"^workspace: expected memory that begins on 16 bytes, got address 0x"),
    (lambda b: b, {"workspace": BYTES[::2]}, r"^workspace: expected bytes one after another, got stride 2"),
    (lambda b: b, {"workspace": BYTES.numpy()}, r"^workspace: expected a torch tensor, as query is, got ndarray"),
    (lambda b: b, {"workspace": BYTES.to("meta")}, r"^device: expected 'cpu', 'cuda' or 'cuda:N', got .*meta"),
    (lambda b: replace(b, seq_lens=b.seq_lens.long()), {}, r"^seq_lens: expected dtype int32, got int64"),
    (lambda b: replace(b, seq_lens=b.seq_lens.float()), {}, r"^seq_lens: expected dtype int32, got float32"),
    (lambda b: replace(b, block_table=b.block_table.long()), {}, r"^block_table: expected dtype int32, got int64"),
    (lambda b: b, {"block_table_rows": torch.arange(6.0)}, r"^block_table_rows: expected dtype int32, got float32"),
    (lambda b: b, {"window": math.nan}, r"^window: expected an int, got nan"),
    (lambda b: b, {"window": math.nan, "max_seq_len": 300}, r"^window: expected an int, got nan"),
    (lambda b: b, {"window": 500, "max_seq_len": "a"}, r"^max_seq_len: expected an int, got 'a'"),
    (lambda b: b, {"max_seq_len": "a"}, r"^max_seq_len: expected an int, got 'a'"),
    (lambda b: b, {"max_seq_len": 300.0}, r"^max_seq_len: expected an int, got 300.0"),
    (lambda b: b, {"num_shared_blocks": 2.0}, r"^num_shared_blocks: expected an int, got 2.0"),
    (lambda b: b, {"sinks": torch.zeros(3)}, r"^sinks: expected num_heads = 4"),
]


@pytest.mark.parametrize(("damage", "options", "message"), REFUSED)
def test_what_is_refused(damage: Any, options: dict[str, Any], message: str) -> None:
    """And then nothing was written."""
    batch = damage(sharing(OWN, [1] * 6))
    out, lse = torch.full((6, 4, 64), 7.0), torch.full((6, 4), 7.0)
    with pytest.raises(InvalidArgumentError, match=message):
        ops.cascade_attention(*batch.args, **{"num_shared_blocks": SHARED, "out": out, "lse": lse, **options})
    assert (out == 7).all()
    assert (lse == 7).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 100}, "^window: expected none, or one no shorter than max_seq_len, which was not given, got 100"),
        ({"window": 247, "max_seq_len": 248}, "^window"),
        ({"alibi_slopes": torch.ones(4)}, "^alibi_slopes: expected none, got slopes"),
        ({"split_size": 0}, "^split_size: expected none, got 0: the result depends on who shares"),
    ],
)
def test_what_it_cannot_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        cascade(sharing(OWN, [1] * 6), **options)


def test_as_a_torch_operator() -> None:
    import pagedcore.torch  # noqa: F401

    batch = sharing(OWN, [1] * 6)
    options = {"num_shared_blocks": SHARED, "sinks": torch.randn(4)}
    operator = torch.ops.pagedcore.cascade_attention.default
    torch.library.opcheck(operator, (*batch.args, torch.empty(6, 4, 64), torch.empty(6, 4)), options)
    torch.library.opcheck(operator, (*batch.args, torch.empty(6, 4, 64)), options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler about its own modules
def test_compiled() -> None:
    """As a whole, and what its indices hold is checked all the same."""
    batch = sharing(OWN, [1] * 6)

    def step(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = ops.cascade_attention(*args, num_shared_blocks=SHARED, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*batch.args), step(*batch.args), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InvalidArgumentError, match="another at index 1"):
        compiled(*change(batch, "block_table", (3, 1), 0).args)


def test_fakes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = sharing(OWN, [1] * 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        args = [torch.empty(a.shape, dtype=a.dtype, device="cuda") for a in batch.args]
        out, lse = ops.cascade_attention(*args, num_shared_blocks=SHARED, return_lse=True)
        assert (out.device.type, out.shape, lse.dtype) == ("cuda", (6, 4, 64), torch.float32)
        with pytest.raises(InvalidArgumentError, match="sinks"):
            ops.cascade_attention(*args, num_shared_blocks=SHARED, sinks=torch.empty(3, device="cuda"))


def test_a_prefix_that_was_written_once() -> None:
    """The way a server comes to it: one prompt's blocks in the tables of all who begin with it."""
    layout = KVCacheLayout(16, 4, 1, 2, 16, "float32")
    k_cache, v_cache = layout.allocate(library="torch").layer(0)
    torch.manual_seed(3)
    key, value = torch.randn(2, 8 + 3, 2, 16)
    slots = torch.tensor([*range(4, 12), 12, 16, 20])  # blocks 1 and 2 for all, 3 to 5 for one each
    ops.reshape_and_cache(key, value, k_cache, v_cache, slots)
    table = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 2, 5]], dtype=torch.int32)
    args = (torch.randn(3, 4, 16), k_cache, v_cache, table, torch.full((3,), 9).int(), torch.arange(4).int())
    got = ops.cascade_attention(*args, num_shared_blocks=2)
    torch.testing.assert_close(got, ops.paged_attention(*args), rtol=1e-5, atol=1e-6)


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """It compares the two before it times them."""
    from pagedcore.bench.__main__ import main

    path = tmp_path / "result.json"
    assert main(["cascade", "--quick", "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert [r["case"].rsplit(" ", 1)[1] for r in results] == ["float32", "float16", "bfloat16"]
    assert all(r["baseline"] == "paged_attention" and r["ratio"] > 0 for r in results)


# Plans ---------------------------------------------------------------------------------------------------------------

STEP = {"num_shared_blocks": SHARED, "block_size": 16, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64}


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_plan_holds_what_no_layer_changes(library: str) -> None:
    """On the CPU the lengths alone. Layers that share it give the same bits as without."""
    batch = sharing([*OWN, 0], [1, 16, 2, 17, 5, 1, 1], heads=(4, 4))
    args = [tensor.numpy() if library == "numpy" else tensor for tensor in batch.args]
    plan = ops.plan_cascade(*args[4:], **STEP, num_tokens=len(batch.query), max_query_len=17)
    assert type(plan) is type(args[0])
    assert len(plan) == ops.cascade_plan_size(len(batch.query), 7, 4, 4, 64, device="cpu")
    with_plan = ops.cascade_attention(*args, num_shared_blocks=SHARED, return_lse=True, plan=plan)
    without = ops.cascade_attention(*args, num_shared_blocks=SHARED, return_lse=True)
    for a, b in zip(with_plan, without, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_in_a_compiled_function(dtype: torch.dtype) -> None:
    """Which takes memory that there is: its size is asked of the device."""
    batch = sharing(OWN, [1] * 6, dtype=dtype)
    memory = torch.empty(ops.cascade_plan_size(6, 6, 4, 4, 64, device="cpu"), dtype=torch.uint8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*args: torch.Tensor) -> torch.Tensor:
        plan = ops.plan_cascade(*args[4:], **STEP, max_query_len=1, dtype=dtype, out=memory)
        return ops.cascade_attention(*args, num_shared_blocks=SHARED, plan=plan)

    assert torch.equal(step(*batch.args), cascade(batch)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^num_tokens: expected the number of query tokens where max_query_len is not 1 but 3, got None"),
        ({"num_tokens": 8, "dtype": "int8"}, "^dtype: expected one of"),
        ({"num_tokens": 8, "out": torch.empty(9, dtype=torch.uint8)}, r"^out: expected \d+ bytes or more, got 9"),
        ({"num_tokens": 8, "out": torch.empty(4096)}, "^out: expected dtype uint8, got float32"),
        (
            {"num_tokens": 8, "out": np.empty(4096, np.uint8)},
            "^out: expected a torch tensor, as seq_lens is, got ndarray",
        ),
        ({"num_tokens": 8, "num_shared_blocks": -1}, "^num_shared_blocks: expected 0 or more, got -1"),
        ({"num_tokens": 8, "num_shared_blocks": 1.0}, "^num_shared_blocks: expected an int, got 1.0"),
        ({"num_tokens": 8, "block_size": 0}, "^block_size: expected 1 or more, got 0"),
        ({"num_tokens": 8, "max_query_len": -3}, "^max_query_len: expected 0 or more, got -3"),
        ({"num_tokens": 8, "max_query_len": "a"}, "^max_query_len: expected an int, got 'a'"),
        ({"num_tokens": 8, "causal": "yes"}, "^causal: expected a bool, got 'yes'"),
        ({"num_tokens": 8, "head_dim": "a"}, "^head_dim: expected an int, got 'a'"),
        ({"num_tokens": 8, "seq_lens": torch.ones(6)}, "^seq_lens: expected dtype int32, got float32"),
        ({"num_tokens": 8, "seq_lens": torch.ones(6).long()}, "^seq_lens: expected dtype int32, got int64"),
        ({"num_tokens": 8, "query_start_loc": torch.ones(6).int()}, "^query_start_loc: expected 7 entries"),
        ({"num_tokens": 8, "query_start_loc": torch.ones(7)}, "^query_start_loc: expected dtype int32, got float32"),
        (
            {"num_tokens": 8, "query_start_loc": torch.ones(14).int()[::2]},
            r"^query_start_loc: expected a contiguous last axis \(stride 1\), got stride 2",
        ),
    ],
)
def test_plans_of_what_cannot_be(options: dict[str, Any], message: str) -> None:
    """And then nothing was written."""
    batch = sharing(OWN, [1, 3, 1, 1, 1, 1])
    out = torch.full((4096,), 85, dtype=torch.uint8)
    given = {"seq_lens": batch.seq_lens, "query_start_loc": batch.query_start_loc, "max_query_len": 3}
    with pytest.raises(InvalidArgumentError, match=message):
        ops.plan_cascade(**{**STEP, **given, "out": out, **options})
    assert (out == 85).all()


@pytest.mark.parametrize("starts", [None, "x"])
def test_a_plan_of_no_tensor(starts: Any) -> None:
    with pytest.raises(TypeError, match=r"^query_start_loc: expected a tensor, got"):
        ops.plan_cascade(sharing(OWN, [1] * 6).seq_lens, starts, **STEP, max_query_len=1)


@pytest.mark.parametrize("change", ["shared blocks", "lengths", "nothing planned"])
def test_a_plan_of_another_step(change: str) -> None:
    """Is not followed, and nothing is written."""
    batch = sharing(OWN, [1] * 6)
    lens, step = batch.seq_lens.clone(), dict(STEP)
    message = f"^plan: expected one that was made for {16 * SHARED} shared tokens, got one for "
    if change == "shared blocks":
        step["num_shared_blocks"] -= 1
        message += str(16 * SHARED - 16)
    elif change == "lengths":
        lens[2] += 1
        own = int(lens[2]) - 16 * SHARED
        message = rf"^plan: expected .* these seq_lens, {own - 1} own tokens of sequence 2, got {own}$"
    plan = ops.plan_cascade(lens, batch.query_start_loc, **step, max_query_len=1)
    if change == "nothing planned":
        plan[:] = 0
        message += "0"
    out = torch.full_like(batch.query, 7)
    with pytest.raises(InvalidArgumentError, match=message):
        cascade(batch, plan=plan, out=out)
    assert (out == 7).all()


def test_a_plan_that_is_too_small() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^plan: expected \d+ bytes or more, got 9"):
        cascade(sharing(OWN, [1] * 6), plan=torch.empty(9, dtype=torch.uint8))

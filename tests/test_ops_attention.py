"""paged_attention against the oracle: lengths, shapes, strides and instruction sets; and its properties."""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from conftest import runnable_isas
from pagedcore import _kernels, ops
from reference import GARBAGE, Batch, check, make_batch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (8, 8), (32, 8), (64, 8), (28, 4), (71, 1)]
ISAS = runnable_isas()


@pytest.fixture(params=["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def attend(batch: Batch, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.paged_attention(*batch.args, return_lse=True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 16, 24])
def test_lengths(device: str, isa: str, dtype: torch.dtype, block_size: int) -> None:
    page = block_size
    lengths = sorted({0, 1, page - 1, page, page + 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257})
    batch = make_batch(lengths, [1] * len(lengths), dtype=dtype, heads=(9, 3), block_size=block_size, device=device)
    check(batch, *attend(batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", SHAPES)
def test_query_lengths(device: str, isa: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """Mixed batches: decode, short and long chunks, whole prompts, padding rows, all in one call."""
    query_lens = [1, 2, 5, 16, 17, 1, 0, 40]
    seq_lens = [65, 2, 77, 16, 100, 0, 9, 40]
    batch = make_batch(seq_lens, query_lens, dtype=dtype, heads=heads, head_dim=64, device=device)
    check(batch, *attend(batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (8, 2)])
def test_long(device: str, isa: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    batch = make_batch([4097, 300, 555], [1, 300, 128], dtype=dtype, heads=heads, device=device)
    check(batch, *attend(batch))
    if heads == (1, 1):
        batch = make_batch([4097], [128], dtype=dtype, heads=heads, device=device)
        check(batch, *attend(batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 2, 31, 64, 80, 96, 112, 128, 192, 255, 256])
def test_head_dims(device: str, isa: str, dtype: torch.dtype, head_dim: int) -> None:
    batch = make_batch([50, 70], [1, 33], dtype=dtype, heads=(6, 2), head_dim=head_dim, device=device)
    check(batch, *attend(batch))


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(192, 128), (64, 1), (16, 256), (40, 56)])
def test_v_head_dim_differs(device: str, isa: str, head_dim: int, v_head_dim: int) -> None:
    batch = make_batch([50, 70], [1, 33], heads=(6, 2), head_dim=head_dim, v_head_dim=v_head_dim, device=device)
    check(batch, *attend(batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["NHD", "strided", "heads first"])
def test_orders(device: str, isa: str, dtype: torch.dtype, order: str) -> None:
    batch = make_batch([50, 70, 33], [1, 33, 2], dtype=dtype, heads=(8, 2), head_dim=80, order=order, device=device)
    check(batch, *attend(batch))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 63, 64, 200])
def test_window(device: str, isa: str, window: int) -> None:
    """Freed blocks below the window hold NaN and have GARBAGE in the table."""
    batch = make_batch([1, 50, 300, 300, 70], [1, 1, 1, 40, 70], heads=(8, 2), window=window, device=device)
    check(batch, *attend(batch, window=window), window=window)


def test_not_causal(device: str, isa: str) -> None:
    batch = make_batch([50, 70, 300], [50, 3, 1], heads=(8, 2), device=device)
    check(batch, *attend(batch, causal=False), causal=False)


@pytest.mark.parametrize("scale", [0.0, 0.01, 0.4, -0.2])
def test_scale(device: str, isa: str, scale: float) -> None:
    batch = make_batch([50, 70], [1, 33], device=device)
    check(batch, *attend(batch, scale=scale), scale=scale)


def test_large_scores_underflow_to_zero(device: str, isa: str) -> None:
    batch = make_batch([200, 130], [1, 60], device=device)
    out, lse = attend(batch, scale=50.0)
    want, want_lse = batch.expected(scale=50.0)
    np.testing.assert_allclose(out.numpy(), want, atol=2e-3)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=1e-5)


@pytest.mark.parametrize("query_len", [1, 40])
def test_nan_in_a_visible_key_shows(device: str, isa: str, query_len: int) -> None:
    """A NaN that was really written is not hidden: the engine ends such requests by it."""
    batch = make_batch([70, 70], [query_len, query_len], device=device)
    batch.k_cache[batch.block_table[0, 0].item(), :, 0] = float("nan")
    out, lse = attend(batch)
    assert out[:query_len].isnan().all()
    assert lse[:query_len].isnan().all()
    assert out[query_len:].isfinite().all()


# Properties


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_len", [1, 70])
def test_constant_values_come_back(device: str, isa: str, dtype: torch.dtype, query_len: int) -> None:
    batch = make_batch([500, 77], [query_len, query_len], dtype=dtype, device=device)
    batch.v_cache[:] = 1
    out, _ = attend(batch)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=2e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("query_len", [1, 3, 40])
def test_physical_order_changes_nothing(device: str, isa: str, query_len: int) -> None:
    batch = make_batch([333, 41], [query_len, query_len], heads=(9, 3), device=device)
    order = torch.randperm(len(batch.k_cache))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    table = torch.where(batch.block_table >= 0, place[batch.block_table.clamp(min=0).long()].int(), GARBAGE)
    moved = Batch(
        batch.query, batch.k_cache[order], batch.v_cache[order], table.int(), batch.seq_lens, batch.query_start_loc
    )
    for a, b in zip(attend(batch), attend(moved), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("query_len", [1, 40])
def test_strides_change_nothing(device: str, isa: str, query_len: int) -> None:
    batch = make_batch([333, 41], [query_len, query_len], heads=(9, 3), device=device)
    moved = Batch(
        batch.query, batch.k_cache, batch.v_cache.transpose(1, 2).contiguous().transpose(1, 2), *batch.args[3:]
    )
    for a, b in zip(attend(batch), attend(moved), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("query_len", [1, 40])
def test_window_as_long_as_the_sequence_is_no_window(device: str, isa: str, query_len: int) -> None:
    batch = make_batch([100, 64], [query_len, query_len], device=device)
    for a, b in zip(attend(batch), attend(batch, window=100), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_len", [1, 3, 40])
def test_packed_heads_equal_unpacked(device: str, isa: str, dtype: torch.dtype, query_len: int) -> None:
    batch = make_batch([100, 64], [query_len, query_len], dtype=dtype, heads=(8, 2), device=device)
    repeated = Batch(
        batch.query, batch.k_cache.repeat_interleave(4, 1), batch.v_cache.repeat_interleave(4, 1), *batch.args[3:]
    )
    out, lse = attend(batch)
    other, other_lse = attend(repeated)
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(out, other, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, other_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split_size", [0, 1, 16, 50, 64, 1000])
@pytest.mark.parametrize("query_len", [1, 40])
def test_fixed_split_does_not_depend_on_companions(device: str, isa: str, split_size: int, query_len: int) -> None:
    companions = [(4, 1), (300, 1), (64, 64), (90, 7)]
    batch = make_batch(
        [210, *(s for s, _ in companions)], [query_len, *(q for _, q in companions)], heads=(9, 3), device=device
    )
    alone = Batch(
        batch.query[:query_len],
        batch.k_cache,
        batch.v_cache,
        batch.block_table[:1],
        batch.seq_lens[:1],
        batch.query_start_loc[:2],
    )
    together = attend(batch, split_size=split_size)
    check(batch, *together)
    for threads in (1, 2, 5):
        for a, b in zip(attend(alone, split_size=split_size, num_threads=threads), together, strict=True):
            assert torch.equal(a, b[:query_len])


@pytest.mark.parametrize("num_threads", [1, 2, 3, 16])
def test_threads_and_planner_split(device: str, num_threads: int) -> None:
    batch = make_batch([3000, 1, 700], [1, 1, 30], heads=(9, 3), device=device)
    check(batch, *attend(batch, num_threads=num_threads))


def test_shared_pages(device: str, isa: str) -> None:
    """Sequences that share a prefix read the same pages."""
    batch = make_batch([100, 100, 100], [1, 5, 20], device=device)
    batch.block_table[1, :3] = batch.block_table[0, :3]
    batch.block_table[2, :5] = batch.block_table[1, :5]
    check(batch, *attend(batch))


def test_block_table_rows(device: str) -> None:
    batch = make_batch([100, 33, 64], [1, 5, 20], device=device)
    rows = torch.tensor([4, 0, 2], dtype=torch.int32)
    table = torch.full((6, batch.block_table.shape[1]), GARBAGE, dtype=torch.int32)
    table[rows.long()] = batch.block_table
    want = attend(batch)
    got = ops.paged_attention(*batch.args[:3], table, *batch.args[4:], block_table_rows=rows, return_lse=True)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_no_sequences_and_padding_tokens(device: str) -> None:
    """Query rows that belong to no sequence give 0 and -inf."""
    batch = make_batch([20], [2], device=device)
    padded = Batch(torch.cat([batch.query, torch.full((3, 4, 64), float("nan"))]), *batch.args[1:])
    out, lse = attend(padded)
    assert torch.equal(out[:2], attend(batch)[0])
    assert (out[2:] == 0).all()
    assert lse[2:].isneginf().all()
    none = [batch.query[:0], *batch.args[1:3], batch.block_table[:0], batch.seq_lens[:0], batch.query_start_loc[:1]]
    assert ops.paged_attention(*none).shape == (0, 4, 64)


def test_more_queries_than_tokens(device: str, isa: str) -> None:
    """Queries before the first token see nothing."""
    batch = make_batch([3, 0], [5, 2], device=device)
    out, lse = attend(batch)
    check(batch, out, lse)
    assert lse[:2].isneginf().all()
    assert lse[5:].isneginf().all()


def test_outputs_are_written_in_place(device: str) -> None:
    """Into strided outputs, and nowhere else."""
    batch = make_batch([20, 70], [2, 30], device=device)
    want, want_lse = attend(batch)
    wide = torch.full((32, 6, 70), 7.0)
    out, lse = wide[:, 1:5, 3:67], torch.full((4, 32), 7.0).T
    got = ops.paged_attention(*batch.args, out=out, lse=lse)
    assert got[0] is out
    assert got[1] is lse
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    wide[:, 1:5, 3:67] = 7
    assert (wide == 7).all()


def test_strided_queries(device: str, isa: str) -> None:
    batch = make_batch([20, 70], [2, 30], dtype=torch.bfloat16, device=device)
    want, _ = attend(batch)
    fused = torch.randn(32, 3, 4, 67).to(torch.bfloat16)
    fused[:, 1, :, 2:66] = batch.query
    got = ops.paged_attention(fused[:, 1, :, 2:66], *batch.args[1:])
    assert torch.equal(got, want)


def test_negative_strides(device: str) -> None:
    """NumPy's flipped views: the block axis runs backwards, and in V the head axis too."""
    batch = make_batch([50, 70], [1, 33], device=device)
    arrays = [t.numpy() for t in batch.args]
    want = ops.paged_attention(*arrays)
    arrays[1] = np.ascontiguousarray(arrays[1][::-1])[::-1]
    arrays[2] = np.ascontiguousarray(arrays[2][::-1, ::-1])[::-1, ::-1]
    assert arrays[1].strides[0] < 0
    assert arrays[2].strides[0] < 0
    assert arrays[2].strides[1] < 0
    np.testing.assert_array_equal(ops.paged_attention(*arrays), want)


def test_numpy_equals_torch(device: str) -> None:
    for dtype in (torch.float32, torch.float16):
        batch = make_batch([50, 70], [1, 33], dtype=dtype, device=device)
        out, lse = ops.paged_attention(*(t.numpy() for t in batch.args), return_lse=True)
        want, want_lse = attend(batch)
        assert isinstance(out, np.ndarray)
        np.testing.assert_array_equal(out, want.numpy())
        np.testing.assert_array_equal(lse, want_lse.numpy())


class ArrayInterfaceOnly:
    """How an ml_dtypes bfloat16 array looks from outside: no buffer protocol, an array interface of two-byte voids."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.bits = tensor.contiguous().view(torch.int16).numpy()
        self.dtype = "bfloat16"
        self.shape = self.bits.shape

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {**self.bits.__array_interface__, "typestr": "<V2"}


def test_bfloat16_by_array_interface(device: str) -> None:
    batch = make_batch([50, 70], [1, 33], dtype=torch.bfloat16, device=device)
    want, _ = attend(batch)
    out = ArrayInterfaceOnly(torch.zeros_like(want))
    tensors = [ArrayInterfaceOnly(t) for t in batch.args[:3]]
    ops.paged_attention(*tensors, *(t.numpy() for t in batch.args[3:]), out=out)
    assert np.array_equal(out.bits, want.view(torch.int16).numpy())


def test_offsets_beyond_32_bits(device: str, isa: str) -> None:
    """A page whose element offset exceeds 2^32, in a sparse file: only the pages in use have memory."""
    num_blocks, block_size, heads, dim = 2_200_000, 16, 2, 64
    elements = num_blocks * heads * block_size * dim
    assert elements > 2**32
    with tempfile.TemporaryFile() as file:
        file.truncate(elements * 2)
        memory = mmap.mmap(file.fileno(), elements * 2)
    cache = torch.frombuffer(memory, dtype=torch.bfloat16).view(num_blocks, heads, block_size, dim)
    batch = make_batch([33], [3], dtype=torch.bfloat16, heads=(4, 2), device=device)
    far = torch.tensor([[num_blocks - 1, 1_100_001, 7]], dtype=torch.int32)
    for index in range(3):
        cache[far[0, index]] = batch.k_cache[batch.block_table[0, index]]
    got = ops.paged_attention(batch.query, cache, cache, far, *batch.args[4:])
    want = ops.paged_attention(batch.query, batch.k_cache, batch.k_cache, *batch.args[3:])
    assert torch.equal(got, want)
    key = torch.randn(2, heads, dim).to(torch.bfloat16)
    slots = torch.tensor([num_blocks * block_size - 1, 5])
    ops.reshape_and_cache(key, key, cache, cache, slots)
    assert torch.equal(cache[-1, :, -1], key[0])
    ops.copy_blocks(cache, torch.tensor([[num_blocks - 1, num_blocks - 2]], dtype=torch.int32))
    assert torch.equal(cache[-2, :, -1], key[0])


def test_instruction_sets_agree(device: str) -> None:
    batch = make_batch([333, 41], [1, 40], heads=(9, 3), device=device)
    before = _kernels.cpu_isa()
    results = []
    for name in ISAS:
        _kernels.select_cpu_isa(name)
        results.append(attend(batch)[0])
    _kernels.select_cpu_isa(before)
    for a, b in itertools.pairwise(results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ISAS)
def test_instruction_set_by_environment(name: str) -> None:
    code = "from pagedcore import _kernels; print(_kernels.cpu_isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PAGEDCORE_CPU_ISA": name},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == name


def test_bad_instruction_set_is_refused() -> None:
    code = "from pagedcore import _kernels; _kernels.cpu_isa()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PAGEDCORE_CPU_ISA": "avx9000"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "environment variable PAGEDCORE_CPU_ISA is 'avx9000' (hint: use one of scalar, avx2, " in done.stderr
    names = ", ".join(_kernels.cpu_isas())
    with pytest.raises(ValueError, match=rf"name: expected one that this machine runs \({names}\), got 'avx9000'"):
        _kernels.select_cpu_isa("avx9000")


def test_the_instruction_set_that_is_read_is_the_one_that_runs() -> None:
    """The kernels and `environment` read the variable by one rule: case and blanks do not matter to either."""
    code = "from pagedcore import _kernels, environment; print(_kernels.cpu_isa(), environment.CPU_ISA.read())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PAGEDCORE_CPU_ISA": " Scalar "},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["scalar", "scalar"]


@pytest.mark.skipif("avx512_bf16" in _kernels.cpu_isas(), reason="this machine runs every instruction set")
def test_an_instruction_set_that_cannot_run_is_refused() -> None:
    code = "from pagedcore import _kernels; _kernels.cpu_isa()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PAGEDCORE_CPU_ISA": "avx512_bf16"},
        capture_output=True,
        text=True,
        check=False,
    )
    names = ", ".join(_kernels.cpu_isas())
    assert f"PAGEDCORE_CPU_ISA: expected one that this machine runs ({names}), got 'avx512_bf16'" in done.stderr


def test_calls_from_many_threads(device: str) -> None:
    """Each caller has its own plan and scratch memory."""
    from concurrent.futures import ThreadPoolExecutor

    batches = [make_batch([100 + i, 3000], [1, 20 + i], heads=(9, 3), seed=i, device=device) for i in range(4)]
    wants = [attend(batch, split_size=0) for batch in batches]

    def run(i: int) -> None:
        for _ in range(20):
            for a, b in zip(attend(batches[i], split_size=0), wants[i], strict=True):
                assert torch.equal(a, b)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


@pytest.mark.parametrize(("query_len", "path"), [(1, "streaming"), (4, "packed"), (None, "streaming or packed")])
def test_explain(query_len: int | None, path: str) -> None:
    """4 queries of a group of 4 are 16 rows, which are packed."""
    batch = make_batch([20, 20], [4, 4], heads=(8, 2))
    told = ops.explain_attention(batch.query, batch.k_cache, batch.v_cache, num_seqs=2, max_query_len=query_len)
    assert told == f"{path} {_kernels.cpu_isa()}"

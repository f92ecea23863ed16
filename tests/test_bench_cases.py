"""What the benchmark of a GPU measures, without one: the bytes and operations of its cases, their tensors and oracle,
and its clocks.
"""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pagedcore.bench import attention_gpu, cases, timing
from pagedcore.bench.batch import Batch, fill, ours, relative_error
from pagedcore.bench.cases import FULL, LLAMA_8B, LLAMA_70B, MHA, MQA, TINY, Case, Grid, decode
from pagedcore.bench.harness import Session
from pagedcore.bench.timing import HostClock

CPU = torch.device("cpu")


# What a case counts --------------------------------------------------------------------------------------------------


def test_bytes_and_operations_of_decode() -> None:
    case = decode(LLAMA_8B, 2, 100)
    assert case.kv_bytes == 2 * 100 * 2 * 8 * 128 * 2 == 819_200  # sequences, tokens, K and V, heads, dim, bytes
    assert case.bytes == 819_200 + 2 * (2 * 32 * 128 * 2) == 851_968  # queries and output beside
    assert case.flops == 2 * (2 * 2 * 32 * 128 * 100) == 3_276_800  # two products, of 2 · dim each


def test_grouped_heads_share_bytes_and_not_operations() -> None:
    small, large = decode(LLAMA_8B, 4, 1024), decode(LLAMA_70B, 4, 1024)
    assert small.kv_bytes == large.kv_bytes
    assert 2 * small.flops == large.flops
    assert decode(MHA, 4, 1024).kv_bytes == 4 * small.kv_bytes == 32 * decode(MQA, 4, 1024).kv_bytes


@pytest.mark.parametrize(
    ("query_len", "seq_len", "pairs"), [(1, 7, 7), (3, 3, 6), (2, 5, 9), (4, 4, 10), (5, 130, 640)]
)
def test_a_causal_mask_counts_what_queries_see(query_len: int, seq_len: int, pairs: int) -> None:
    mask = torch.ones(query_len, seq_len).tril(seq_len - query_len)
    assert cases.visible_keys(query_len, seq_len) == pairs == int(mask.sum())


def test_operations_of_a_prompt_and_of_a_chunk() -> None:
    assert Case("prefill", LLAMA_8B, (3,), (3,)).flops == 4 * 32 * 128 * 6
    mixed = Case("mixed", LLAMA_8B, (1, 2), (10, 5))
    assert mixed.flops == 4 * 32 * 128 * (10 + 9)
    assert mixed.kv_bytes == 15 * 2 * 8 * 128 * 2


def test_codes_are_a_byte_and_a_tokens_scales_four_a_head() -> None:
    tokens = 3 * 64
    assert decode(LLAMA_8B, 3, 64, "fp8_e4m3").kv_bytes == tokens * 2 * 8 * 128
    assert decode(LLAMA_8B, 3, 64, "fp8_e4m3", "token").kv_bytes == tokens * 2 * 8 * (128 + 4)


@pytest.mark.parametrize("grid", [FULL, TINY])
def test_the_cases_cover_what_is_promised(grid: Grid) -> None:
    main, rest = cases.main_cases(grid), list(cases.decode_grid(grid))
    names = [case.name for case in main + rest]
    assert len(names) == len(set(names))
    decoded = {(c.heads, len(c.seq_lens), c.seq_lens[0]) for c in main + rest if c.kind == "decode"}
    shapes = (LLAMA_8B, LLAMA_70B, MHA, MQA)
    assert decoded >= {(heads, b, n) for heads in shapes for b in grid.batches for n in grid.contexts}
    assert [c.kind for c in main[:2]] == ["decode", "decode"]
    assert {c.kind for c in main} == {"decode", "prefill", "mixed"}
    assert any(c.query_lens[0] < c.seq_lens[0] and c.kind == "prefill" for c in main)  # a chunk
    assert {c.kind for c in cases.shown_to_slow_starters(grid)} == {"decode", "prefill"}


def test_the_full_grid_is_the_one_of_the_targets() -> None:
    assert (min(FULL.batches), max(FULL.batches)) == (1, 256)
    assert (min(FULL.contexts), max(FULL.contexts)) == (1024, 131_072)
    assert FULL.pool_bytes >= 96e9
    assert (LLAMA_8B, 1, 1024) in FULL.first
    assert (LLAMA_8B, 1, 16_384) in FULL.prompts


def test_a_quick_run_is_a_part_of_the_full_one() -> None:
    def names(grid: Grid) -> set[str]:
        return {case.name for case in [*cases.main_cases(grid), *cases.decode_grid(grid)]}

    assert len(names(cases.QUICK)) == 5
    assert names(cases.QUICK) < names(FULL)
    assert {case.kind for case in cases.main_cases(cases.QUICK)} == {"decode", "prefill", "mixed"}
    grids = {
        (quick, rehearse): Session(quick=quick, command="", rehearse=rehearse)
        for quick in (0, 1)
        for rehearse in (0, 1)
    }
    assert {key: attention_gpu.grid_of(session) for key, session in grids.items()} == {
        (0, 0): FULL,
        (1, 0): cases.QUICK,
        (0, 1): TINY,
        (1, 1): TINY,
    }


@pytest.mark.parametrize("l2", [0, 1000, 60 << 20])
def test_layers_in_turn_are_twice_the_cache(l2: int) -> None:
    for case in [decode(MQA, 1, 1024), decode(LLAMA_8B, 64, 8192)]:
        count = cases.num_buffers(case, l2)
        assert count >= 1
        assert count * case.kv_bytes >= 2 * l2
        assert count == 1 or (count - 1) * case.kv_bytes < 2 * l2


# The tensors of a case -----------------------------------------------------------------------------------------------


def test_block_tables_are_random_and_share_nothing() -> None:
    batch = Batch(Case("mixed", LLAMA_8B, (1, 4, 1), (50, 33, 16)), CPU, buffers=2)
    ids = [row[:count].tolist() for row, count in zip(batch.table, (4, 3, 1), strict=True)]
    assert sorted(itertools.chain(*ids)) == list(range(1, 9))  # every block but the first, once
    assert any(sorted(row) != row for row in (Batch(decode(MQA, 1, 160), CPU).table[0].tolist() for _ in range(5)))
    assert batch.starts.tolist() == [0, 1, 5, 6]
    assert batch.key_starts.tolist() == [0, 50, 83, 99]


def test_contiguous_copies_hold_what_the_pages_hold() -> None:
    batch = Batch(Case("mixed", MQA, (1, 4), (50, 33)), CPU, buffers=3)
    assert len(batch.packed) == 3
    for (k_cache, v_cache), (k, v) in zip(batch.caches, batch.packed, strict=True):
        at = 0
        for row, length in zip(batch.table.tolist(), (50, 33), strict=True):
            for p in range(length):
                assert torch.equal(k[at], k_cache[row[p // 16], :, p % 16])
                assert torch.equal(v[at], v_cache[row[p // 16], :, p % 16])
                at += 1
    assert not torch.equal(batch.packed[0][0], batch.packed[2][0])


@pytest.mark.parametrize(
    ("kv_format", "granularity"),
    [("auto", "tensor"), ("fp8_e4m3", "tensor"), ("fp8_e4m3", "head"), ("fp8_e4m3", "token")],
)
def test_the_oracle(kv_format: str, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch in float64 over the keys one by one; whatever number of queries it takes at once."""
    monkeypatch.setattr("pagedcore.bench.batch._SCORES", 32 * 33 * 3)
    case = Case("mixed", LLAMA_8B, (1, 7), (21, 33), kv_format=kv_format, granularity=granularity)
    batch = Batch(case, CPU, buffers=2)
    got, begin = batch.reference(1), 0
    for s, (count, length) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        places = [(int(batch.table[s, p // 16]), p % 16) for p in range(length)]
        rows = []
        for cache, scale in zip(batch.caches[1], batch.scales[1], strict=True):
            data = torch.stack([cache[block, :, offset].double() for block, offset in places], 1)  # [heads, keys, dim]
            if kv_format != "auto" and granularity == "token":
                data *= torch.stack([scale[block, :, offset] for block, offset in places], 1)[..., None]
            elif kv_format != "auto":
                data *= scale[:, None, None]
            rows.append(data.repeat_interleave(4, 0))
        query = batch.query[begin : begin + count].double().transpose(0, 1)
        mask = torch.ones(count, length).tril(length - count).bool()
        want = torch.nn.functional.scaled_dot_product_attention(query, *rows, attn_mask=mask).transpose(0, 1)
        assert relative_error(got[begin : begin + count], want.float()) < 1e-5
        begin += count
    assert batch.reference(1) is got


def test_codes_of_a_filled_cache_are_numbers() -> None:
    batch = Batch(decode(LLAMA_8B, 1, 40, "fp8_e4m3", "token"), CPU)
    k, v = batch.caches[0]
    assert k.float().isfinite().all()
    assert v.float().isfinite().all()
    fill(batch.kv)
    assert batch.scales[0][0].min() > 0
    assert attention_gpu.checked(lambda: ours(batch), batch, attention_gpu.GATE) is not None


# Timing --------------------------------------------------------------------------------------------------------------


def test_a_sample_is_long_enough_and_uses_all_layers_alike() -> None:
    assert timing.calls_of_sample(1, 1.0) == 1
    assert timing.calls_of_sample(7, 1e-3) == 7
    assert timing.calls_of_sample(3, 1e-5) == 42
    assert timing.calls_of_sample(300, 1e-9) % 300 == 0
    assert timing.calls_of_sample(300, 1e-9) <= 4096
    assert timing.calls_of_sample(5, 0.0) == 5


class Events:
    """torch's events, on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        assert self.time

    def elapsed_time(self, end: Events) -> float:
        return (end.time - self.time) * 1e3


@pytest.mark.parametrize("recorded", [True, False])
def test_a_device_is_timed_by_its_events(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording keeps alive what it reads; what cannot be recorded is launched, and says so."""

    class Recorder:
        def __init__(self, device: torch.device) -> None:
            pass

        def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            if not recorded:
                raise RuntimeError("operation not permitted when stream is capturing")
            work()
            return (lambda: time.sleep(0.02)), None

    monkeypatch.setattr(timing, "CudaRecorder", Recorder)
    monkeypatch.setattr(torch.cuda, "Event", Events)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls: list[int] = []

    class Memory:
        pass

    memory = Memory()
    kept = weakref.ref(memory)

    def call(layer: int, memory: Memory = memory) -> None:
        calls.append(layer)

    clock = timing.DeviceClock(CPU)
    sample = clock.sample(call, 2, 1e-4)
    del call, memory
    gc.collect()
    assert kept() is not None
    assert sample.calls == 4
    assert sample.recorded is recorded
    assert calls == ([0, 1, 0, 1] if recorded else [])
    seconds = clock.seconds(sample.run)
    assert (seconds >= 0.02) is recorded
    if not recorded:
        assert calls == [0, 1, 0, 1]


def test_times_are_of_one_call() -> None:
    sample = timing.Sample(lambda: time.sleep(0.01), 10, recorded=True, call=print)
    found = timing.time_samples(HostClock(), {"a": sample}, seconds=0.0, rounds=3)["a"]
    assert 0.001 <= found.p10 <= found.median <= found.p90
    assert found.median < 0.01

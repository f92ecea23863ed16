"""How the benchmark calls other libraries: stand-ins compute from what they are handed, so that a page, a length or a
scale handed over wrongly gives a wrong result. torch's own are called as they are, on the CPU.
"""

from __future__ import annotations

import itertools
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from pagedcore.bench import peers
from pagedcore.bench.batch import Batch, relative_error
from pagedcore.bench.cases import BLOCK_SIZE, LLAMA_8B, LLAMA_70B, MHA, MQA, Case, decode
from pagedcore.bench.peers import PEER_GATE, PEERS, CannotRun, Peer

CPU = torch.device("cpu")
DECODE = [decode(LLAMA_8B, 3, 50), decode(MQA, 2, 16), decode(MHA, 1, 33)]
PROMPTS = [Case("prefill", LLAMA_8B, (20, 20), (20, 20)), Case("prefill", LLAMA_70B, (40,), (40,))]
CHUNK = Case("prefill", LLAMA_8B, (7, 7), (50, 50))
MIXED = Case("mixed", LLAMA_8B, (1, 1, 20), (30, 17, 50))


def peer(name: str, kind: str) -> Peer:
    return next(one for one in PEERS if one.name == name and kind in one.kinds)


def require_right(name: str, case: Case, buffers: int = 2) -> Batch:
    batch = Batch(case, CPU, buffers=buffers)
    call = peer(name, case.kind).make(batch)
    for layer in range(buffers):
        got = call(layer).reshape(batch.query.shape)
        assert relative_error(got, batch.reference(layer)) < PEER_GATE, (name, case.name, layer)
    return batch


def attend(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> torch.Tensor:
    """[rows, heads, dim] over [keys, kv_heads, dim]: what the stand-ins compute."""
    mask = torch.ones(len(query), len(k)).tril(len(k) - len(query)).bool() if causal else None
    q, k, v = (tensor.float().transpose(0, 1)[None] for tensor in (query, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1).to(query.dtype)


# FlashInfer -----------------------------------------------------------------------------------------------------------


class FlashInfer(ModuleType):
    """Wrappers that keep what they were planned with, and attend by it."""

    def __init__(self) -> None:
        super().__init__("flashinfer")
        self.made: list[Any] = []
        outer = self

        class Wrapper:
            prefill = False

            def __init__(self, workspace: torch.Tensor, layout: str, **options: Any) -> None:
                assert workspace.dtype == torch.uint8
                assert not workspace.any()
                assert layout == "HND"
                self.options = options
                outer.made.append(self)

            def run(self, query: torch.Tensor, cache: tuple[Any, Any], *, out: torch.Tensor) -> torch.Tensor:
                plan = self.plan_made
                heads, kv_heads, dim, page_size = plan.shape
                assert query.shape[1:] == (heads, dim)
                begin = 0
                for s in range(len(plan.last)):
                    ids = plan.indices[plan.indptr[s] : plan.indptr[s + 1]].long()
                    length = (len(ids) - 1) * page_size + int(plan.last[s])
                    rows = int(plan.queries[s + 1] - plan.queries[s])
                    k, v = (
                        tensor[ids].transpose(1, 2).reshape(-1, kv_heads, dim)[:length] for tensor in cache
                    )  # pages are [head, token, dim]
                    part = query[begin : begin + rows]
                    out[begin : begin + rows] = attend(part, k, v, causal=plan.causal, scale=dim**-0.5)
                    begin += rows
                assert begin == len(query)
                return out

        class Decode(Wrapper):
            def plan(
                self,
                indptr: Any,
                indices: Any,
                last: Any,
                heads: int,
                kv_heads: int,
                dim: int,
                page: int,
                **options: Any,
            ) -> None:
                assert options == {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
                self.plan_made = SimpleNamespace(
                    indptr=indptr,
                    indices=indices,
                    last=last,
                    shape=(heads, kv_heads, dim, page),
                    queries=torch.arange(len(last) + 1),
                    causal=False,
                )

        class Prefill(Wrapper):
            def plan(
                self,
                queries: Any,
                indptr: Any,
                indices: Any,
                last: Any,
                heads: int,
                kv_heads: int,
                dim: int,
                page: int,
                *,
                causal: bool = False,
                **options: Any,
            ) -> None:
                assert options == {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
                self.plan_made = SimpleNamespace(
                    indptr=indptr,
                    indices=indices,
                    last=last,
                    shape=(heads, kv_heads, dim, page),
                    queries=queries,
                    causal=causal,
                )

        self.BatchDecodeWithPagedKVCacheWrapper = Decode
        self.BatchPrefillWithPagedKVCacheWrapper = Prefill
        self.decode = ModuleType("flashinfer.decode")
        self.decode.xqa_batch_decode_with_kv_cache = self.xqa  # type: ignore[attr-defined]

    def xqa(
        self,
        query: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        workspace: torch.Tensor,
        table: torch.Tensor,
        seq_lens: torch.Tensor,
        max_seq_len: int,
        *,
        bmm1_scale: float,
        bmm2_scale: float,
        out: torch.Tensor,
        kv_layout: str,
    ) -> torch.Tensor:
        assert isinstance(cache, tuple)
        assert seq_lens.dtype == torch.uint32
        assert table.dtype == torch.int32
        assert workspace.numel() > 8 << 20
        assert (bmm2_scale, kv_layout) == (1.0, "HND")
        lens = seq_lens.tolist()
        assert max_seq_len == max(lens)
        for s, length in enumerate(lens):
            ids = table[s, : -(-length // BLOCK_SIZE)].long()
            k, v = (tensor[ids].transpose(1, 2).flatten(0, 1)[:length] for tensor in cache)
            out[s : s + 1] = attend(query[s : s + 1], k, v, causal=False, scale=bmm1_scale)
        return out


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> FlashInfer:
    fake = FlashInfer()
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", fake.decode)
    monkeypatch.setattr(peers, "_WORKSPACE_BYTES", 16 << 20)
    return fake


def test_a_block_table_as_lists_of_pages() -> None:
    table = torch.tensor([[7, 3, 9], [5, 0, 0], [2, 8, 0]], dtype=torch.int32)
    pages = peers.page_lists(table, (33, 16, 17))
    assert pages.indptr.tolist() == [0, 3, 4, 6]
    assert pages.indices.tolist() == [7, 3, 9, 5, 2, 8]
    assert pages.last_page_len.tolist() == [1, 16, 1]
    assert {tensor.dtype for tensor in vars(pages).values()} == {torch.int32}


@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.name)
def test_flashinfer_decode(case: Case, flashinfer: FlashInfer) -> None:
    batch = require_right("flashinfer", case)
    (wrapper,) = flashinfer.made
    assert wrapper.options == {"use_tensor_cores": True}
    assert wrapper.plan_made.shape == (case.heads.query, case.heads.kv, case.heads.dim, BLOCK_SIZE)
    ids = [row[: -(-n // BLOCK_SIZE)].tolist() for row, n in zip(batch.table, case.seq_lens, strict=True)]
    assert wrapper.plan_made.indices.tolist() == list(itertools.chain(*ids))


@pytest.mark.parametrize("case", [*PROMPTS, CHUNK, MIXED], ids=lambda case: case.name)
@pytest.mark.parametrize(("name", "backend"), [("flashinfer", "fa2"), ("flashinfer-fa3", "fa3")])
def test_flashinfer_prefill(case: Case, name: str, backend: str, flashinfer: FlashInfer) -> None:
    require_right(name, case)
    assert [wrapper.options for wrapper in flashinfer.made] == [{"backend": backend}]


@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.name)
def test_flashinfer_xqa(case: Case, flashinfer: FlashInfer) -> None:
    require_right("flashinfer-xqa", case)


# Contiguous -----------------------------------------------------------------------------------------------------------


class Fa3(ModuleType):
    """FlashAttention-3's three ways in."""

    def __init__(self) -> None:
        super().__init__("fa3_fwd_interface")
        self.called: list[str] = []

    def flash_attn_func(self, q: Any, k: Any, v: Any, *, causal: bool) -> torch.Tensor:
        self.called.append("func")
        rows = [attend(*one, causal=causal, scale=1 / math.sqrt(q.shape[-1])) for one in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def flash_attn_with_kvcache(
        self, q: Any, k: Any, v: Any, *, cache_seqlens: Any, causal: bool, num_splits: int
    ) -> torch.Tensor:
        assert num_splits == 0
        assert cache_seqlens.tolist() == [k.shape[1]] * len(k)
        result = self.flash_attn_func(q, k, v, causal=causal)
        self.called[-1] = "kvcache"
        return result

    def flash_attn_varlen_func(
        self, q: Any, k: Any, v: Any, starts: Any, key_starts: Any, max_q: int, max_k: int, *, causal: bool
    ) -> tuple[torch.Tensor, None]:
        self.called.append("varlen")
        return varlen_attn(q, k, v, starts, key_starts, max_q, max_k, window_size=(-1, 0), enable_gqa=causal), None


def varlen_attn(
    q: Any,
    k: Any,
    v: Any,
    starts: Any,
    key_starts: Any,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As torch has it now."""
    assert max_q == int(starts.diff().max())
    assert max_k == int(key_starts.diff().max())
    assert enable_gqa
    parts = zip(starts[:-1], starts[1:], key_starts[:-1], key_starts[1:], strict=True)
    return torch.cat(
        [
            attend(q[a:b], k[c:d], v[c:d], causal=window_size == (-1, 0), scale=q.shape[-1] ** -0.5)
            for a, b, c, d in parts
        ]
    )


def old_varlen_attn(
    q: Any, k: Any, v: Any, starts: Any, key_starts: Any, max_q: int, max_k: int, is_causal: bool = False
) -> torch.Tensor:
    """As torch had it first."""
    window = (-1, 0) if is_causal else (-1, -1)
    return varlen_attn(q, k, v, starts, key_starts, max_q, max_k, window_size=window, enable_gqa=True)


@pytest.mark.parametrize(
    ("case", "way"),
    [(DECODE[0], "kvcache"), (PROMPTS[0], "func"), (CHUNK, "func"), (MIXED, "varlen")],
    ids=lambda value: getattr(value, "name", value),
)
def test_flash_attention_3(case: Case, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fa3()
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", fake)
    require_right("fa3 (contiguous)", case)
    assert set(fake.called) == {way}


@pytest.mark.parametrize("attention", [varlen_attn, old_varlen_attn])
@pytest.mark.parametrize("case", [DECODE[0], PROMPTS[0], MIXED], ids=lambda case: case.name)
def test_varlen(case: Case, attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("torch.nn.attention.varlen")
    fake.varlen_attn = attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", fake)
    require_right("varlen (contiguous)", case)


@pytest.mark.parametrize("case", [*DECODE, *PROMPTS, CHUNK], ids=lambda case: case.name)
def test_sdpa(case: Case) -> None:
    require_right("sdpa (contiguous)", case)


LONG = [decode(LLAMA_8B, 2, 128), decode(LLAMA_8B, 2, 300), decode(MQA, 3, 129)]
LONG += [Case("prefill", MQA, (300,), (300,)), Case("prefill", MQA, (128, 128), (128, 128))]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # compiled, it takes a minute
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_flex(case: Case) -> None:
    require_right("flex", case)


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_flex_is_told_which_pages_to_read(case: Case) -> None:
    """Compiled, it reads these pages alone, and asks the mask only on those that are not full."""
    batch = Batch(case, CPU)
    (_,), mask = peers.flex_arguments(batch)
    count, length, size = case.query_lens[0], case.seq_lens[0], peers.FLEX_PAGE
    for s in range(len(case.seq_lens)):
        owned = {int(page) for page in mask.full_kv_indices[s, 0, 0, : -(-length // size)]}
        assert len(owned) == -(-length // size)
        for tile in range(-(-count // size)):
            first, last = length - count + tile * size, min(length - count + tile * size + size, length) - 1
            full = mask.full_kv_indices[s, 0, tile, : mask.full_kv_num_blocks[s, 0, tile]].tolist()
            some = mask.kv_indices[s, 0, tile, : mask.kv_num_blocks[s, 0, tile]].tolist()
            assert len(full) == (first + 1) // size
            assert len(full) + len(some) == last // size + 1
            assert len({*full, *some}) == len(full) + len(some)
            assert {*full, *some} <= owned


# What cannot run ------------------------------------------------------------------------------------------------------


def test_an_absent_library_says_so() -> None:
    with pytest.raises(CannotRun, match="cannot be imported: ModuleNotFoundError: No module named 'nothing_like_it'"):
        peers.library("nothing_like_it")


def test_a_library_that_fails_to_import_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "broken_library.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CannotRun, match=r"cannot be imported: OSError: libcudart\.so\.12"):
        peers.library("broken_library")


@pytest.mark.parametrize(("name", "case"), [("sdpa (contiguous)", MIXED), ("flex", MIXED), ("flex", CHUNK)])
def test_what_takes_equal_lengths_says_so(name: str, case: Case) -> None:
    one = next(peer for peer in PEERS if peer.name == name)
    with pytest.raises(CannotRun, match="equal lengths"):
        one.make(Batch(case, CPU))


def test_contiguous_copies_need_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(DECODE[0], CPU)
    monkeypatch.setattr(batch, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    with pytest.raises(CannotRun, match="no memory for contiguous copies"):
        peers.sdpa(batch)


def test_every_kind_has_a_paged_peer_and_a_contiguous_one() -> None:
    for kind in ("decode", "prefill", "mixed"):
        assert {one.paged for one in PEERS if kind in one.kinds} == {True, False}
        names = [one.name for one in PEERS if kind in one.kinds]
        assert len(names) == len(set(names))

"""Other libraries' attention on a GPU, in the shape that the benchmark calls: over layer i of a `Batch`.

Each is imported when it is first asked for. One that is absent, does not take a case, fails or is wrong says so by
`CannotRun`, and is named with the reason; it is never left out in silence.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

from pagedcore.bench.cases import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagedcore.bench.batch import Batch

    Call = Callable[[int], torch.Tensor]

#: ‖out − oracle‖ / ‖oracle‖ of others, which may round once more than ours.
PEER_GATE = 1e-2
_WORKSPACE_BYTES = 256 << 20
#: flex_attention's blocks, which its pages must be: ours of 16 tokens are too small for its tiles.
FLEX_PAGE = 128


class CannotRun(Exception):  # noqa: N818  # an answer, not a fault
    """Why a peer is not measured in a case."""


@dataclass(frozen=True)
class Peer:
    """Attention of another library.

    ``make`` prepares a batch (plans, copies) and returns what is timed: attention over layer i, as a tensor of the
    query's elements in its order. ``paged``: it reads pages in a block table's order, as ours does; the others read
    contiguous copies, which a server with pages does not have. ``job``: it compiles kernels when it is first called,
    which this background job does before (`pagedcore.bench.compiling`); ``job_per_heads``: others for each shape of
    heads. ``slow_start``: it compiles anew for each shape, and runs in a few cases alone.
    """

    name: str
    kinds: tuple[str, ...]
    paged: bool
    make: Callable[[Batch], Call]
    job: str | None = None
    job_per_heads: bool = False
    slow_start: bool = False


@dataclass(frozen=True)
class PageLists:
    """A block table as FlashInfer takes it, on the host but for the ids."""

    indptr: torch.Tensor  # int32 [num_seqs + 1]: where a sequence's pages begin in indices
    indices: torch.Tensor  # int32 [pages of all]: their ids
    last_page_len: torch.Tensor  # int32 [num_seqs]: tokens in a sequence's last page, 1 to the size of one


def page_lists(table: torch.Tensor, seq_lens: tuple[int, ...]) -> PageLists:
    """The first pages of every row of a block table, as many as its sequence has."""
    counts = [-(-n // BLOCK_SIZE) for n in seq_lens]
    return PageLists(
        torch.tensor([0, *counts]).cumsum(0).int(),
        torch.cat([row[:count] for row, count in zip(table, counts, strict=True)]),
        torch.tensor([n - (count - 1) * BLOCK_SIZE for n, count in zip(seq_lens, counts, strict=True)]).int(),
    )


def library(name: str) -> Any:
    """A module of another library. Raises CannotRun where it is not to be had."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # what an import of another's code may raise is anything
        raise CannotRun(f"cannot be imported: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """What went wrong in a line: the first of the message, and the first below it that speaks of an error, which is
    where compilers say it.
    """
    first, *rest = str(error).strip().splitlines() or [""]
    found = next((line.strip() for line in rest if "error" in line.lower()), "")
    return ": ".join(part[:160] for part in (type(error).__name__, first, found) if part)


def _workspace(batch: Batch) -> torch.Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=batch.device)


def flashinfer_decode(batch: Batch) -> Call:
    """`BatchDecodeWithPagedKVCacheWrapper` on tensor cores, its plan for exactly these lengths."""
    flashinfer = library("flashinfer")
    heads = batch.case.heads
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(batch), "HND", use_tensor_cores=True)
    pages = page_lists(batch.table, batch.case.seq_lens)
    wrapper.plan(
        pages.indptr,
        pages.indices,
        pages.last_page_len,
        heads.query,
        heads.kv,
        heads.dim,
        BLOCK_SIZE,
        q_data_type=batch.dtype,
        kv_data_type=batch.dtype,
    )
    return _run_wrapper(wrapper, batch)


def flashinfer_prefill(backend: str) -> Callable[[Batch], Call]:
    """`BatchPrefillWithPagedKVCacheWrapper` with one of its backends, for any lengths."""

    def make(batch: Batch) -> Call:
        flashinfer = library("flashinfer")
        heads = batch.case.heads
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(batch), "HND", backend=backend)
        pages = page_lists(batch.table, batch.case.seq_lens)
        wrapper.plan(
            batch.starts.cpu(),
            pages.indptr,
            pages.indices,
            pages.last_page_len,
            heads.query,
            heads.kv,
            heads.dim,
            BLOCK_SIZE,
            causal=True,
            q_data_type=batch.dtype,
            kv_data_type=batch.dtype,
        )
        return _run_wrapper(wrapper, batch)

    return make


def _run_wrapper(wrapper: Any, batch: Batch) -> Call:
    out = torch.empty_like(batch.query)

    def call(layer: int) -> torch.Tensor:
        wrapper.run(batch.query, batch.caches[layer], out=out)
        return out

    return call


def flashinfer_xqa(batch: Batch) -> Call:
    """FlashInfer's build of XQA, which takes our block table as it is."""
    decode = library("flashinfer.decode")
    workspace, out = _workspace(batch), torch.empty_like(batch.query)
    seq_lens = batch.seq_lens.view(torch.uint32)

    def call(layer: int) -> torch.Tensor:
        decode.xqa_batch_decode_with_kv_cache(
            batch.query,
            batch.caches[layer],
            workspace,
            batch.table,
            seq_lens,
            max(batch.case.seq_lens),
            bmm1_scale=batch.case.heads.dim**-0.5,
            bmm2_scale=1.0,
            out=out,
            kv_layout="HND",
        )
        return out

    return call


def _contiguous(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if batch.device.type == "cuda":
        free = torch.cuda.mem_get_info(batch.device)[0]
        need = batch.case.kv_bytes * len(batch.caches)
        if "packed" not in vars(batch) and need > free * 0.9:
            raise CannotRun("no memory for contiguous copies")
    return batch.packed


def _in_rows(batch: Batch, packed: torch.Tensor) -> torch.Tensor:
    """``[num_seqs, seq_len, num_kv_heads, head_dim]`` of sequences that are alike."""
    if not batch.case.alike:
        raise CannotRun("takes sequences of equal lengths")
    return packed.view(len(batch.case.seq_lens), batch.case.seq_lens[0], *packed.shape[1:])


def flash_attention_3(batch: Batch) -> Call:
    """FlashAttention-3's forward pass over contiguous K and V; for decode it chooses its splits itself."""
    fa3 = library("fa3_fwd_interface")
    packed, case = _contiguous(batch), batch.case
    if not case.alike:

        def varlen(layer: int) -> torch.Tensor:
            k, v = packed[layer]
            lens = (batch.starts, batch.key_starts, batch.max_query_len, max(case.seq_lens))
            return _output(fa3.flash_attn_varlen_func(batch.query, k, v, *lens, causal=True))

        return varlen
    layers = [(_in_rows(batch, k), _in_rows(batch, v)) for k, v in packed]
    query = batch.query.view(len(case.seq_lens), -1, *batch.query.shape[1:])

    def call(layer: int) -> torch.Tensor:
        k, v = layers[layer]
        if case.kind == "decode":
            return _output(
                fa3.flash_attn_with_kvcache(query, k, v, cache_seqlens=batch.seq_lens, causal=True, num_splits=0)
            )
        return _output(fa3.flash_attn_func(query, k, v, causal=True))

    return call


def _output(result: Any) -> torch.Tensor:
    """Versions differ in whether the LSE comes with the output."""
    return result[0] if isinstance(result, tuple) else result


def sdpa(batch: Batch) -> Call:
    """The `scaled_dot_product_attention` of torch over contiguous K and V. For decode the heads of a group are its
    query rows, so that it reads K and V once.
    """
    layers = [
        tuple(_in_rows(batch, tensor).transpose(1, 2) for tensor in pair) for pair in _contiguous(batch)
    ]  # [num_seqs, num_kv_heads, seq_len, head_dim]
    case, heads = batch.case, batch.case.heads
    count, length = case.query_lens[0], case.seq_lens[0]
    if count == 1:
        query = batch.query.view(-1, heads.kv, heads.group, heads.dim)

        def decode(layer: int) -> torch.Tensor:
            return F.scaled_dot_product_attention(query, *layers[layer])

        return decode
    query = batch.query.view(-1, count, heads.query, heads.dim).transpose(1, 2)
    mask = None
    if count != length:
        mask = library("torch.nn.attention.bias").causal_lower_right(count, length)

    def prefill(layer: int) -> torch.Tensor:
        k, v = layers[layer]
        out = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(1, 2)

    return prefill


def varlen(batch: Batch) -> Call:
    """The `varlen_attn` of torch over contiguous K and V."""
    attend = library("torch.nn.attention.varlen").varlen_attn
    takes = inspect.signature(attend).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if "enable_gqa" in takes:
        options["enable_gqa"] = True
    packed = _contiguous(batch)
    lens = (batch.starts, batch.key_starts, batch.max_query_len, max(batch.case.seq_lens))

    def call(layer: int) -> torch.Tensor:
        return _output(attend(batch.query, *packed[layer], *lens, **options))

    return call


def flex(batch: Batch) -> Call:
    """The `flex_attention` of torch, compiled, over pages of its own size in random order."""
    attend = library("torch.nn.attention.flex_attention").flex_attention
    layers, mask = flex_arguments(batch)
    compiled = torch.compile(attend, dynamic=False) if batch.device.type == "cuda" else attend
    count = batch.case.query_lens[0]
    query = batch.query.view(-1, count, *batch.query.shape[1:]).transpose(1, 2)

    def call(layer: int) -> torch.Tensor:
        k, v = layers[layer]
        return compiled(query, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return call


def flex_arguments(batch: Batch) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Any]:
    """K and V of each layer as one long sequence of pages ``[1, num_kv_heads, pages * FLEX_PAGE, head_dim]``, and the
    mask that says which pages are whose.
    """
    case = batch.case
    count, length = case.query_lens[0], case.seq_lens[0]
    if not case.alike or count not in (1, length):
        raise CannotRun("is set up for decode and whole prompts of equal lengths alone")
    num_seqs, pages = len(case.seq_lens), -(-length // FLEX_PAGE)
    place = torch.randperm(num_seqs * pages, device=batch.device).view(num_seqs, pages)
    logical = torch.full((num_seqs, num_seqs * pages), -1, device=batch.device)
    logical.scatter_(1, place, torch.arange(pages, device=batch.device).expand(num_seqs, -1))

    def lay_out(packed: torch.Tensor) -> torch.Tensor:
        rows = F.pad(_in_rows(batch, packed), (0, 0, 0, 0, 0, pages * FLEX_PAGE - length))
        paged = torch.empty_like(rows).view(num_seqs * pages, FLEX_PAGE, *packed.shape[1:])
        paged[place.flatten()] = rows.reshape(paged.shape)
        return paged.flatten(0, 1).transpose(0, 1)[None].contiguous()

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        page = logical[b, kv // FLEX_PAGE]
        return (page >= 0) & (page * FLEX_PAGE + kv % FLEX_PAGE <= length - count + q)

    # Tiles of queries: the pages that all of their rows see in full come first, then the one on the diagonal.
    tiles = -(-count // FLEX_PAGE)
    first_row = torch.arange(tiles, device=batch.device) * FLEX_PAGE + length - count
    last_row = (first_row + FLEX_PAGE - 1).clamp(max=length - 1)
    full = (first_row + 1) // FLEX_PAGE
    some = last_row // FLEX_PAGE + 1 - full
    ids = torch.full((num_seqs, 1, tiles, num_seqs * pages), 0, dtype=torch.int32, device=batch.device)
    ids[..., :pages] = place[:, None, None].int()
    after = torch.arange(num_seqs * pages, device=batch.device) + full[:, None]
    partial_ids = ids.gather(-1, after.clamp(max=num_seqs * pages - 1).expand_as(ids))

    def counts(each: torch.Tensor) -> torch.Tensor:
        return each.int().expand(num_seqs, 1, tiles).contiguous()

    mask = library("torch.nn.attention.flex_attention").BlockMask.from_kv_blocks(
        counts(some),
        partial_ids,
        counts(full),
        ids,
        BLOCK_SIZE=FLEX_PAGE,
        mask_mod=sees,
        seq_lengths=(count, num_seqs * pages * FLEX_PAGE),
    )
    return [(lay_out(k), lay_out(v)) for k, v in _contiguous(batch)], mask


PEERS = (
    Peer("flashinfer", ("decode",), paged=True, make=flashinfer_decode, job="flashinfer"),
    Peer("flashinfer", ("prefill", "mixed"), paged=True, make=flashinfer_prefill("fa2"), job="flashinfer"),
    Peer("flashinfer-fa3", ("prefill", "mixed"), paged=True, make=flashinfer_prefill("fa3"), job="flashinfer-fa3"),
    Peer("flashinfer-xqa", ("decode",), paged=True, make=flashinfer_xqa, job="flashinfer-xqa", job_per_heads=True),
    Peer("flex", ("decode", "prefill"), paged=True, make=flex, slow_start=True),
    Peer("fa3 (contiguous)", ("decode", "prefill", "mixed"), paged=False, make=flash_attention_3),
    Peer("sdpa (contiguous)", ("decode", "prefill"), paged=False, make=sdpa),
    Peer("varlen (contiguous)", ("decode", "prefill", "mixed"), paged=False, make=varlen),
)

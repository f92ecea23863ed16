"""The tensors of a case: layers of random K and V in random blocks, and what attention over them must give."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from pagedcore import ops
from pagedcore.bench.cases import BLOCK_SIZE
from pagedcore.layout import FP8, KVCache, KVCacheLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagedcore.bench.cases import Case

_CHUNK = 1 << 26  # elements drawn at once
_SCORES = 1 << 27  # scores that the oracle holds at once
#: ‖a − b‖ / ‖b‖ at most, of two ways to attend in one dtype: each rounds where it does.
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


class Batch:
    """One case on one device.

    ``caches[i]`` is (K, V) of layer i, each ``[num_blocks, num_kv_heads, block_size, head_dim]``, for as many layers as
    are read in turn; all share the block table. ``query`` ``[tokens, heads, head_dim]``. Block 0 is no sequence's.
    """

    def __init__(self, case: Case, device: torch.device, *, buffers: int = 1, kv: KVCache | None = None) -> None:
        """`kv` is memory that is there already and filled, with blocks enough; else layers are made one after another,
        as most servers keep them.
        """
        self.case = case
        self.device = device
        heads = case.heads
        blocks = [-(-n // BLOCK_SIZE) for n in case.seq_lens]
        if kv is None:
            kv = new_cache(case, sum(blocks) + 1, buffers, device)
            fill(kv)
        self.kv = kv
        layers = range(kv.layout.num_layers)
        self.caches: list[tuple[Any, Any]] = [kv.layer(i) for i in layers]
        self.scales: list[tuple[Any, Any]] = [kv.scales(i) for i in layers]
        order = torch.randperm(kv.layout.num_blocks - 1, device=device)[: sum(blocks)].int() + 1
        self.table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32, device=device)
        for row, ids in zip(self.table, order.split(blocks), strict=True):
            row[: len(ids)] = ids
        self.seq_lens = torch.tensor(case.seq_lens, dtype=torch.int32, device=device)
        self.starts = _cumulative(case.query_lens, device)
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.query = torch.randn(case.tokens, heads.query, heads.dim, device=device).to(self.dtype)
        self._references: dict[int, torch.Tensor] = {}

    @property
    def max_query_len(self) -> int:
        """Of any sequence."""
        return max(self.case.query_lens)

    @cached_property
    def key_starts(self) -> torch.Tensor:
        """int32 ``[num_seqs + 1]``: where a sequence's keys begin among those of all."""
        return _cumulative(self.case.seq_lens, self.device)

    @cached_property
    def packed(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(K, V) of every layer without pages, each ``[sum of seq_lens, num_kv_heads, head_dim]``: a copy."""
        blocks, offsets = self._slots(range(len(self.case.seq_lens)))
        return [(k[blocks, :, offsets], v[blocks, :, offsets]) for k, v in self.caches]

    def _slots(self, sequences: range) -> tuple[torch.Tensor, torch.Tensor]:
        """(block, offset) of every token of some sequences, one after another."""
        lens = [self.case.seq_lens[s] for s in sequences]
        position = torch.cat([torch.arange(n, device=self.device) for n in lens])
        row = torch.repeat_interleave(
            torch.tensor(list(sequences), device=self.device), torch.tensor(lens, device=self.device)
        )
        return self.table[row, position // BLOCK_SIZE].long(), position % BLOCK_SIZE

    def reference(self, layer: int) -> torch.Tensor:
        """The oracle: attention in float32 over the keys of one layer, a sequence at a time. Computed once."""
        if layer not in self._references:
            self._references[layer] = self._reference(layer)
        return self._references[layer]

    def _reference(self, layer: int) -> torch.Tensor:
        out = torch.empty_like(self.query, dtype=torch.float32)
        begin = 0
        for s, count in enumerate(self.case.query_lens):
            where = self._slots(range(s, s + 1))
            k, v = (
                _rows(cache, scale, where) for cache, scale in zip(self.caches[layer], self.scales[layer], strict=True)
            )
            out[begin : begin + count] = _attend(self.query[begin : begin + count].float(), k, v)
            begin += count
        return out


def new_cache(case: Case, num_blocks: int, layers: int, device: torch.device) -> KVCache:
    """Memory for layers of the case's format, one after another."""
    layout = KVCacheLayout(
        num_blocks,
        BLOCK_SIZE,
        layers,
        case.heads.kv,
        case.heads.dim,
        case.dtype,
        kv_format=case.kv_format,
        scale_granularity=case.granularity,
        order="layer",
    )
    return layout.allocate(str(device), library="torch")


def fill(kv: KVCache) -> None:
    """N(0, 1) everywhere; of a cache of codes, finite codes with scales that differ."""
    data = kv.data.view(-1)
    quantized = kv.layout.kv_format == FP8
    data = data.view(torch.float8_e4m3fn if quantized else getattr(torch, kv.layout.dtype))
    for part in data.split(_CHUNK):
        part.copy_(torch.randn(part.shape, device=part.device).to(part.dtype))
    for i in range(kv.layout.num_layers if quantized else 0):
        for scale in kv.scales(i):
            scale.uniform_(0.5, 2)


def fill_by_pattern(data: torch.Tensor) -> None:
    """N(0, 1), a short pattern repeated: to draw a gigabyte of random numbers takes a CPU longer than a benchmark."""
    pattern = torch.randn(1 << 18).to(data.dtype)
    for part in data.split(pattern.numel()):
        part.copy_(pattern[: part.numel()])


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖; NaN where one is in got."""
    return float((got.float() - want.float()).norm() / want.float().norm())


def ours(batch: Batch, split_size: int | None = None) -> Callable[[int], Any]:
    """`paged_attention` over one layer after another, with the plan that they share made before."""
    case = batch.case
    plan = make_plan(batch, split_size)()
    size = ops.attention_workspace_size(
        case.tokens,
        len(case.seq_lens),
        case.heads.query,
        case.heads.kv,
        case.heads.dim,
        max_query_len=batch.max_query_len,
        split_size=split_size,
        dtype=case.dtype,
        device=batch.device,
    )
    workspace = torch.empty(size, dtype=torch.uint8, device=batch.device)
    out = torch.empty_like(batch.query)

    def call(layer: int) -> Any:
        k_cache, v_cache = batch.caches[layer]
        k_scale, v_scale = batch.scales[layer]
        return ops.paged_attention(
            batch.query,
            k_cache,
            v_cache,
            batch.table,
            batch.seq_lens,
            batch.starts,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
            max_query_len=batch.max_query_len,
            split_size=split_size,
            plan=plan,
            workspace=workspace,
        )

    return call


def make_plan(batch: Batch, split_size: int | None = None) -> Callable[[], Any]:
    """`plan_attention` of a step: what it returns, into the same memory each time."""
    case = batch.case
    kept: list[Any] = [None]

    def call() -> Any:
        kept[0] = ops.plan_attention(
            batch.seq_lens,
            batch.starts,
            num_heads=case.heads.query,
            num_kv_heads=case.heads.kv,
            head_dim=case.heads.dim,
            max_query_len=batch.max_query_len,
            num_tokens=case.tokens,
            split_size=split_size,
            dtype=case.dtype,
            out=kept[0],
        )
        return kept[0]

    return call


def _cumulative(lens: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lens], device=device).cumsum(0).int()


def _rows(cache: torch.Tensor, scale: torch.Tensor | None, where: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rows of a cache as float32 ``[tokens, num_kv_heads, head_dim]``, what codes stand for."""
    blocks, offsets = where
    if scale is None:
        return cache[blocks, :, offsets].float()
    codes = cache.view(torch.uint8)[blocks, :, offsets].view(cache.dtype).float()  # codes are not indexed everywhere
    return codes * (scale[blocks, :, offsets][..., None] if scale.ndim == 3 else scale[:, None])


def _attend(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """float32 attention of a sequence's last queries ``[count, heads, dim]``, causal, some queries at a time."""
    count, heads, dim = query.shape
    length, kv_heads = k.shape[:2]
    keys, values = k.permute(1, 2, 0), v.transpose(0, 1)  # [kv_heads, dim, length], [kv_heads, length, dim]
    positions = torch.arange(length, device=query.device)
    parts = []
    for begin in range(0, count, max(1, _SCORES // (heads * length))):
        rows = query[begin : begin + max(1, _SCORES // (heads * length))]
        grouped = rows.view(len(rows), kv_heads, -1, dim).permute(1, 0, 2, 3)  # [kv_heads, rows, group, dim]
        scores = grouped.flatten(1, 2) @ keys * dim**-0.5
        last = length - count + begin + torch.arange(len(rows), device=query.device)
        hidden = (positions > last[:, None]).repeat_interleave(heads // kv_heads, 0)
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        part = (weights @ values).view(kv_heads, len(rows), -1, v.shape[-1])
        parts.append(part.permute(1, 0, 2, 3).reshape(len(rows), heads, -1))
    return torch.cat(parts)

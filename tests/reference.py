"""The oracle of the kernel tests: attention in float64, written the plain way over NumPy; and batches to feed it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def paged_attention(
    query: np.ndarray,  # [num_tokens, num_heads, head_dim]
    k_cache: np.ndarray,  # [num_blocks, num_kv_heads, block_size, head_dim]
    v_cache: np.ndarray,  # [num_blocks, num_kv_heads, block_size, v_head_dim]
    block_table: np.ndarray,  # [rows, max_blocks]
    seq_lens: np.ndarray,  # [num_seqs]
    query_start_loc: np.ndarray,  # [num_seqs + 1]
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    block_table_rows: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(out [num_tokens, num_heads, v_head_dim], lse [num_tokens, num_heads]), float64. Reads only what a query sees."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros((num_tokens, num_heads, v_cache.shape[3]))
    lse = np.full((num_tokens, num_heads), -np.inf)
    for seq, seq_len in enumerate(int(n) for n in seq_lens):
        start, stop = int(query_start_loc[seq]), int(query_start_loc[seq + 1])
        row = seq if block_table_rows is None else int(block_table_rows[seq])
        positions = np.arange(seq_len - (stop - start), seq_len)  # of the queries
        first = np.maximum(0, positions - window + 1) if window else np.zeros_like(positions)
        last = positions if causal else np.full_like(positions, seq_len - 1)
        if seq_len == 0 or len(positions) == 0:
            continue
        keys = np.arange(first.min(), last.max() + 1)
        blocks, slots = block_table[row, keys // block_size], keys % block_size
        visible = (keys >= first[:, None]) & (keys <= last[:, None])  # [queries, keys]
        seen = visible.any(1)
        for head in range(num_heads):
            k = k_cache[blocks, head // group, slots].astype(np.float64)  # [keys, head_dim]
            v = v_cache[blocks, head // group, slots].astype(np.float64)
            scores = np.where(visible, query[start:stop, head].astype(np.float64) @ k.T * scale, -np.inf)
            top = np.where(seen, scores.max(1), 0.0)
            weights = np.exp(scores - top[:, None])
            total = weights.sum(1)
            out[start:stop, head] = weights @ v / np.where(seen, total, 1.0)[:, None]
            lse[start:stop, head] = np.where(seen, top + np.log(np.where(seen, total, 1.0)), -np.inf)
    return out, lse


GARBAGE = -(2**31)  # table entries that must not be read


@dataclass
class Batch:
    """Arguments of one attention call. Unwritten slots hold NaN; table entries that are not needed hold GARBAGE."""

    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor

    @property
    def args(self) -> tuple[torch.Tensor, ...]:
        return (self.query, self.k_cache, self.v_cache, self.block_table, self.seq_lens, self.query_start_loc)

    def expected(self, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        floats = [t.double().cpu().numpy() for t in (self.query, self.k_cache, self.v_cache)]
        return paged_attention(*floats, *(t.cpu().numpy() for t in self.args[3:]), **options)


def empty_cache(
    order: str, num_blocks: int, num_kv_heads: int, block_size: int, dim: int, dtype: torch.dtype, device: str
) -> torch.Tensor:
    """[num_blocks, num_kv_heads, block_size, dim], NaN, with the strides that `order` names."""
    nan = float("nan")
    if order == "HND":
        return torch.full((num_blocks, num_kv_heads, block_size, dim), nan, dtype=dtype, device=device)
    if order == "NHD":
        return torch.full((num_blocks, block_size, num_kv_heads, dim), nan, dtype=dtype, device=device).transpose(1, 2)
    if order == "strided":  # odd strides on every axis, and memory between the rows
        return torch.full((num_blocks, num_kv_heads + 1, block_size + 2, dim + 3), nan, dtype=dtype, device=device)[
            :, 1:, 1:-1, 2:-1
        ]
    if order == "heads first":
        return torch.full((num_kv_heads, num_blocks, block_size, dim), nan, dtype=dtype, device=device).transpose(0, 1)
    raise ValueError(order)


def make_batch(
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    v_head_dim: int | None = None,
    block_size: int = 16,
    order: str = "HND",
    window: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Batch:
    """Random N(0, 1) data in scattered pages; with `window`, blocks that left it are freed (GARBAGE in the table)."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    counts = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(counts) + 3
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    k_cache = empty_cache(order, num_blocks, num_kv_heads, block_size, head_dim, dtype, device)
    v_cache = empty_cache(order, num_blocks, num_kv_heads, block_size, v_head_dim, dtype, device)
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    table = torch.full((len(seq_lens), max([1, *counts]) + 2), GARBAGE, dtype=torch.int32)
    for seq, (length, count, query_len) in enumerate(zip(seq_lens, counts, query_lens, strict=True)):
        first = max(0, length - query_len - window + 1) if window else 0
        for index in range(first // block_size, count):
            table[seq, index] = free.pop()
        positions = torch.arange(first, length)
        if len(positions):
            blocks, slots = table[seq, positions // block_size].long(), positions % block_size
            # Advanced indices around a slice: the result is [tokens, num_kv_heads, dim].
            k_cache[blocks, :, slots] = (
                torch.randn(len(positions), num_kv_heads, head_dim, generator=generator).to(dtype).to(device)
            )
            v_cache[blocks, :, slots] = (
                torch.randn(len(positions), num_kv_heads, v_head_dim, generator=generator).to(dtype).to(device)
            )
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    query = torch.randn(int(starts[-1]), num_heads, head_dim, generator=generator).to(dtype)
    lengths = torch.tensor(list(seq_lens), dtype=torch.int32)
    return Batch(query.to(device), k_cache, v_cache, table.to(device), lengths.to(device), starts.to(device))


# Gates on |out - expected| / |expected| for N(0, 1) inputs, and on the absolute error of the LSE.
OUT_GATE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}
LSE_GATE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}


def check(batch: Batch, out: torch.Tensor, lse: torch.Tensor | None = None, **options: Any) -> None:
    """Compares a result with the oracle by the gates above."""
    want, want_lse = batch.expected(**options)
    got = out.double().cpu().numpy()
    assert np.isfinite(got).all()
    norm = np.linalg.norm(want)
    error = np.linalg.norm(got - want) / norm if norm else np.linalg.norm(got)
    assert error < OUT_GATE[out.dtype], f"relative error {error:.2e}"
    empty = np.isneginf(want_lse)
    assert (got[empty] == 0).all()
    if lse is not None:
        got_lse = lse.cpu().numpy()
        assert (np.isneginf(got_lse) == empty).all()
        lse_error = np.abs(got_lse[~empty] - want_lse[~empty]).max(initial=0)
        assert lse_error < LSE_GATE[out.dtype], f"lse error {lse_error:.2e}"

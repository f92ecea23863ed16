"""The oracle of the kernel tests: attention in float64, written the plain way over NumPy; and batches to feed it.

A score is ``scale * q . k``, then under a soft cap ``cap * tanh(score / cap)``, then with ALiBi less
``slope * |query's position - key's position|``. A sink is one more score of its head, without a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class _Rows(NamedTuple):
    """One sequence's queries of one head, and the keys that any of them sees, in float64."""

    start: int  # first and past-the-last token of the sequence's queries
    stop: int
    head: int
    q: np.ndarray  # [queries, head_dim]
    k: np.ndarray  # [keys, head_dim]
    v: np.ndarray  # [keys, v_head_dim]
    visible: np.ndarray  # [queries, keys] bool
    bias: np.ndarray | None  # [queries, keys]
    sink: float | None
    scale: float
    softcap: float

    def scores(self, dtype: type = np.float64) -> np.ndarray:
        """[queries, keys], computed in `dtype`; -inf where a key is not seen."""
        scores = self.q.astype(dtype) @ self.k.astype(dtype).T * dtype(self.scale)
        if self.softcap:
            scores = np.tanh(scores / dtype(self.softcap)) * dtype(self.softcap)
        if self.bias is not None:
            scores = scores + self.bias.astype(dtype)
        return np.where(self.visible, scores, dtype(-np.inf))


def _rows(
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
    softcap: float = 0.0,
    alibi_slopes: np.ndarray | None = None,  # [num_heads]
    sinks: np.ndarray | None = None,  # [num_heads]
    block_table_rows: np.ndarray | None = None,
) -> Iterator[_Rows]:
    """Walks a batch. Reads only what a query sees."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if scale is None else scale
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
        visible = (keys >= first[:, None]) & (keys <= last[:, None])
        distances = np.abs(positions[:, None] - keys).astype(np.float64)
        for head in range(num_heads):
            bias = None if alibi_slopes is None else -float(alibi_slopes[head]) * distances
            sink = None if sinks is None else float(sinks[head])
            k = k_cache[blocks, head // group, slots].astype(np.float64)
            v = v_cache[blocks, head // group, slots].astype(np.float64)
            q = query[start:stop, head].astype(np.float64)
            yield _Rows(start, stop, head, q, k, v, visible, bias, sink, scale, softcap)


def paged_attention(
    query: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray, *index: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(out [num_tokens, num_heads, v_head_dim], lse [num_tokens, num_heads]) in float64; arguments as `_rows` has."""
    out = np.zeros((*query.shape[:2], v_cache.shape[3]))
    lse = np.full(query.shape[:2], -np.inf)
    for rows in _rows(query, k_cache, v_cache, *index, **options):
        seen = rows.visible.any(1)
        scores = rows.scores()
        top = scores.max(1) if rows.sink is None else np.maximum(scores.max(1), rows.sink)
        top = np.where(seen, top, 0.0)
        weights = np.exp(scores - top[:, None])
        sink = 0.0 if rows.sink is None else np.exp(rows.sink - top)
        total = np.where(seen, weights.sum(1) + sink, 1.0)
        out[rows.start : rows.stop, rows.head] = weights @ rows.v / total[:, None]
        lse[rows.start : rows.stop, rows.head] = np.where(seen, top + np.log(total), -np.inf)
    return out, lse


def rounding_error(
    want: np.ndarray, dtype: torch.dtype, *args: np.ndarray, whole_references: bool = False, **options: Any
) -> np.ndarray:
    """The error that the best algorithm in `dtype` makes, [num_tokens, num_heads, v_head_dim].

    It has scores in float32, weights rounded to `dtype`, and its output rounded to `dtype`. Weights are relative to the
    row's largest; with `whole_references` to the next power of two, as the GPU's kernels have it.
    """
    out = np.zeros_like(want)
    for rows in _rows(*args, **options):
        scores = rows.scores(np.float32)
        top = scores.max(1)
        reference = np.where(np.isneginf(top), np.float32(0), top)
        if whole_references:
            reference = np.ceil(reference * np.float32(np.log2(np.e))) * np.float32(np.log(2))
        weights = _rounded(np.exp(scores - reference[:, None]), dtype)
        total = weights.sum(1) if rows.sink is None else weights.sum(1) + np.exp(np.float32(rows.sink) - reference)
        total = np.where(np.isneginf(top), np.float32(1), total)
        out[rows.start : rows.stop, rows.head] = weights @ rows.v.astype(np.float32) / total[:, None]
    return np.abs(_rounded(out, dtype) - want)


def _rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(x).to(dtype).to(torch.from_numpy(x).dtype).numpy()


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

    @property
    def arrays(self) -> list[np.ndarray]:
        """The arguments as NumPy arrays, floats in float64."""
        return [(t.double() if t.is_floating_point() else t).cpu().numpy() for t in self.args]

    def expected(self, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        return paged_attention(*self.arrays, **options)


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


SHARED = 3  # blocks that the sequences of `sharing` begin with


def sharing(
    own: Sequence[int], query_lens: Sequence[int], *, shared: int = SHARED, block_size: int = 16, **options: Any
) -> Batch:
    """`make_batch` of sequences that begin with the same blocks and have `own` tokens more; 0 own tokens: padding."""
    lengths = [shared * block_size + n if n else 0 for n in own]
    batch = make_batch(lengths, query_lens, block_size=block_size, **options)
    live = batch.seq_lens > 0
    batch.block_table[live, :shared] = batch.block_table[live][0, :shared].clone()
    return batch


_FEATURES = (
    ("softcap",),
    ("alibi_slopes",),
    ("sinks",),
    ("softcap", "alibi_slopes"),
    ("softcap", "alibi_slopes", "sinks"),
)


def features(*names: str, num_heads: int = 8) -> dict[str, Any]:
    """The options of `paged_attention` that have these names; the oracle takes the same."""
    generator = torch.Generator().manual_seed(5)
    values = {
        "softcap": 1.5,
        "alibi_slopes": 2.0 ** (-8.0 * torch.arange(1, num_heads + 1) / num_heads),  # as ALiBi's paper has them
        "sinks": 2 * torch.randn(num_heads, generator=generator),
        "window": 37,
        "causal": False,
    }
    return {name: values[name] for name in names}


# Every feature alone and with others, under every mask; for 8 heads.
FEATURES = [features(*own, *mask) for own in _FEATURES for mask in ((), ("window",), ("causal",))]


# Gates on |out - expected| / |expected| for N(0, 1) inputs, and on the absolute error of the LSE.
OUT_GATE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}
LSE_GATE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Answer:
    """What a batch should give, and how far from it the best algorithm comes."""

    dtype: torch.dtype  # of the output
    out: np.ndarray
    lse: np.ndarray
    best: np.ndarray  # `rounding_error`

    @classmethod
    def of(cls, batch: Batch, *, whole_references: bool = False, **options: Any) -> Answer:
        """`whole_references` as `rounding_error` has it."""
        out, lse = batch.expected(**options)
        dtype = batch.query.dtype
        best = rounding_error(out, dtype, *batch.arrays, whole_references=whole_references, **options)
        return cls(dtype, out, lse, best)

    def check(self, out: torch.Tensor, lse: torch.Tensor | None = None, *, row_factor: float = 2) -> None:
        """Compares a result with it: over the whole batch, and row by row.

        No element errs by more than twice the largest error that the best algorithm makes in the batch.
        A row is one token's output of one head. Its error stays under the gate too, or, where it is so short or its
        values cancel so far that rounding alone exceeds the gate, under `row_factor` times what the best algorithm
        makes of that row (and the last bit of a float32 near 1). No element errs by more than so many times that
        algorithm's largest error in the row. Among a million rows there are some where that algorithm was lucky: a
        sweep allows them more.
        """
        assert out.dtype == self.dtype
        want, best, got = self.out, self.best, out.double().cpu().numpy()
        assert np.isfinite(got).all()
        gate = OUT_GATE[self.dtype]
        norm = np.linalg.norm(want)
        error = np.linalg.norm(got - want) / norm if norm else np.linalg.norm(got)
        assert error < gate, f"relative error {error:.2e}"

        size = np.linalg.norm(want, axis=2)
        allowed = np.maximum(gate * size, row_factor * (np.linalg.norm(best, axis=2) + np.finfo(np.float32).eps))
        row_error = np.linalg.norm(got - want, axis=2)
        _refuse_where(row_error > allowed, row_error, allowed, "row")
        peak, allowed = np.abs(got - want).max(2), row_factor * best.max(2) + 1e-5
        _refuse_where(peak > allowed, peak, allowed, "element")
        most = 2 * best.max(initial=0) + 1e-5
        assert peak.max(initial=0) <= most, f"element error {peak.max():.2e}, allowed {most:.2e}"

        empty = np.isneginf(self.lse)
        assert (got[empty] == 0).all()
        if lse is not None:
            got_lse = lse.cpu().numpy()
            assert (np.isneginf(got_lse) == empty).all()
            lse_error = np.abs(got_lse[~empty] - self.lse[~empty]).max(initial=0)
            assert lse_error < LSE_GATE[self.dtype], f"lse error {lse_error:.2e}"


def check(
    batch: Batch,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    row_factor: float = 2,
    whole_references: bool = False,
    **options: Any,
) -> None:
    """One result against its `Answer`."""
    Answer.of(batch, whole_references=whole_references, **options).check(out, lse, row_factor=row_factor)


def _refuse_where(bad: np.ndarray, error: np.ndarray, allowed: np.ndarray, what: str) -> None:
    if bad.any():
        token, head = (int(i) for i in np.argwhere(bad)[0])
        message = f"{what} error {error[token, head]:.2e}, allowed {allowed[token, head]:.2e}"
        raise AssertionError(f"token {token}, head {head}: {message}; {int(bad.sum())} of {bad.size} rows")

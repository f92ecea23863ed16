"""Attention over paged KV on the CPU, beside reading the same bytes and beside torch's SDPA. On a GPU the suite is
another one: `pagedcore.bench.attention_gpu`.

Decode: batch 32, block size 16, the four shapes of a small and a middling model. The yardsticks, in the same process:
a plain read of the pool by the same threads, a read of the same pages in table order, SDPA on contiguous KV (which a
paged cache does not have), and gathering the pages before SDPA (what a server without a paged kernel does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

from pagedcore import _kernels, ops
from pagedcore.bench import attention_gpu
from pagedcore.bench.batch import ROUNDING, fill_by_pattern, relative_error
from pagedcore.bench.cases import BLOCK_SIZE
from pagedcore.bench.harness import Result, Session, Timing, interleave
from pagedcore.layout import KVCacheLayout

if TYPE_CHECKING:
    from collections.abc import Callable

SUITE = "attention"


@dataclass(frozen=True)
class Shape:
    """A decode batch: heads, head_dim and context of every sequence."""

    heads: int
    kv_heads: int
    head_dim: int
    context: int
    batch: int = 32

    def name(self, dtype: torch.dtype) -> str:
        """Such as ``decode 9/3x64 ctx 1024 batch 32 bfloat16``."""
        kind = str(dtype).removeprefix("torch.")
        return f"decode {self.heads}/{self.kv_heads}x{self.head_dim} ctx {self.context} batch {self.batch} {kind}"


SHAPES = (Shape(9, 3, 64, 1024), Shape(9, 3, 64, 4096), Shape(32, 8, 128, 1024), Shape(32, 8, 128, 4096))


def run(session: Session) -> None:
    """The suite: decode, prompts, the cost of a call, and alternating with a linear layer."""
    if session.device != "cpu" or session.rehearse:
        attention_gpu.run(session)
        return
    shapes = SHAPES[:1] if session.quick else SHAPES
    with torch.inference_mode():
        for dtype in ROUNDING:
            for shape in shapes:
                _decode(session, shape, dtype)
        _prompts(session)
        _call_cost(session)
        _beside_linear(session)


def _require_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, case: str) -> None:
    error = relative_error(got, want)
    if not error < ROUNDING[dtype]:
        raise RuntimeError(f"{case}: result differs from SDPA by {error:.2e}: nothing is timed before it is right")


def _decode(session: Session, shape: Shape, dtype: torch.dtype) -> None:
    case = shape.name(dtype)
    batch, group = shape.batch, shape.heads // shape.kv_heads
    pages = shape.context // BLOCK_SIZE
    layout = KVCacheLayout(batch * pages + 1, BLOCK_SIZE, 1, shape.kv_heads, shape.head_dim, dtype)
    kv = layout.allocate(library="torch")
    fill_by_pattern(kv.data.view(-1).view(dtype))
    k_cache, v_cache = kv.layer(0)
    table = (torch.randperm(batch * pages) + 1).int().view(batch, pages)
    index = table.long().view(-1)
    seq_lens = torch.full((batch,), shape.context, dtype=torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    query = torch.randn(batch, shape.heads, shape.head_dim).to(dtype)
    out = torch.empty_like(query)

    def gather(cache: torch.Tensor) -> torch.Tensor:
        return cache[index].view(batch, pages, shape.kv_heads, BLOCK_SIZE, -1).transpose(1, 2).flatten(2, 3)

    def sdpa(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # The heads of a group as query rows: KV is read once, the best that SDPA can do with grouped heads.
        return F.scaled_dot_product_attention(query.view(batch, shape.kv_heads, group, -1), k, v)

    k_dense, v_dense = gather(k_cache), gather(v_cache)
    ops.paged_attention(query, k_cache, v_cache, table, seq_lens, starts, out=out)
    _require_close(out, sdpa(k_dense, v_dense).reshape(out.shape), dtype, case)

    calls: dict[str, Callable[[], object]] = {
        "plain read": lambda: _kernels.read_range(kv.data.view(-1)),
        "paged read": lambda: _kernels.read_blocks(kv.data, table.view(-1)),
        "pagedcore": lambda: ops.paged_attention(query, k_cache, v_cache, table, seq_lens, starts, out=out),
        "sdpa, contiguous": lambda: sdpa(k_dense, v_dense),
        "gather + sdpa": lambda: sdpa(gather(k_cache), gather(v_cache)),
    }
    times = interleave(calls, seconds=0.5 if session.quick else 1.5)
    size = batch * pages * layout.block_bytes / 1e9
    read = size / times["plain read"].median
    for name, timing in times.items():
        ours = name == "pagedcore"
        speed = size / timing.median
        session.add(
            Result(
                SUITE,
                case,
                name,
                speed,
                "GB/s",
                size / timing.p90,
                size / timing.p10,
                baseline="sdpa, contiguous" if ours else None,
                baseline_value=size / times["sdpa, contiguous"].median if ours else None,
                ratio=times["sdpa, contiguous"].median / timing.median if ours else None,
                roofline=speed / read,
            )
        )


def _add_seconds(session: Session, case: str, metric: str, ours: Timing, baseline: str, theirs: Timing) -> None:
    unit, factor = ("ms", 1e3) if ours.median > 1e-3 else ("us", 1e6)
    session.add(
        Result(
            SUITE,
            case,
            metric,
            ours.median * factor,
            unit,
            ours.p10 * factor,
            ours.p90 * factor,
            baseline=baseline,
            baseline_value=theirs.median * factor,
            ratio=theirs.median / ours.median,
        )
    )


def _one_sequence(
    tokens: int, queries: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments of attention over one sequence in scattered pages."""
    pages = -(-tokens // BLOCK_SIZE)
    cache = torch.empty(2, pages, kv_heads, BLOCK_SIZE, dim, dtype=dtype)
    fill_by_pattern(cache.view(-1))
    return (
        torch.randn(queries, heads, dim).to(dtype),
        cache[0],
        cache[1],
        torch.randperm(pages).int()[None],
        torch.tensor([tokens], dtype=torch.int32),
        torch.tensor([0, queries], dtype=torch.int32),
    )


def _prompts(session: Session) -> None:
    """Whole prompts, causal."""
    shapes = [(9, 3, 64, 512)] if session.quick else [(9, 3, 64, 512), (9, 3, 64, 2048), (32, 8, 128, 1024)]
    for dtype in (torch.bfloat16, torch.float32):
        for heads, kv_heads, dim, tokens in shapes:
            case = f"prompt {heads}/{kv_heads}x{dim} tokens {tokens} {str(dtype).removeprefix('torch.')}"
            args = _one_sequence(tokens, tokens, heads, kv_heads, dim, dtype)
            query, k_cache, v_cache, table = args[:4]
            pages = table[0].long()
            k, v = (c[pages].transpose(0, 1).flatten(1, 2)[None] for c in (k_cache, v_cache))
            q = query.transpose(0, 1)[None]
            out = torch.empty_like(query)

            def sdpa(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            def ours(args: tuple[Any, ...] = args, out: torch.Tensor = out) -> torch.Tensor:
                return ops.paged_attention(*args, out=out)

            _require_close(ours(), sdpa()[0].transpose(0, 1), dtype, case)
            times = interleave({"pagedcore": ours, "sdpa": sdpa}, seconds=0.5 if session.quick else 1.5)
            _add_seconds(session, case, "pagedcore", times["pagedcore"], "sdpa, contiguous", times["sdpa"])


def _call_cost(session: Session) -> None:
    """What a call costs before any work: one token of context, one head."""
    args = _one_sequence(1, 1, 1, 1, 64, torch.float32)
    out = torch.empty_like(args[0])
    repeats = 1000

    def repeat(call: Callable[[], object]) -> Callable[[], None]:
        def run_many() -> None:
            for _ in range(repeats):
                call()

        return run_many

    calls = {
        "pagedcore.ops": repeat(lambda: ops.paged_attention(*args, out=out)),
        "torch.ops.pagedcore": repeat(lambda: torch.ops.pagedcore.paged_attention(*args, out)),
    }
    for name, timing in interleave(calls, seconds=0.3).items():
        microseconds = 1e6 / repeats
        low, high = timing.p10 * microseconds, timing.p90 * microseconds
        session.add(Result(SUITE, "call", name, timing.median * microseconds, "us", low, high))


def _beside_linear(session: Session) -> None:
    """A linear layer and a short attention in turn, as in a model: a second set of threads would make the pair slow."""
    args = _one_sequence(1024, 1, 9, 3, 64, torch.bfloat16)
    out = torch.empty_like(args[0])
    hidden, weight = torch.randn(8, 576).to(torch.bfloat16), torch.randn(1536, 576).to(torch.bfloat16)

    def linear() -> None:
        F.linear(hidden, weight)

    def attention() -> None:
        ops.paged_attention(*args, out=out)

    def pair() -> None:
        linear()
        attention()

    def alone(call: Callable[[], None]) -> Callable[[], None]:
        def several() -> None:
            for _ in range(20):
                call()

        return several

    times = interleave(
        {"linear": alone(linear), "attention": alone(attention), "pair": alone(pair)},
        seconds=0.5 if session.quick else 1.5,
    )
    separate = (times["linear"].median + times["attention"].median) / 20 * 1e6
    together = times["pair"].median / 20 * 1e6
    session.add(
        Result(
            SUITE,
            "linear and attention in turn",
            "pair",
            together,
            "us",
            times["pair"].p10 / 20 * 1e6,
            times["pair"].p90 / 20 * 1e6,
            baseline="the two alone",
            baseline_value=separate,
            ratio=together / separate,
        )
    )

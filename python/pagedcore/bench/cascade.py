"""Decode of sequences that share a prefix, on the CPU: `cascade_attention` beside `paged_attention` on the same data.

The first reads the prefix once for all sequences, the second once for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagedcore import ops
from pagedcore.bench.batch import ROUNDING, relative_error
from pagedcore.bench.cases import BLOCK_SIZE
from pagedcore.bench.harness import Result, Session, interleave

SUITE = "cascade"


@dataclass(frozen=True)
class Shape:
    """A decode step of `batch` sequences: tokens they share, tokens of each one's own."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    shared: int
    own: int = 128

    def name(self, dtype: torch.dtype) -> str:
        """Such as ``32/8x128 batch 32 shared 2048 own 128 bfloat16``."""
        model = f"{self.heads}/{self.kv_heads}x{self.head_dim}"
        kind = str(dtype).removeprefix("torch.")
        return f"{model} batch {self.batch} shared {self.shared} own {self.own} {kind}"


MODELS = ((9, 3, 64), (32, 8, 128), (32, 32, 128))
STEPS = ((32, 2048), (32, 512), (32, 128), (8, 2048), (8, 512), (4, 2048), (2, 2048))  # batch, shared


def run(session: Session) -> None:
    """The suite: models by steps by dtypes."""
    if session.device != "cpu" or session.rehearse:
        session.skip("", SUITE, "is measured on the CPU alone")
        return
    models, steps = (MODELS[:1], STEPS[:1]) if session.quick else (MODELS, STEPS)
    with torch.inference_mode():
        for dtype in ROUNDING:
            for model in models:
                for step in steps:
                    _decode(session, Shape(*model, *step), dtype)


def _decode(session: Session, shape: Shape, dtype: torch.dtype) -> None:
    case = shape.name(dtype)
    shared, own = shape.shared // BLOCK_SIZE, shape.own // BLOCK_SIZE
    num_blocks = shared + shape.batch * own
    k_cache, v_cache = torch.randn(2, num_blocks, shape.kv_heads, BLOCK_SIZE, shape.head_dim).to(dtype)
    blocks = torch.randperm(num_blocks).int()
    table = torch.cat([blocks[:shared].expand(shape.batch, shared), blocks[shared:].view(shape.batch, own)], dim=1)
    query = torch.randn(shape.batch, shape.heads, shape.head_dim).to(dtype)
    args = (
        query,
        k_cache,
        v_cache,
        table,
        torch.full((shape.batch,), shape.shared + shape.own, dtype=torch.int32),
        torch.arange(shape.batch + 1, dtype=torch.int32),
    )
    sizes = (shape.batch, shape.batch, shape.heads, shape.kv_heads, shape.head_dim)
    workspace = torch.empty(ops.cascade_workspace_size(*sizes, dtype=dtype, device="cpu"), dtype=torch.uint8)
    outs = torch.empty_like(query), torch.empty_like(query)

    def cascade() -> None:
        ops.cascade_attention(*args, num_shared_blocks=shared, out=outs[0], workspace=workspace)

    def plain() -> None:
        ops.paged_attention(*args, out=outs[1])

    cascade()
    plain()
    error = relative_error(outs[0], outs[1])
    if not error < ROUNDING[dtype]:
        raise RuntimeError(f"{case}: cascade differs by {error:.2e}: nothing is timed before it is right")
    times = interleave({"cascade": cascade, "plain": plain}, seconds=0.3 if session.quick else 0.6)
    session.add(
        Result(
            SUITE,
            case,
            "cascade_attention",
            times["cascade"].median * 1e3,
            "ms",
            times["cascade"].p10 * 1e3,
            times["cascade"].p90 * 1e3,
            baseline="paged_attention",
            baseline_value=times["plain"].median * 1e3,
            ratio=times["plain"].median / times["cascade"].median,
        )
    )

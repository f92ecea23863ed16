"""Good calls of attention and of writing to the cache, for tests that then make one argument bad."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pagedcore import ops


def attention_args() -> dict[str, Any]:
    """Two sequences of 5 and 8 tokens in blocks of 4; 3 query tokens; 4 heads over 2 KV heads."""
    return {
        "query": torch.randn(3, 4, 16),
        "k_cache": torch.randn(6, 2, 4, 16),
        "v_cache": torch.randn(6, 2, 4, 16),
        "block_table": torch.tensor([[3, 1], [2, 5]], dtype=torch.int32),
        "seq_lens": torch.tensor([5, 8], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 1, 3], dtype=torch.int32),
        "out": torch.full((3, 4, 16), 7.0),
        "lse": torch.full((3, 4), 7.0),
    }


def cache_args() -> dict[str, Any]:
    return {
        "key": torch.randn(3, 2, 16),
        "value": torch.randn(3, 2, 16),
        "k_cache": torch.full((6, 2, 4, 16), 7.0),
        "v_cache": torch.full((6, 2, 4, 16), 7.0),
        "slot_mapping": torch.tensor([1, 2, 3]),
    }


@contextmanager
def untouched(*outputs: Any) -> Iterator[None]:
    """Nothing is written to these, as far as they are tensors that can be read."""
    readable = [
        t for t in outputs if isinstance(t, torch.Tensor) and (t.device.type, t.layout) == ("cpu", torch.strided)
    ]
    before = [t.clone() for t in readable]
    try:
        yield
    finally:
        for a, b in zip(readable, before, strict=True):
            assert torch.equal(a, b)


def call_attention(**changes: Any) -> None:
    args = {**attention_args(), **changes}
    with untouched(args["out"], args["lse"]):
        ops.paged_attention(**args)


def call_cache(**changes: Any) -> None:
    args = {**cache_args(), **changes}
    with untouched(args["k_cache"], args["v_cache"]):
        ops.reshape_and_cache(**args)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)

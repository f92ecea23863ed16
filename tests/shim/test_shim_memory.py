"""What `attention_workspace_size` is made of: the most memory of any call up to some sizes, and no more."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import shim_build

pytestmark = pytest.mark.shim_only

HEADS = [(8, 8), (32, 8), (17, 1), (64, 1)]


def fields(num_tokens: int, num_seqs: int, max_query_len: int, **options: Any) -> dict[str, Any]:
    aligned = (0, 1024, 1024, 1024)
    return {
        "num_tokens": num_tokens,
        "num_seqs": num_seqs,
        "max_query_len": max_query_len,
        "dtype": "bfloat16",
        "k": aligned,
        "v": aligned,
        "block_size": 16,
        "causal": True,
        **options,
    }


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("split_size", [-1, 0, 128])
@pytest.mark.parametrize("longest", [1, 3, 40, 512])
def test_the_bound_is_reached_and_never_passed(
    plain_shim: Any, heads: tuple[int, int], split_size: int, longest: int
) -> None:
    """Over calls of fewer tokens, some of them padding, fewer sequences, and shorter queries; at all head sizes that
    the build has tiles for, 64 at least.
    """
    plain_shim.set_multiprocessors(20)
    options = dict(zip(("num_heads", "num_kv_heads"), heads, strict=True)) | {"split_size": split_size}
    sizes = [{**options, "head_dim": dim, "v_head_dim": dim} for dim in shim_build.TILED_HEAD_DIMS]
    tiled = [size for size in sizes if plain_shim.why_not_tiled(fields(1, 1, 1, **size)) is None]
    assert tiled[0]["head_dim"] == 64
    for size in tiled:
        bound = plain_shim.most_memory(fields(512, 8, longest, **size))
        calls = [
            fields(tokens, seqs, longest_here, **size)
            for tokens, seqs, longest_here in itertools.product((1, 7, 100, 512), (1, 2, 8), (1, 3, 40, 512))
            if longest_here <= min(longest, tokens)
        ]
        needs = [(plain_shim.plan_bytes(call), plain_shim.workspace_bytes(call)) for call in calls]
        assert max(workspace for _, workspace in needs) == bound[1]
        assert max(plan for plan, _ in needs) <= bound[0]

"""Small batches, of which each makes `paged_attention` take one of a GPU's kernels: for tests/device, and for the test
under the shim that they still do.
"""

from __future__ import annotations

import torch
from reference import Batch, make_batch

# Lengths, query lengths and heads.
KERNELS = {
    "decode": ([70, 5, 0, 33], [1, 2, 1, 1], (8, 2)),
    "mixed": ([70, 40, 0], [1, 20, 1], (8, 2)),
    "prefill": ([40, 30], [20, 20], (17, 1)),  # no sequence has few rows, so that split_size changes nothing
    "generic": ([70, 5, 0], [1, 3, 1], (4, 2)),
}
SIZES = [(64, torch.bfloat16), (128, torch.float16)]  # head sizes, and dtypes with them
OTHER_HEAD_DIMS = [80, 96, 112, 192, 256]
OTHER_KERNELS = ["decode", "mixed"]  # that those have
SPLITS = [None, 64]


def small_batch(kernel: str, head_dim: int, dtype: torch.dtype) -> Batch:
    """For "generic" of a head size that no other kernel has."""
    lengths, queries, heads = KERNELS[kernel]
    return make_batch(lengths, queries, dtype=dtype, heads=heads, head_dim=head_dim + 8 * (kernel == "generic"))

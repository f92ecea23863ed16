"""The oracle of the kernel tests: attention in float64, written the plain way over NumPy."""

from __future__ import annotations

import numpy as np


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
    """(out [num_tokens, num_heads, v_head_dim], lse [num_tokens, num_heads]), float64. Reads only slots that a query sees."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros((num_tokens, num_heads, v_cache.shape[3]))
    lse = np.full((num_tokens, num_heads), -np.inf)
    for seq, seq_len in enumerate(int(n) for n in seq_lens):
        start, stop = int(query_start_loc[seq]), int(query_start_loc[seq + 1])
        row = seq if block_table_rows is None else int(block_table_rows[seq])
        first_position = seq_len - (stop - start)
        for token in range(start, stop):
            position = first_position + token - start
            last = position if causal else seq_len - 1
            first = max(0, position - window + 1) if window else 0
            positions = np.arange(first, last + 1)
            if len(positions) == 0:
                continue
            blocks, slots = block_table[row, positions // block_size], positions % block_size
            k = k_cache[blocks, :, slots].astype(np.float64)  # [keys, num_kv_heads, head_dim]
            v = v_cache[blocks, :, slots].astype(np.float64)
            for head in range(num_heads):
                scores = k[:, head // group] @ query[token, head].astype(np.float64) * scale
                top = scores.max()
                weights = np.exp(scores - top)
                out[token, head] = weights @ v[:, head // group] / weights.sum()
                lse[token, head] = top + np.log(weights.sum())
    return out, lse

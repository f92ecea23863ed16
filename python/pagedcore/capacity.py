"""How many KV blocks fit: the pool's size from a budget in bytes, or a share of the memory there is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pagedcore import environment
from pagedcore.errors import InvalidArgumentError

if TYPE_CHECKING:
    from pagedcore.layout import KVCacheLayout

#: Share of the available memory that the KV cache may take when nothing is said. A GPU serves nobody else, but the
#: passes' intermediate results and the recordings of decode steps need their part; a host has other work.
DEFAULT_MEMORY_SHARE = {"cpu": 0.4, "cuda": 0.85}


def available_memory(device: torch.device) -> int:
    """Bytes that can be taken now on a device: of a GPU what is free, with what torch holds of it and does not use."""
    if device.type == "cpu":
        return environment.available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def fit_blocks(layout: KVCacheLayout, memory: Any, useful_tokens: int, device: torch.device) -> KVCacheLayout:
    """``layout`` with the number of blocks that ``memory`` holds, the null block included.

    ``memory`` is bytes (int), a share of the device's available memory (float in (0, 1)), or None for the default
    share. No more blocks than ``useful_tokens`` could ever fill. Raises InvalidArgumentError for a budget that is not
    there, or holds fewer than two blocks.
    """
    available = available_memory(device)
    if memory is None:
        memory = DEFAULT_MEMORY_SHARE[device.type]
    budget: int = int(memory * available) if isinstance(memory, float) else memory
    _check_available("kv_cache_memory", budget, budget, available)
    blocks = min(budget // layout.block_bytes, -(-useful_tokens // layout.block_size) + 1)
    if blocks < 2:
        raise InvalidArgumentError(
            f"kv_cache_memory of {budget} bytes holds {budget // layout.block_bytes} blocks of {layout.block_bytes} "
            "bytes; 2 are the least",
            argument="kv_cache_memory",
            got=budget,
            expected=2 * layout.block_bytes,
        )
    return replace(layout, num_blocks=blocks)


def check_blocks(layout: KVCacheLayout, device: torch.device) -> KVCacheLayout:
    """``layout``, if the device has memory for its blocks now. Raises InvalidArgumentError: a host's system would hand
    out memory it does not have, and end the process later.
    """
    _check_available("num_blocks", layout.num_blocks, layout.total_bytes, available_memory(device))
    return layout


def _check_available(argument: str, got: int, num_bytes: int, available: int) -> None:
    if num_bytes > available:
        raise InvalidArgumentError(
            f"{argument} {got} takes {num_bytes} bytes, but {available} are available",
            argument=argument,
            got=got,
            expected=available,
        )

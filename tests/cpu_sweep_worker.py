"""Runs one case of the sweep on the CPU's kernels, in whatever process it is imported."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import sweep
import torch
from conftest import runnable_isas
from pagedcore import _kernels, ops

if TYPE_CHECKING:
    from reference import Batch

FAR = 2**31  # elements between the blocks of a cache


def prepare() -> None:
    """One core a process, but for the threads that a case asks for."""
    torch.set_num_threads(1)


def far_apart(cache: torch.Tensor) -> torch.Tensor:
    """The same cache with its blocks `FAR` elements apart, in a file in memory that holds nothing between them."""
    file = os.memfd_create("far")
    try:
        os.ftruncate(file, len(cache) * FAR * cache.element_size())
        memory = mmap.mmap(file, 0)
    finally:
        os.close(file)
    apart = torch.frombuffer(memory, dtype=cache.dtype).as_strided(cache.shape, (FAR, *cache.stride()[1:]))
    return apart.copy_(cache)


def arguments(batch: Batch, *, far: bool) -> tuple[torch.Tensor, ...]:
    if not far:
        return batch.args
    return (batch.query, far_apart(batch.k_cache), far_apart(batch.v_cache), *batch.args[3:])


def run_case(case: sweep.Case, seed: int) -> None:
    """Raises AssertionError where the result of an instruction set is not what the oracle says."""
    call = sweep.build(case, seed=seed)
    answer = call.answer()
    args = arguments(call.batch, far=case["far"])
    for isa in runnable_isas():
        if "bf16" in isa and case["dtype"] != torch.bfloat16:
            continue  # the code of avx512
        _kernels.select_cpu_isa(isa)
        out, lse = ops.paged_attention(
            *args, return_lse=True, num_threads=case["num_threads"], **call.options, **call.hints
        )
        try:
            answer.check(out, lse, row_factor=sweep.ROW_FACTOR_16_BITS if "bf16" in isa else 2)
        except AssertionError as error:
            raise AssertionError(f"{isa}: {error}") from None

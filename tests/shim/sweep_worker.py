"""Runs one case of the sweep on the shim, in whatever process it is imported."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import shim_build
import sweep
import torch
from cuda_gpu import CudaGpu
from device import attend

FAR = 2**31  # elements between the blocks of a cache


@functools.cache
def _shim(library: str) -> Any:
    return CudaGpu() if library == CudaGpu.__file__ else shim_build.load(Path(library))


def prepare() -> None:
    """One core a process."""
    torch.set_num_threads(1)


def run_case(library: str, case: sweep.Case, seed: int) -> None:
    """Raises AssertionError where the result is not what the oracle says, and what the kernel raises."""
    call = sweep.build(case, seed=seed)
    try:
        out, lse = attend(
            _shim(library),
            call.batch,
            case["kernel"],
            grid=case["grid"],
            seed=seed,
            block_stride=FAR if case["far"] else None,
            **call.options,
            **call.hints,
        )
    except RuntimeError as error:  # the shim's own classes do not travel between processes
        raise AssertionError(str(error)) from None
    tiled = case["kernel"] == "tiled"
    row_factor = sweep.ROW_FACTOR_CODES if tiled and case["codes"] else sweep.ROW_FACTOR_16_BITS
    call.answer(whole_references=tiled).check(out, lse, row_factor=row_factor)

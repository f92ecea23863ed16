"""Which device a model runs on, and in which dtype it computes there."""

from __future__ import annotations

import re
from typing import Any

import torch

from pagedcore import _kernels, layout
from pagedcore.errors import InvalidArgumentError, UnsupportedError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in layout.ITEM_SIZES}


def choose_device(device: Any) -> torch.device:
    """``"auto"``: torch's current GPU if there is one and the kernels can use it, else the CPU. ``"cpu"``; ``"cuda"``,
    the current GPU; ``"cuda:1"``; a `torch.device`.

    Raises UnsupportedError for a GPU that is not there, or that the kernels were not built for.
    """
    if device == "auto":
        gpu = None if why_no_gpu() else _gpu(torch.cuda.current_device())
        return torch.device("cpu") if gpu is None or _no_image_for(gpu) else gpu
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"device is {device!r}",
            hint="one of auto, cpu, cuda, cuda:0, ...",
            argument="device",
            got=device,
            expected=("auto", "cpu", "cuda"),
        ) from error
    if wanted.type == "cpu":
        return torch.device("cpu")
    reason = why_no_gpu() if wanted.type == "cuda" else "there are no kernels for it"
    if reason is None and (wanted.index or 0) >= torch.cuda.device_count():
        reason = f"there are {torch.cuda.device_count()} GPUs"
    if reason is None:
        wanted = _gpu(torch.cuda.current_device() if wanted.index is None else wanted.index)
        reason = _no_image_for(wanted)
    if reason is not None:
        raise UnsupportedError(
            f"device {str(device)!r}: {reason}", argument="device", got=str(device), expected=("auto", "cpu")
        )
    return wanted


def _gpu(index: int) -> torch.device:
    return torch.device("cuda", index)


def _no_image_for(gpu: torch.device) -> str | None:
    """What keeps a GPU from running any image of the kernels, in words; None if one runs there."""
    images, (major, minor) = str(_kernels.gpu_facts()["images"]), torch.cuda.get_device_capability(gpu)
    if any(runs_on((major, minor), image) for image in images.split()):
        return None
    return f"its compute capability is {major}.{minor}, and the kernels were built for {images}"


def runs_on(capability: tuple[int, int], image: str) -> bool:
    """Whether a GPU runs an image, named as CMake does: ``80``, machine code with PTX; ``89-real``, ``90-virtual``, one
    of them. Machine code is for its generation from there on, PTX for all newer GPUs too; an ``a``, as in ``90a``, is
    for that GPU alone.
    """
    match = re.fullmatch(r"(\d+)(\d)(a?)(-real|-virtual)?", image)
    if match is None:
        return True  # "native" and the like: whoever built it knew for what
    built_for = int(match[1]), int(match[2])
    if match[3]:
        return capability == built_for
    return capability >= built_for and (capability[0] == built_for[0] or match[4] != "-real")


def why_no_gpu() -> str | None:
    """Why no model can run on a GPU here, in words; None if one can."""
    facts = _kernels.gpu_facts()
    if facts["images"] is None:
        return "these kernels were built without CUDA"
    if not torch.backends.cuda.is_built():
        return "this torch was built without CUDA"
    if facts["problem"]:
        return str(facts["problem"])
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return None


def choose_dtype(requested: str | torch.dtype, checkpoint: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the one asked for, else the checkpoint's if the device has products for it, else
    float32.
    """
    if requested != "auto":
        return DTYPES[requested] if isinstance(requested, str) else requested
    if checkpoint in DTYPES.values() and (device.type != "cpu" or _fast_on_cpu(checkpoint)):
        return checkpoint
    return torch.float32


def _fast_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of it: without them they take several times as long."""
    capabilities = dict(getattr(torch.cpu, "get_capabilities", dict)())
    fast = {
        torch.bfloat16: ("avx512_bf16", "amx_bf16", "amx_tile", "arm_bf16", "bf16"),
        torch.float16: ("avx512_fp16", "amx_fp16"),
    }
    return dtype == torch.float32 or any(capabilities.get(name) for name in fast.get(dtype, ()))

"""Tensors of any library: where they are, their axes, and new ones beside them. Imports none of the libraries."""

from __future__ import annotations

import importlib
import math
import operator
import sys
from contextlib import nullcontext
from typing import Any, NoReturn

from pagedcore.errors import InvalidArgumentError
from pagedcore.layout import KVCache


def device_index(device: Any) -> int:
    """-1 for the CPU, else the number of a CUDA device; "cuda" without a number is device 0. Takes a name, a number, or
    a device of torch or CuPy.
    """
    if isinstance(device, int):
        return device
    if not isinstance(device, str) and isinstance(getattr(device, "id", None), int):
        return int(device.id)  # CuPy
    kind, _, number = str(device).partition(":")
    if kind == "cpu":
        return -1
    if kind != "cuda" or not (number.isdigit() or not number):
        raise InvalidArgumentError(
            f"device: expected 'cpu', 'cuda' or 'cuda:N', got {device!r}",
            argument="device",
            got=device,
            expected=("cpu", "cuda", "cuda:N"),
        )
    return int(number or 0)


def device_of(tensor: Any) -> int:
    """`device_index` of where a tensor is."""
    if isinstance(device := getattr(tensor, "device", "cpu"), str):  # NumPy 2 says "cpu"
        return device_index(device)
    if getattr(device, "type", None) == "cuda":
        return int(device.index or 0)
    return device_index(device)


def new_bytes(like: Any, count: int) -> Any:
    """uint8 ``[count]`` in the library of `like`, where `like` is. What it holds is not defined."""
    if hasattr(like, "new_empty"):  # torch
        return like.new_empty((count,), dtype=sys.modules["torch"].uint8)
    return _empty(like, (count,), "uint8")


def array_module(like: Any) -> Any:
    """CuPy for its arrays, else NumPy."""
    if hasattr(like, "__cuda_array_interface__"):
        return importlib.import_module("cupy")
    return importlib.import_module("numpy")


def require_axes(name: str, tensor: Any, *axes: str) -> tuple[int, ...]:
    """The shape of a tensor that must have these axes."""
    shape = getattr(tensor, "shape", None)
    if shape is None:
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if len(shape) != len(axes):
        raise InvalidArgumentError(
            f"{name}: expected shape [{', '.join(axes)}], got {list(shape)}",
            argument=name,
            got=tuple(shape),
            expected=len(axes),
        )
    return tuple(shape)


def refuse(argument: str, expected: str, got: Any) -> NoReturn:
    """Raises what an argument that will not do is told by."""
    raise InvalidArgumentError(
        f"{argument}: expected {expected}, got {got}", argument=argument, got=got, expected=expected
    )


def whole(name: str, value: Any, least: int | None = None) -> int:
    """An int of Python's or NumPy's as Python's, no smaller than `least`."""
    if isinstance(value, bool):
        refuse(name, "an int", repr(value))
    try:
        number = operator.index(value)
    except TypeError:
        refuse(name, "an int", repr(value))
    if least is not None and number < least:
        refuse(name, f"{least} or more", number)
    return number


def require_bytes(name: str, memory: Any, size: int, like_name: str, like: Any) -> None:
    """Refuses memory that is not so many bytes, one after another from a multiple of 16 on, of the library and on the
    device of `like`.
    """
    (got,) = require_axes(name, memory, "bytes")
    if (dtype := name_of_dtype(memory)) != "uint8":
        refuse(name, "dtype uint8", dtype)
    if got < size:
        refuse(name, f"{size} bytes or more", got)
    of_torch = hasattr(like, "data_ptr")
    if hasattr(memory, "data_ptr") != of_torch:
        refuse(name, f"{'a torch tensor' if of_torch else 'an array'}, as {like_name} is", type(memory).__name__)
    if (device := device_of(memory)) != (wanted := device_of(like)):
        refuse(name, f"the device of {like_name}, {_name_of_device(wanted)}", _name_of_device(device))
    if (stride := _stride_of(memory, 1)) != 1:
        refuse(name, "bytes one after another", f"stride {stride}")
    if _address_of(memory) % 16:
        refuse(name, "memory that begins on 16 bytes", f"address {_address_of(memory):#x}")


def dtype_of(tensor: Any) -> Any:
    """The dtype, as the library has it."""
    # A memoryview has none, and NumPy none for it that it did not make itself.
    return getattr(tensor, "dtype", None) or array_module(tensor).asarray(tensor).dtype


def name_of_dtype(tensor: Any) -> str:
    """Such as "int32"."""
    return str(dtype_of(tensor)).removeprefix("torch.")


def _name_of_device(index: int) -> str:
    return "cpu" if index < 0 else f"cuda:{index}"


def _stride_of(tensor: Any, item_size: int) -> int:
    """From one element to the next of a tensor of one axis, in elements of so many bytes."""
    return int(tensor.stride(0) if hasattr(tensor, "data_ptr") else tensor.strides[0] // item_size)


def _address_of(memory: Any) -> int:
    if hasattr(memory, "data_ptr"):  # torch
        return int(memory.data_ptr())
    interface = getattr(memory, "__cuda_array_interface__", None) or memory.__array_interface__
    return int(interface["data"][0])


def require_sequences(seq_lens: Any, query_start_loc: Any) -> int:
    """How many sequences there are. Refuses index tensors that are not int32 ``[num_seqs]`` and ``[num_seqs + 1]``, one
    element after another, on one device.
    """
    (num_seqs,) = require_axes("seq_lens", seq_lens, "num_seqs")
    (num_starts,) = require_axes("query_start_loc", query_start_loc, "num_seqs + 1")
    if num_starts != num_seqs + 1:
        refuse("query_start_loc", f"{num_seqs + 1} entries, one more than seq_lens has", num_starts)
    for name, tensor in (("seq_lens", seq_lens), ("query_start_loc", query_start_loc)):
        if (dtype := name_of_dtype(tensor)) != "int32":
            refuse(name, "dtype int32", dtype)
        if tensor.shape[0] > 1 and (stride := _stride_of(tensor, 4)) != 1:
            refuse(name, "a contiguous last axis (stride 1)", f"stride {stride}")
    if (device := device_of(query_start_loc)) != (wanted := device_of(seq_lens)):
        refuse("query_start_loc", f"the device of seq_lens, {_name_of_device(wanted)}", _name_of_device(device))
    return num_seqs


def query_tokens(num_tokens: int | None, num_seqs: int, max_query_len: int) -> int:
    """The number of query tokens that a plan is made for: as given, or one a sequence where none has more."""
    if num_tokens is None and max_query_len != 1:
        raise InvalidArgumentError(
            f"num_tokens: expected the number of query tokens where max_query_len is not 1 but {max_query_len}, "
            "got None",
            hint="query.shape[0]",
            argument="num_tokens",
            expected="an int",
        )
    return num_seqs if num_tokens is None else num_tokens


def new_out(query: Any, v_cache: Any) -> Any:
    """[num_tokens, num_heads, v_head_dim] in the library and dtype of `query`."""
    num_tokens, num_heads, _ = require_axes("query", query, "num_tokens", "num_heads", "head_dim")
    v_head_dim = require_axes("v_cache", v_cache, "num_blocks", "num_kv_heads", "block_size", "v_head_dim")[3]
    return new_like(query, (num_tokens, num_heads, v_head_dim))


def new_lse(rows: Any, name: str, dim: str) -> Any:
    """[num_tokens, num_heads] float32 in the library of `rows`, whose axes these two and `dim` are."""
    num_tokens, num_heads, _ = require_axes(name, rows, "num_tokens", "num_heads", dim)
    if hasattr(rows, "new_empty"):  # torch
        return rows.new_empty((num_tokens, num_heads), dtype=sys.modules["torch"].float32)
    return _empty(rows, (num_tokens, num_heads), "float32")


def new_like(tensor: Any, shape: tuple[int, ...]) -> Any:
    """A tensor of this shape in the library and dtype of `tensor`, where `tensor` is. What it holds is not defined."""
    if hasattr(tensor, "new_empty"):  # torch
        return tensor.new_empty(shape)
    return _empty(tensor, shape, dtype_of(tensor))


def _empty(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Of NumPy, or of CuPy, which allocates on the device that is current."""
    with like.device if hasattr(like, "__cuda_array_interface__") else nullcontext():
        return array_module(like).empty(shape, dtype)


def block_tensors(kv: Any) -> list[Any]:
    """The tensors of a `KVCache`, of a tensor, or of a list of these; each has the block as its first axis."""
    if isinstance(kv, KVCache):
        return kv.block_tensors()
    if isinstance(kv, (list, tuple)):
        return [tensor for item in kv for tensor in block_tensors(item)]
    return [kv]


def carve(memory: Any, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """A part of a uint8 ``[bytes]`` tensor as a tensor of this shape and dtype, a name or the library's own."""
    if hasattr(memory, "new_empty"):  # torch
        kind = getattr(sys.modules["torch"], dtype) if isinstance(dtype, str) else dtype
        size = math.prod(shape) * kind.itemsize
        return memory[offset : offset + size].view(kind).view(shape)
    xp = array_module(memory)
    size = math.prod(shape) * xp.dtype(dtype).itemsize
    return memory[offset : offset + size].view(dtype).reshape(shape)


def sliceable(tensor: Any) -> Any:
    """A memoryview as an array; what the libraries made themselves, and None, as it is."""
    return array_module(tensor).asarray(tensor) if isinstance(tensor, memoryview) else tensor


# What torch, NumPy and CuPy call differently. Each is put on the current stream, and allocates nothing.


def fill(out: Any, value: int) -> None:
    """Every element of out becomes value."""
    if hasattr(out, "fill_"):
        out.fill_(value)
    else:
        out.fill(value)


def subtract(lens: Any, tokens: int, out: Any) -> None:
    """``out = max(lens - tokens, 0)``."""
    if hasattr(out, "fill_"):
        sys.modules["torch"].sub(lens, tokens, out=out).clamp_(min=0)
    else:
        xp = array_module(out)
        xp.subtract(lens, tokens, out=out)
        xp.maximum(out, 0, out=out)


def hide(lse_shared: Any, lse_own: Any, mask: Any) -> None:
    """``lse_shared = -inf`` where lse_own is: a query sees itself at least, or it is padding. mask is overwritten."""
    if hasattr(mask, "fill_"):
        sys.modules["torch"].eq(lse_own, -math.inf, out=mask)
        lse_shared.masked_fill_(mask, -math.inf)
    else:
        xp = array_module(mask)
        xp.equal(lse_own, -math.inf, out=mask)
        xp.copyto(lse_shared, -math.inf, where=mask)

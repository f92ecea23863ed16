"""Every tensor of every op, wrong in every way: an exception that names it, and nothing written. Contents of
the index tensors, and what is no tensor: test_ops_bad_values.py.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ops_calls import attention_args, cache_args, call_attention, call_cache, int32
from pagedcore import ops
from pagedcore.errors import BlockError, InvalidArgumentError
from pagedcore.layout import KVCacheLayout


def test_the_arguments_are_good() -> None:
    ops.paged_attention(**attention_args())
    ops.reshape_and_cache(**cache_args())


ATTENTION_TENSORS = list(attention_args())
CACHE_TENSORS = list(cache_args())
CALLS = [(call_attention, attention_args, name) for name in ATTENTION_TENSORS]
CALLS += [(call_cache, cache_args, name) for name in CACHE_TENSORS]
Call = Callable[..., None]
Args = Callable[[], dict[str, Any]]


@pytest.mark.parametrize("bad", [3, "x", [1, 2], object(), {}, {"shape": 3}])
@pytest.mark.parametrize(("call", "args", "name"), CALLS)
def test_not_a_tensor(call: Call, args: Args, name: str, bad: object) -> None:
    with pytest.raises(TypeError, match=f"^{name}: expected a tensor.*got {type(bad).__name__}"):
        call(**{name: bad})


@pytest.mark.parametrize(("call", "args", "name"), CALLS)
def test_none(call: Call, args: Args, name: str) -> None:
    if name in ("out", "lse"):
        ops.paged_attention(**{**attention_args(), name: None})
        return
    with pytest.raises(TypeError, match=f"^{name}: expected a tensor"):
        call(**{name: None})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.bool, torch.complex64, torch.uint8, torch.int8])
@pytest.mark.parametrize(("call", "args", "name"), CALLS)
def test_wrong_dtype(call: Call, args: Args, name: str, dtype: torch.dtype) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{name}: expected dtype") as caught:
        call(**{name: args()[name].to(dtype)})
    assert caught.value.argument == name


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.bool, torch.complex64])
def test_a_dtype_that_none_takes_is_named_beside_those_that_do(dtype: torch.dtype) -> None:
    """In torch and in NumPy, with what to do about it in either."""
    args = attention_args()
    args["query"] = args["query"].to(dtype)
    message = rf"^query: expected dtype float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')} \(hint: "
    with pytest.raises(InvalidArgumentError, match=message + r"cast it, as by query\.to\(torch\.float32\)\)$"):
        ops.paged_attention(**args)
    if dtype != torch.complex64:
        with pytest.raises(InvalidArgumentError, match=message + r"cast it, as by query\.astype\('float32'\)\)$"):
            ops.paged_attention(**{name: t.numpy() for name, t in args.items()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int8])
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_cache_of_a_dtype_that_none_takes_is_not_to_be_cast(name: str, dtype: torch.dtype) -> None:
    """That would copy the whole of it for a call, and write to the copy."""
    message = (
        rf"^{name}: expected dtype float32, float16, bfloat16, float8_e4m3fn or uint8, got {str(dtype)[6:]} "
        r"\(hint: allocate the caches in the dtype of what is written to them, or for codes\)$"
    )
    for call, args in ((ops.paged_attention, attention_args()), (ops.reshape_and_cache, cache_args())):
        args[name] = args[name].to(dtype)
        with pytest.raises(InvalidArgumentError, match=message):
            call(**args)
        with pytest.raises(InvalidArgumentError, match=message):
            call(**{key: tensor.numpy() for key, tensor in args.items()})


def test_dtypes_that_do_not_go_together_say_which_to_cast() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^k_cache: .*\(hint: cast query, or allocate the caches in its dt"):
        call_attention(query=attention_args()["query"].half(), out=None)
    with pytest.raises(InvalidArgumentError, match=r"^k_cache: .*\(hint: keep both K and V as codes, or neither\)$"):
        call_attention(k_cache=attention_args()["k_cache"].to(torch.uint8))
    with pytest.raises(InvalidArgumentError, match=r"^seq_lens: .*\(hint: cast it, as by seq_lens\.to\(torch\.int32\)"):
        call_attention(seq_lens=attention_args()["seq_lens"].long())
    with pytest.raises(
        InvalidArgumentError, match=r"^slot_mapping: .*\(hint: cast it, as by slot_mapping\.to\(torch\.i"
    ):
        call_cache(slot_mapping=torch.tensor([1, 2, 3], dtype=torch.int32))


def test_tensors_of_torchs_transforms_are_refused_in_a_line() -> None:
    """They have no memory to look at; torch's own message ends with its C++ stack."""
    args = attention_args()
    message = (
        r"^query: expected a dense tensor with memory of its own \(as inside torch\.func's transforms.* got one .*$"
    )
    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(InvalidArgumentError, match=message) as caught:
            transform(lambda query: ops.paged_attention(**{**args, "query": query}).sum())(args["query"])
        assert "\n" not in str(caught.value)


def test_strides_of_nothing_mean_nothing() -> None:
    """A view without elements is taken whatever its strides."""
    args = attention_args()
    args["query"] = args["query"][:0]
    for name in ("block_table", "seq_lens"):
        args[name] = args[name][:0]
    args["query_start_loc"] = args["query_start_loc"][:1]
    args["out"] = torch.empty(args["out"].shape[2], args["out"].shape[1], 0).transpose(0, 2)
    assert args["out"].stride(2) != 1
    args["lse"] = args["lse"][:0]
    assert ops.paged_attention(**args)[0] is args["out"]


@pytest.mark.parametrize(("call", "args", "name"), CALLS)
def test_float16_among_float32(call: Call, args: Args, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=": expected dtype"):
        call(**{name: args()[name].to(torch.float16)})


@pytest.mark.parametrize("name", ["block_table", "seq_lens", "query_start_loc"])
def test_int64_indices(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{name}: expected dtype int32, got int64"):
        call_attention(**{name: attention_args()[name].long()})


def test_int32_slots() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^slot_mapping: expected dtype int64, got int32"):
        call_cache(slot_mapping=torch.tensor([1, 2, 3], dtype=torch.int32))


@pytest.mark.parametrize("change", [lambda t: t[None], lambda t: t[0], lambda t: t[..., None, None, None, None]])
@pytest.mark.parametrize(("call", "args", "name"), CALLS)
def test_wrong_rank(call: Call, args: Args, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{name}: expected (shape|at most 6 dimensions)"):
        call(**{name: change(args()[name])})


@pytest.mark.parametrize(("call", "args", "name"), CALLS)
def test_wrong_size_on_every_axis(call: Call, args: Args, name: str) -> None:
    good = args()[name]
    for axis in range(good.ndim):
        if (name, axis) in {("k_cache", 0), ("v_cache", 0), ("block_table", 1)}:
            continue  # checked by contents, or where K and V disagree below
        bad = torch.cat([good, good.narrow(axis, 0, 1)], axis)
        with pytest.raises(InvalidArgumentError, match=r"expected .*(got|as)") as caught:
            call(**{name: bad})
        # The first tensor with an axis fixes its size: named is this argument, or what disagrees with it.
        assert caught.value.argument == name or f"(as {name} has)" in str(caught.value)


def test_caches_disagree() -> None:
    k_cache = torch.randn(7, 2, 4, 16)
    with pytest.raises(InvalidArgumentError, match=r"v_cache: expected num_blocks = 7 on axis 0 \(as k_cache has\)"):
        call_attention(k_cache=k_cache)
    with pytest.raises(InvalidArgumentError, match=r"v_cache: expected num_blocks = 7 on axis 0 \(as k_cache has\)"):
        call_cache(k_cache=k_cache)


@pytest.mark.parametrize(("call", "args", "name"), CALLS)
def test_last_axis_not_contiguous(call: Call, args: Args, name: str) -> None:
    if name == "lse":
        return  # one float at a time: any strides
    good = args()[name]
    wide = good.repeat_interleave(2, -1)
    with pytest.raises(InvalidArgumentError, match=f"^{name}: expected a contiguous last axis") as caught:
        call(**{name: wide[..., ::2]})
    assert "stride" in caught.value.got


@pytest.mark.parametrize(("call", "args", "name"), CALLS)
def test_other_devices(call: Call, args: Args, name: str) -> None:
    elsewhere = args()[name].to("meta")
    with pytest.raises(InvalidArgumentError, match=f"^{name}: expected a"):
        call(**{name: elsewhere})


@pytest.mark.parametrize(("call", "args", "name"), CALLS)
def test_sparse(call: Call, args: Args, name: str) -> None:
    sparse = args()[name].to_sparse()
    with pytest.raises(InvalidArgumentError, match=f"^{name}: expected a dense tensor"):
        call(**{name: sparse})


@pytest.mark.parametrize("order", [">", "byte"])
def test_numpy_byte_order_and_odd_strides(order: str) -> None:
    args = {name: t.numpy() for name, t in attention_args().items()}
    if order == ">":
        args["query"] = args["query"].astype(">f4")
        with pytest.raises(InvalidArgumentError, match=r"^query: expected dtype .*'>f'"):
            ops.paged_attention(**args)
    else:
        raw = np.zeros(3 * 4 * 65 + 4, np.uint8)
        args["query"] = np.ndarray((3, 4, 16), np.float32, raw, 0, (4 * 65, 65, 4))
        with pytest.raises(
            InvalidArgumentError, match=r"^query: expected strides that are multiples of the element size"
        ):
            ops.paged_attention(**args)


def test_read_only_outputs() -> None:
    for name in ("out", "lse"):
        args = {key: t.numpy() for key, t in attention_args().items()}
        args[name].flags.writeable = False
        with pytest.raises(InvalidArgumentError, match=f"^{name}: expected writable memory"):
            ops.paged_attention(**args)
    for name in ("k_cache", "v_cache"):
        args = {key: t.numpy() for key, t in cache_args().items()}
        args[name].flags.writeable = False
        with pytest.raises(InvalidArgumentError, match=f"^{name}: expected writable memory"):
            ops.reshape_and_cache(**args)
    frozen = np.zeros((4, 8), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match=r"^kv: expected writable memory"):
        ops.zero_blocks(frozen, np.array([1], np.int32))


def test_outputs_over_inputs() -> None:
    args = attention_args()
    with pytest.raises(InvalidArgumentError, match=r"^out: expected memory apart from query"):
        ops.paged_attention(**{**args, "out": args["query"]})
    with pytest.raises(InvalidArgumentError, match=r"^out: expected memory apart from k_cache"):
        ops.paged_attention(**{**args, "out": args["k_cache"].view(-1)[:192].view(3, 4, 16)})
    with pytest.raises(InvalidArgumentError, match=r"^lse: expected memory apart from out"):
        ops.paged_attention(**{**args, "lse": args["out"].view(-1)[:12].view(3, 4)})
    writes = cache_args()
    with pytest.raises(InvalidArgumentError, match=r"^k_cache: expected memory apart from key"):
        ops.reshape_and_cache(**{**writes, "key": writes["k_cache"][:3, :, 0]})


# Shapes that do not work together


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^query: .* of num_kv_heads = 2, got 3 \(hint: a cache of \(block, "
    ):
        call_attention(query=torch.randn(3, 3, 16), out=torch.zeros(3, 3, 16), lse=torch.zeros(3, 3))


@pytest.mark.parametrize("dim", [0, 257, 512])
def test_head_dims_out_of_range(dim: int) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^query: expected head_dim in \[1, 256\], got {dim}"):
        call_attention(query=torch.randn(3, 4, dim), k_cache=torch.randn(6, 2, 4, dim))
    with pytest.raises(InvalidArgumentError, match=rf"^v_cache: expected v_head_dim in \[1, 256\], got {dim}"):
        call_attention(v_cache=torch.randn(6, 2, 4, dim), out=torch.zeros(3, 4, dim))


@pytest.mark.parametrize("shape", [(6, 0, 4, 16), (6, 2, 0, 16)])
def test_empty_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^k_cache: expected (num_kv_heads|block_size) in \[1, "):
        call_attention(k_cache=torch.zeros(shape), v_cache=torch.zeros(shape))


def test_an_empty_pool() -> None:
    with pytest.raises(BlockError, match=r"expected ids in \[0, 0\)"):
        call_attention(k_cache=torch.zeros(0, 2, 4, 16), v_cache=torch.zeros(0, 2, 4, 16))


# Block ops


def test_block_ops() -> None:
    kv = KVCacheLayout(4, 2, 1, 1, 8, "float32").allocate()
    good = torch.tensor([[1, 2]], dtype=torch.int32)
    cases: list[tuple[Callable[[], None], type[Exception], str]] = [
        (lambda: ops.copy_blocks(3, good), TypeError, "^kv: expected a tensor.*got int"),
        (lambda: ops.copy_blocks([kv, "x"], good), TypeError, "^kv: expected a tensor.*got str"),
        (lambda: ops.copy_blocks(torch.zeros(4), good), InvalidArgumentError, r"^kv: expected \[num_blocks, ...\]"),
        (lambda: ops.copy_blocks(kv, [[1, 2]]), TypeError, "^pairs: expected a tensor.*got list"),
        (lambda: ops.copy_blocks(kv, good.long()), InvalidArgumentError, "^pairs: expected dtype int32, got int64"),
        (lambda: ops.copy_blocks(kv, good[0]), InvalidArgumentError, "^pairs: expected shape"),
        (lambda: ops.copy_blocks(kv, torch.zeros(1, 3, dtype=torch.int32)), InvalidArgumentError, "^pairs: expected"),
        (lambda: ops.copy_blocks(kv, good.repeat(2, 2)[:, :2]), InvalidArgumentError, "^pairs: expected contiguous"),
        (lambda: ops.copy_blocks(kv, good, num_threads=0), InvalidArgumentError, "^num_threads: expected 1 or more"),
        (lambda: ops.zero_blocks(kv, good), InvalidArgumentError, "^blocks: expected shape"),
        (lambda: ops.zero_blocks(kv, good[0].float()), InvalidArgumentError, "^blocks: expected dtype int32"),
        (lambda: ops.zero_blocks(None, good[0]), TypeError, "^kv: expected a tensor"),
        (
            lambda: ops.zero_blocks(kv, good.repeat(1, 2)[0, ::2]),
            InvalidArgumentError,
            "^blocks: expected a contiguous",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


# What the memory behind a tensor may be


def test_a_refused_array_is_given_back() -> None:
    array = np.zeros((3, 4, 16), np.float64)
    before = sys.getrefcount(array)
    for _ in range(5):
        with pytest.raises(InvalidArgumentError):
            call_attention(query=array)
    assert sys.getrefcount(array) == before


def test_a_tensor_without_storage_is_refused() -> None:
    query = torch.randn(3, 4, 16)
    query.untyped_storage().resize_(0)
    with pytest.raises(InvalidArgumentError, match=r"^query: expected a tensor with memory behind it"):
        call_attention(query=query)


def test_misaligned_memory_is_refused() -> None:
    query = np.frombuffer(bytes(3 * 4 * 16 * 4 + 1), np.uint8)[1:].view(np.float32).reshape(3, 4, 16)
    with pytest.raises(InvalidArgumentError, match=r"^query: expected memory aligned"):
        call_attention(query=query)


def test_written_memory_has_a_place_for_each_element() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^out: expected memory of its own for every element, got stride 0"):
        call_attention(out=torch.zeros(1, 4, 16).expand(3, 4, 16))
    with pytest.raises(InvalidArgumentError, match=r"^v_cache: expected memory of its own"):
        call_cache(v_cache=torch.zeros(6, 1, 4, 16).expand(6, 2, 4, 16))


@pytest.mark.parametrize("output", ["out", "lse"])
@pytest.mark.parametrize("name", ["block_table", "seq_lens", "query_start_loc", "block_table_rows"])
def test_indices_are_not_written_over(output: str, name: str) -> None:
    """They are checked before the first row is written, and followed after it."""
    args = {**attention_args(), "block_table_rows": int32(0, 1)}
    args["out"] = torch.zeros(3, 4, 16)
    memory = args[output].view(-1)[: args[name].numel()].view(torch.int32).view(args[name].shape)
    memory.copy_(args[name])
    with pytest.raises(InvalidArgumentError, match=f"^{output}: expected memory apart from {name}, got overlapping"):
        ops.paged_attention(**{**args, name: memory})


def test_buffers_without_a_dtype() -> None:
    """A memoryview has a shape and no dtype: an output for it is a NumPy array."""
    args = {name: t.numpy() for name, t in attention_args().items() if name not in ("out", "lse")}
    want, want_lse = ops.paged_attention(**args, return_lse=True)
    got, lse = ops.paged_attention(**{**args, "query": memoryview(args["query"])}, return_lse=True)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(lse, want_lse)
    views = {name: memoryview(array) for name, array in args.items()}
    np.testing.assert_array_equal(ops.paged_attention(**views), want)
    # ctypes shows no strides, whatever it is asked for.
    views["block_table"] = ((ctypes.c_int32 * 2) * 2)((3, 1), (2, 5))
    views["seq_lens"] = (ctypes.c_int32 * 2)(5, 8)
    np.testing.assert_array_equal(ops.paged_attention(**views), want)
    with pytest.raises(InvalidArgumentError, match=r"^seq_lens: expected shape \[num_seqs\], got \[\]"):
        ops.paged_attention(**{**views, "seq_lens": ctypes.c_int32(5)})

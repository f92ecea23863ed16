"""The ops as torch operators: schemas, fakes, torch.compile, and who imports what."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pagedcore.torch
import pytest
import torch
from pagedcore import _kernels, ops
from pagedcore.errors import InvalidArgumentError
from pagedcore.layout import KVCacheLayout


def make_call(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Arguments of one small mixed batch: (query, k_cache, v_cache, block_table, seq_lens, query_start_loc)."""
    torch.manual_seed(0)
    cache = torch.randn(2, 6, 2, 4, 16).to(dtype)
    table = torch.tensor([[3, 1], [2, 5]], dtype=torch.int32)
    lengths = torch.tensor([5, 8], dtype=torch.int32)
    return (
        torch.randn(4, 4, 16).to(dtype),
        cache[0].clone(),
        cache[1].clone(),
        table,
        lengths,
        torch.tensor([0, 1, 4], dtype=torch.int32),
    )


def described(signature: inspect.Signature) -> list[tuple[str, bool, bool]]:
    """Each argument's name, whether it may be given by position, and whether it may be left out."""
    return [(p.name, p.kind != p.KEYWORD_ONLY, p.default is not p.empty) for p in signature.parameters.values()]


def described_stub(name: str) -> list[tuple[str, bool, bool]]:
    stub = ast.parse(Path(pagedcore.torch.__file__).with_name("_kernels.pyi").read_text())
    function = next(node for node in stub.body if isinstance(node, ast.FunctionDef) and node.name == name)
    arguments = function.args
    required = len(arguments.args) - len(arguments.defaults)
    by_position = [(a.arg, True, i >= required) for i, a in enumerate(arguments.args)]
    return by_position + [
        (a.arg, False, default is not None)
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]


def described_schema(name: str) -> list[tuple[str, bool, bool]]:
    schema = getattr(torch.ops.pagedcore, name).default._schema  # torch has no public way
    return [(a.name, not a.kwarg_only, a.has_default_value()) for a in schema.arguments]


# What only the passes of a cascade have, which call the kernels themselves: torch's operators are without.
OF_PASSES = {name: [("shared_tokens", False, True)] for name in ("paged_attention", "plan_attention")}


@pytest.mark.parametrize("name", sorted(pagedcore.torch.OPERATORS))
def test_arguments_are_the_same_everywhere(name: str) -> None:
    """The signature as text, the stub and torch's schema; and what the kernel really takes."""
    kernel = getattr(_kernels, name)
    arguments = described(inspect.signature(kernel))
    assert described_stub(name) == arguments
    assert described_schema(name) + OF_PASSES.get(name, []) == arguments
    names, by_position = [a[0] for a in arguments], [a for a in arguments if a[1]]
    required = [n for n, _, optional in arguments if not optional]
    with pytest.raises(TypeError, match=rf"takes {len(by_position)} positional arguments"):
        kernel(*names, None)
    for missing in required:
        with pytest.raises(TypeError, match=f"missing required argument: '{missing}'"):
            kernel(**dict.fromkeys(n for n in names if n != missing))
    with pytest.raises(TypeError, match=r"expected a (tensor|str)|not iterable"):  # the optional ones are
        kernel(**dict.fromkeys(required))


@pytest.mark.parametrize("name", sorted(pagedcore.torch.COMPOSED))
def test_arguments_of_composed_operators_are_those_of_their_functions(name: str) -> None:
    assert described_schema(name) == described(inspect.signature(pagedcore.torch.COMPOSED[name][1]))


def test_opcheck_paged_attention() -> None:
    args = make_call()
    out, lse = torch.empty(4, 4, 16), torch.empty(4, 4)
    torch.library.opcheck(torch.ops.pagedcore.paged_attention.default, (*args, out))
    torch.library.opcheck(
        torch.ops.pagedcore.paged_attention.default, (*args, out, lse), {"window": 3, "split_size": 2, "scale": 0.3}
    )
    features = {"softcap": 2.0, "alibi_slopes": torch.rand(4), "sinks": torch.randn(4)}
    torch.library.opcheck(torch.ops.pagedcore.paged_attention.default, (*args, out, lse), features)


def test_opcheck_cache_ops() -> None:
    _, k_cache, v_cache, *_ = make_call()
    slots = torch.tensor([3, -1, 9])
    torch.library.opcheck(
        torch.ops.pagedcore.reshape_and_cache.default,
        (torch.randn(3, 2, 16), torch.randn(3, 2, 16), k_cache, v_cache, slots),
    )
    pairs = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.pagedcore.copy_blocks.default, ([k_cache, v_cache], pairs))
    torch.library.opcheck(torch.ops.pagedcore.zero_blocks.default, ([k_cache, v_cache], pairs[0].contiguous()))


def test_opcheck_staging_ops() -> None:
    cache = torch.randn(6, 2, 4, 16)
    blocks, staging = torch.tensor([2, 5], dtype=torch.int32), torch.zeros(2, cache[0].nbytes, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.pagedcore.gather_blocks.default, ([cache], blocks, staging))
    torch.library.opcheck(torch.ops.pagedcore.scatter_blocks.default, ([cache], blocks, staging))
    table, updates = torch.zeros(3, 4, dtype=torch.int32), torch.tensor([[1, 2, 3]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.pagedcore.update_block_table.default, (table, updates))


def test_opcheck_plan() -> None:
    *_, lengths, starts = make_call()
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "v_head_dim": 16, "num_tokens": 4, "max_query_len": 3}
    plan = torch.empty(0, dtype=torch.uint8)
    torch.library.opcheck(
        torch.ops.pagedcore.plan_attention.default, (lengths, starts, plan), {**shape, "dtype": "float32"}
    )
    args, out = make_call(), torch.empty(4, 4, 16)
    options = {"plan": plan, "workspace": torch.empty(64, dtype=torch.uint8)}
    torch.library.opcheck(torch.ops.pagedcore.paged_attention.default, (*args, out), options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler about its own modules
def test_compile_fullgraph_equals_eager() -> None:
    args = make_call()
    key, value, slots = torch.randn(4, 2, 16), torch.randn(4, 2, 16), torch.tensor([13, 20, 21, 22])

    def step(
        query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ops.reshape_and_cache(key, value, k_cache, v_cache, slots)
        out, lse = ops.paged_attention(query * 2, k_cache, v_cache, *index, return_lse=True, window=4)
        return out + 1, lse

    eager_args = [a.clone() for a in args]
    compiled_args = [a.clone() for a in args]
    want = step(*eager_args)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled_args)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(compiled_args[1], eager_args[1], rtol=0, atol=0)


def test_compile_block_ops() -> None:
    kv = KVCacheLayout(4, 2, 1, 1, 8, torch.float32).allocate()
    kv.data.random_()
    before = kv.data.clone()

    def step(data: torch.Tensor, pairs: torch.Tensor, blocks: torch.Tensor) -> None:
        ops.zero_blocks(data, blocks)
        ops.copy_blocks(data, pairs)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(kv.data, torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32))
    assert (kv.data[2] == before[1]).all()
    assert (kv.data[3] == 0).all()


def test_fake_tensors_pass_without_data() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        args = [mode.from_tensor(a) for a in make_call()]
        out, lse = ops.paged_attention(*args, return_lse=True)
    assert out.shape == (4, 4, 16)
    assert lse.dtype == torch.float32


def test_fake_tensors_of_a_gpu_pass_without_one() -> None:
    """No driver is asked, no device memory is looked at."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        args = [torch.empty(a.shape, dtype=a.dtype, device="cuda") for a in make_call()]
        out, lse = ops.paged_attention(*args, return_lse=True, plan=torch.empty(16, dtype=torch.uint8, device="cuda"))
        assert (out.device.type, out.shape) == ("cuda", (4, 4, 16))
        assert (lse.device.type, lse.dtype) == ("cuda", torch.float32)
        key, slots = torch.empty(4, 2, 16, device="cuda"), torch.empty(4, dtype=torch.int64, device="cuda")
        ops.reshape_and_cache(key, key, args[1], args[2], slots)
        blocks = torch.empty(2, dtype=torch.int32, device="cuda")
        ops.zero_blocks([args[1]], blocks)
        ops.gather_blocks([args[1]], blocks, torch.empty(2, args[1][0].nbytes, dtype=torch.uint8, device="cuda"))
        ops.update_block_table(args[3], torch.empty(3, 3, dtype=torch.int32, device="cuda"))


def test_dispatcher_is_asked_only_when_needed() -> None:
    assert not ops.any_subclass(torch.empty(1), torch.nn.Parameter(torch.empty(1)), object(), None, np.ones(2))
    assert ops.any_subclass(None, torch.empty(1).as_subclass(Traced))


class Traced(torch.Tensor):
    """A subclass that notes which operators it meets."""

    seen: list[str]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


def test_what_is_tried_is_left_alone_where_torch_must_see_it() -> None:
    cache, key, slots = torch.zeros(2, 6, 2, 4, 16), torch.ones(4, 2, 16), torch.arange(4)
    assert not _kernels.try_reshape_and_cache(key.as_subclass(Traced), key, *cache, slots, None, None, None)
    assert not cache.any()
    assert _kernels.try_reshape_and_cache(key, key, *cache, slots, None, None, None)
    assert cache.sum() == 2 * key.sum()


def test_every_tensor_argument_is_looked_at() -> None:
    """A subclass in any place makes a call go through the dispatcher."""
    args = make_call()
    options = {"out": torch.zeros(4, 4, 16), "lse": torch.zeros(4, 4)}
    options |= {"alibi_slopes": torch.zeros(4), "sinks": torch.zeros(4)}
    for i in range(len(args)):
        Traced.seen = []
        ops.paged_attention(*(a.as_subclass(Traced) if i == j else a for j, a in enumerate(args)), **options)
        assert Traced.seen[-1] == "pagedcore.paged_attention.default", i
    for name, tensor in options.items():
        Traced.seen = []
        ops.paged_attention(*args, **{**options, name: tensor.as_subclass(Traced)})
        assert Traced.seen[-1] == "pagedcore.paged_attention.default", name
    key, slots = torch.randn(4, 2, 16), torch.arange(4)
    writes = [key, key, args[1], args[2], slots]
    for i in range(len(writes)):
        Traced.seen = []
        ops.reshape_and_cache(*(a.as_subclass(Traced) if i == j else a for j, a in enumerate(writes)))
        assert Traced.seen[-1] == "pagedcore.reshape_and_cache.default", i
    pairs = torch.tensor([[1, 2]], dtype=torch.int32)
    for caches, index in (([args[1], args[2].as_subclass(Traced)], pairs), ([args[1]], pairs.as_subclass(Traced))):
        Traced.seen = []
        ops.copy_blocks(caches, index)
        ops.zero_blocks(caches, index[0].as_subclass(type(index)))
        assert [name for name in Traced.seen if "pagedcore" in name] == [
            "pagedcore.copy_blocks.default",
            "pagedcore.zero_blocks.default",
        ]


FAKE_FAULTS = [
    ("query", lambda t: t[0], "expected shape"),
    ("query", lambda t: t.double(), "expected dtype"),
    ("query", lambda t: t[:, :3], "multiple of num_kv_heads"),
    ("query", lambda t: t[..., :8], "expected head_dim = 8"),
    ("k_cache", lambda t: t.half(), "expected dtype"),
    ("v_cache", lambda t: t[:, :, :3], "expected block_size = 4"),
    ("v_cache", lambda t: t[:5], "expected num_blocks = 6"),
    ("block_table", lambda t: t.long(), "expected dtype"),
    ("block_table", lambda t: t[0], "expected shape"),
    ("seq_lens", lambda t: t[:1], "expected num_seqs = "),
    ("seq_lens", lambda t: t.float(), "expected dtype"),
    ("query_start_loc", lambda t: t[:2], "one entry more"),
    ("out", lambda t: t[:3], "expected num_tokens = 4"),
    ("out", lambda t: t.bfloat16(), "expected dtype"),
    ("lse", lambda t: t.double(), "expected dtype"),
    ("lse", lambda t: t[:, :3], "expected num_heads = 4"),
    ("alibi_slopes", lambda t: t[:3], "expected num_heads = 4"),
    ("alibi_slopes", lambda t: t.half(), "expected dtype"),
    ("sinks", lambda t: t[None], "expected shape"),
    ("sinks", lambda t: t.double(), "expected dtype"),
]


@pytest.mark.parametrize(("name", "change", "message"), FAKE_FAULTS)
def test_fakes_refuse_what_the_kernels_refuse(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    names = ["query", "k_cache", "v_cache", "block_table", "seq_lens", "query_start_loc", "out", "lse"]
    args = dict(zip(names, (*make_call(), torch.zeros(4, 4, 16), torch.zeros(4, 4)), strict=True))
    args |= {"alibi_slopes": torch.zeros(4), "sinks": torch.zeros(4)}
    args[name] = change(args[name])
    if name == "query" and args[name].shape[1:2] == (3,):
        args["out"], args["lse"] = args["out"][:, :3], args["lse"][:, :3]
        del args["alibi_slopes"], args["sinks"]
    with pytest.raises(InvalidArgumentError):
        ops.paged_attention(**args)
    with FakeTensorMode() as mode:
        fakes = {key: mode.from_tensor(value) for key, value in args.items()}
        with pytest.raises(InvalidArgumentError, match=message):
            ops.paged_attention(**fakes)


def test_fakes_of_cache_ops_refuse_too() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        cache, key = torch.empty(6, 2, 4, 16), torch.empty(3, 2, 16)
        slots, pairs = torch.empty(3, dtype=torch.int64), torch.empty(2, 2, dtype=torch.int32)
        ops.reshape_and_cache(key, key, cache, cache, slots)
        ops.copy_blocks([cache], pairs)
        rows, lse = torch.empty(3, 4, 16), torch.empty(3, 4)
        state = (rows, lse, rows, lse)
        ops.merge_states(*state, out=rows, lse=lse)
        lens, starts, plan = pairs[0], torch.empty(3, dtype=torch.int32), torch.empty(9, dtype=torch.uint8)
        step = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "max_query_len": 1, "out": plan}
        shared = {"num_shared_blocks": 1, "block_size": 4}
        ops.plan_attention(lens, starts, **step)
        ops.plan_cascade(lens, starts, **step, **shared)
        for call in (
            lambda: ops.merge_states(*state, out=rows[:2]),
            lambda: ops.merge_states(*state, out=rows.half()),
            lambda: ops.merge_states(*state, lse=lse[:, :3]),
            lambda: ops.plan_attention(lens, starts[:2], **step),
            lambda: ops.plan_attention(lens.long(), starts, **step),
            lambda: ops.plan_cascade(lens, starts[:2], **step, **shared),
            lambda: ops.reshape_and_cache(key, key[:2], cache, cache, slots),
            lambda: ops.reshape_and_cache(key, key, cache, cache, slots.int()),
            lambda: ops.copy_blocks([cache], pairs[:, :1]),
            lambda: ops.copy_blocks([cache], pairs.long()),
            lambda: ops.copy_blocks([torch.empty(3)], pairs),
            lambda: ops.zero_blocks([cache], pairs),
            lambda: ops.gather_blocks([cache], pairs, key),
            lambda: ops.scatter_blocks([cache], pairs[0].long(), key),
            lambda: ops.update_block_table(pairs, pairs),
            lambda: ops.update_block_table(pairs.long(), torch.empty(2, 3, dtype=torch.int32)),
        ):
            with pytest.raises(InvalidArgumentError, match="expected"):
                call()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler about its own modules
def test_compile_with_symbolic_sizes() -> None:
    """The checks of the fakes become guards, and hold for other sizes too."""

    def step(query: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return ops.paged_attention(query, *rest) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    args = make_call()
    torch.testing.assert_close(compiled(*args), step(*args), rtol=0, atol=0)
    longer = (*args[:3], args[3].repeat(2, 1), args[4].repeat(2), torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32))
    torch.testing.assert_close(compiled(*longer), step(*longer), rtol=0, atol=0)


def test_numpy_callers_never_import_torch() -> None:
    code = """
import sys
import numpy as np
from pagedcore import ops
from pagedcore.errors import InvalidArgumentError
from pagedcore.layout import KVCacheLayout
kv = KVCacheLayout(3, 4, 1, 1, 8, "float32").allocate()
k, v = kv.layer(0)
ones = np.ones((2, 1, 8), np.float32)
ops.reshape_and_cache(ones, ones, k, v, np.array([4, 5]))
ids = lambda *x: np.array(x, np.int32)
out = ops.paged_attention(ones[:1], k, v, ids([1]).reshape(1, 1), ids(2), ids(0, 1))
assert (out == 1).all()
ops.copy_blocks(kv, ids(1, 2).reshape(1, 2)); ops.zero_blocks(kv, ids(1))
assert (k[2, 0, :2] == 1).all() and (k[1] == 0).all()
assert "torch" not in sys.modules
from pagedcore import _kernels
assert _kernels.thread_runtime() == "own threads", _kernels.thread_runtime()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_torch_that_is_there_before_registers_at_once() -> None:
    code = """
import torch
from pagedcore import ops
import sys
assert "pagedcore.torch" in sys.modules and torch.ops.pagedcore.zero_blocks
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_first_torch_tensor_registers() -> None:
    code = """
from pagedcore import ops
import sys, torch
assert "pagedcore.torch" not in sys.modules
ops.zero_blocks(torch.ones(2, 3), torch.tensor([1], dtype=torch.int32))
assert torch.ops.pagedcore.zero_blocks
from pagedcore import _kernels
assert "gomp" in _kernels.thread_runtime() or "omp" in _kernels.thread_runtime(), _kernels.thread_runtime()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

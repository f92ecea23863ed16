"""Cases of attention for the sweeps over the kernels, on the CPU and under the host shim.

An axis is one line of AXES. `build` makes the tensors; an axis of OPTIONS is an argument of the op and of the oracle,
and goes to both as it stands, or as its function makes it of the number of heads.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from codes import GRANULARITIES, Quantized
from pairwise import Case, Rule, completed, covering_arrays
from reference import GARBAGE, Answer, Batch, make_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

TILED_HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)


def _page(offset: int) -> Callable[[int, int], int]:
    """The first length from query_len on that is a multiple of the block size, plus an offset; at least query_len."""
    return lambda query_len, block_size: max(query_len, -(-query_len // block_size) * block_size + offset)


def _power(offset: int) -> Callable[[int, int], int]:
    """A power of two, plus an offset."""
    return lambda query_len, block_size: max(64, 1 << (query_len + 1).bit_length()) + offset


def _at_least(length: int) -> Callable[[int, int], int]:
    return lambda query_len, block_size: max(query_len, length)


# Tokens in the cache, from query_len and block_size.
LENGTHS: dict[str, Callable[[int, int], int]] = {
    "0": lambda query_len, block_size: 0,  # a padded row
    "1": _at_least(1),  # with more queries: a whole prompt
    "page-1": _page(-1),
    "page": _page(0),
    "page+1": _page(1),
    "2^k-1": _power(-1),
    "2^k+1": _power(1),
    "65": _at_least(65),
    "4097": _at_least(4097),
}


def _slopes(num_heads: int) -> torch.Tensor:
    """As ALiBi's paper has them: 2^-(8 / n), 2^-(16 / n), ..."""
    return 2.0 ** (-8.0 * torch.arange(1, num_heads + 1) / num_heads)


def _sinks(num_heads: int) -> torch.Tensor:
    return torch.linspace(-2, 4, num_heads)


AXES: dict[str, Sequence[Any]] = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "head_dim": (*TILED_HEAD_DIMS, 33),
    "v_head_dim": (None, 40),  # None: as wide as K
    "heads": ((1, 1), (8, 8), (32, 8), (64, 8), (28, 4), (71, 1)),
    "length": tuple(LENGTHS),
    "query_len": (1, 2, 5, 16, 17, 128, 300),
    "block_size": (1, 3, 16, 32, 128),
    "order": ("HND", "NHD", "strided", "heads first", "block-major"),
    "codes": (None, *GRANULARITIES),  # of e4m3, with scales of these
    "companions": ("none", "empty", "shared pages", "mixed"),
    "causal": (True, False),
    "window": (None, 1, 16, 100, 10_000),
    "softcap": (0.0, 1.5),
    "alibi_slopes": (None, _slopes),
    "sinks": (None, _sinks),
    "split_size": (None, 0, 64, 192),
}
OPTIONS = ("causal", "window", "softcap", "alibi_slopes", "sinks")
HINTS = ("split_size",)  # of the op alone: the result does not depend on them

# For `Answer.check`, where weights are rounded to 16 bits, instead of 2: among so many rows there are some in which the
# best algorithm happens to be exact. With weights of float32 there are none.
ROW_FACTOR_16_BITS = 4
# Over codes weights times scales are rounded, where what a result is compared with rounds weights: a row of
# few keys beside a sink has an error of its own, however small the other's is.
ROW_FACTOR_CODES = 8

# Rows of 16 times tokens times KV heads, at a head size of 128: a second's work is about 255,000 under the shim.
MOST_WORK = 100_000


def work(heads: tuple[int, int], head_dim: int, query_len: int, seq_len: int) -> float:
    num_heads, num_kv_heads = heads
    tiles = -(-query_len * (num_heads // num_kv_heads) // 16)
    return tiles * max(seq_len, 64) * num_kv_heads * head_dim / 128


def affordable(heads: tuple[int, int], head_dim: int, query_len: int, length: str, *, most: float = MOST_WORK) -> bool:
    return work(heads, head_dim, query_len, LENGTHS[length](query_len, 128)) <= most


RULES = [
    Rule(("heads", "head_dim", "query_len", "length"), affordable),
    Rule(("length", "query_len", "heads"), lambda length, q, heads: length != "4097" or q < 128 or heads == (1, 1)),
    Rule(("length", "block_size"), lambda length, block_size: length != "4097" or block_size > 3),  # a table of 4,097
]


@dataclass(frozen=True)
class Call:
    """One case, made: what is passed, and what the oracle is told."""

    batch: Batch
    exact: Batch  # with what the codes of a cache stand for
    options: dict[str, Any]  # of the op and of the oracle
    hints: dict[str, Any] = field(default_factory=dict)  # of the op alone

    def answer(self, *, whole_references: bool = False) -> Answer:
        return Answer.of(self.exact, whole_references=whole_references, **self.options)


def case_id(case: Case) -> str:
    """Such as ``float16-64-8x2-page+1-5-16-HND``: what is not None or False, in the order of the axes."""

    def text(name: str, value: Any) -> str:
        if callable(value) or value is True:
            return name
        return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")

    return "-".join(text(*item) for item in case.items() if item[1] is not None and item[1] is not False)


def build(case: Case, *, seed: int = 0) -> Call:
    """The tensors of a case. The same case and seed give the same."""
    block_size, query_len, window = case["block_size"], case["query_len"], case["window"]
    seq_lens, query_lens = [LENGTHS[case["length"]](query_len, block_size)], [query_len]
    companions = case["companions"]
    if companions == "empty":
        seq_lens, query_lens = [0, *seq_lens, 0, 20], [1, *query_lens, 1, 0]
    elif companions == "shared pages":
        seq_lens, query_lens = [*seq_lens, seq_lens[0] + 3], [*query_lens, 2]
    elif companions == "mixed":
        seq_lens, query_lens = [130, *seq_lens, 21], [1, *query_lens, 21]
    order = case["order"]
    batch = make_batch(
        seq_lens,
        query_lens,
        dtype=case["dtype"],
        heads=case["heads"],
        head_dim=case["head_dim"],
        v_head_dim=case["v_head_dim"],
        block_size=block_size,
        order="HND" if order == "block-major" else order,
        window=window,
        seed=seed,
    )
    if order == "block-major":
        batch.k_cache, batch.v_cache = block_major(batch.k_cache, batch.v_cache)
    if companions == "shared pages":
        share_pages(batch, block_size)
    num_heads = case["heads"][0]
    options = {name: case[name](num_heads) if callable(case[name]) else case[name] for name in OPTIONS}
    hints = {name: case[name] for name in HINTS}
    if case["codes"] is None:
        return Call(batch, batch, options, hints)
    quantized = Quantized(batch, case["codes"])
    of_codes = quantized.of_codes
    of_codes.k_cache = in_strides_of(batch.k_cache, of_codes.k_cache)
    of_codes.v_cache = in_strides_of(batch.v_cache, of_codes.v_cache)
    k_scale, v_scale = quantized.scales
    return Call(of_codes, quantized.exact, options, {**hints, "k_scale": k_scale, "v_scale": v_scale})


def in_strides_of(cache: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The codes in the strides, in elements, that the cache has, and NaN between them."""
    size = cache.untyped_storage().nbytes() // cache.element_size()
    memory = torch.full((size,), 0x7F, dtype=torch.uint8)
    return memory.as_strided(cache.shape, cache.stride(), cache.storage_offset()).copy_(codes)


def block_major(k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches as one layer of a pool in which a block holds K and V of all layers, as `KVCacheLayout` has it."""
    layers, layer = 3, 1
    k_size, v_size = k_cache[0].numel(), v_cache[0].numel()
    pool = torch.full((len(k_cache), layers, k_size + v_size), float("nan"), dtype=k_cache.dtype)
    k = pool[:, layer, :k_size].unflatten(1, k_cache.shape[1:])
    v = pool[:, layer, k_size:].unflatten(1, v_cache.shape[1:])
    k.copy_(k_cache)
    v.copy_(v_cache)
    return k, v


def share_pages(batch: Batch, block_size: int) -> None:
    """The last sequence gets the full pages of the first, as after a prefix hit."""
    first, last = batch.block_table[0], batch.block_table[-1]
    full = int(batch.seq_lens[0]) // block_size
    known = (first[:full] != GARBAGE) & (last[:full] != GARBAGE)
    last[:full][known] = first[:full][known]


def cases(axes: Mapping[str, Sequence[Any]], rules: Sequence[Rule] = (), *, count: int = 1) -> list[Case]:
    """Covering arrays, whole, until there are at least so many cases."""
    found: list[Case] = []
    arrays = covering_arrays(axes, [*RULES, *rules])
    while len(found) < count:
        found += next(arrays)
    return found


def product(names: Sequence[str], axes: Mapping[str, Sequence[Any]], rules: Sequence[Rule] = ()) -> list[Case]:
    """Every combination of these axes that the rules allow; the others are drawn at random, the same each time."""
    rng = random.Random(0)
    combinations = (dict(zip(names, values, strict=True)) for values in itertools.product(*(axes[n] for n in names)))
    found = (completed(combination, axes, [*RULES, *rules], rng) for combination in combinations)
    return [case for case in found if case is not None]

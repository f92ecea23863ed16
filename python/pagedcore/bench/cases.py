"""Which attention is measured on a GPU, and what each case must move and compute at least.

A case is shapes alone; `pagedcore.bench.batch` makes its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pagedcore.layout import ITEM_SIZES

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Heads:
    """The heads of a model's layer."""

    name: str
    query: int
    kv: int
    dim: int

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return self.query // self.kv


LLAMA_8B = Heads("llama-3-8b", 32, 8, 128)
LLAMA_70B = Heads("llama-3-70b", 64, 8, 128)
MHA = Heads("mha", 32, 32, 128)
MQA = Heads("mqa", 32, 1, 128)
ALL_HEADS = (LLAMA_8B, LLAMA_70B, MHA, MQA)


@dataclass(frozen=True)
class Case:
    """A batch: how many query tokens, and how many tokens in the cache with them, each sequence has. Causal."""

    kind: str  # decode, prefill, mixed
    heads: Heads
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    dtype: str = "bfloat16"
    kv_format: str = "auto"
    granularity: str = "tensor"

    @property
    def name(self) -> str:
        """Such as ``decode llama-3-8b 64 x 8192``: sequences and tokens of each."""
        longest = max(self.query_lens)
        chunks = self.query_lens.count(longest)
        what = f"{self.kind} {self.heads.name} "
        if self.kind == "mixed" and chunks < len(self.seq_lens):
            at = self.query_lens.index(longest)
            decoding = len(self.seq_lens) - chunks
            what += f"{decoding} x {self.seq_lens[0]} + {chunks} x {longest} of {self.seq_lens[at]}"
        else:
            what += f"{len(self.seq_lens)} x {self.seq_lens[0]}"
            what += f" last {longest}" if 1 < longest < self.seq_lens[0] else ""
        return what + (f" fp8/{self.granularity}" if self.kv_format != "auto" else "")

    @property
    def tokens(self) -> int:
        """Query tokens."""
        return sum(self.query_lens)

    @property
    def item_size(self) -> int:
        """Bytes of an element of K or V."""
        return ITEM_SIZES[self.dtype] if self.kv_format == "auto" else 1

    @property
    def kv_bytes(self) -> int:
        """K and V of every sequence once, with the scales that lie with each token."""
        row = 2 * self.heads.kv * self.heads.dim * self.item_size
        if self.kv_format != "auto" and self.granularity == "token":
            row += 2 * self.heads.kv * 4
        return sum(self.seq_lens) * row

    @property
    def bytes(self) -> int:
        """The least that must move: K and V read once, the queries read, the output written."""
        return self.kv_bytes + 2 * self.tokens * self.heads.query * self.heads.dim * ITEM_SIZES[self.dtype]

    @property
    def flops(self) -> int:
        """Of the two products, for the keys that each query sees; a multiplication and an addition are two."""
        keys = sum(visible_keys(q, n) for q, n in zip(self.query_lens, self.seq_lens, strict=True))
        return 4 * self.heads.query * self.heads.dim * keys

    @property
    def alike(self) -> bool:
        """Whether all sequences have the same lengths."""
        return len(set(zip(self.query_lens, self.seq_lens, strict=True))) == 1


def visible_keys(query_len: int, seq_len: int) -> int:
    """Pairs of a query and a key that it sees: query i of a sequence sees the first seq_len - query_len + i + 1."""
    return query_len * (seq_len - query_len) + query_len * (query_len + 1) // 2


@dataclass(frozen=True)
class Grid:
    """The sizes of everything that is measured."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    first: tuple[tuple[Heads, int, int], ...]  # (heads, batch, context): decode that matters most
    prompts: tuple[tuple[Heads, int, int], ...]  # (heads, prompts, tokens of each)
    chunk: tuple[int, int]  # query tokens, of so many
    decoding: tuple[int, int]  # sequences beside that chunk, tokens of each
    fp8: tuple[int, int]  # batch, context
    splits: tuple[int, ...]  # fixed split sizes
    pool_bytes: int  # of the pool that is read in both orders
    pool_layers: int
    pool: tuple[int, int]  # batch and context of what is read there
    moved: tuple[int, ...]  # tokens of cache ops
    copy_bytes: int
    product: int  # rows and columns of the product that is the yardstick of prefill


FULL = Grid(
    batches=(1, 4, 16, 64, 256),
    contexts=(1 << 10, 8 << 10, 32 << 10, 128 << 10),
    first=(
        (LLAMA_8B, 64, 8 << 10),
        (LLAMA_8B, 1, 1 << 10),
        (LLAMA_70B, 64, 8 << 10),
        (LLAMA_8B, 256, 1 << 10),
        (LLAMA_8B, 1, 128 << 10),
        (LLAMA_8B, 16, 32 << 10),
        (MHA, 64, 8 << 10),
        (MQA, 64, 8 << 10),
    ),
    prompts=((LLAMA_8B, 1, 16 << 10), (LLAMA_70B, 1, 16 << 10), (LLAMA_8B, 8, 2 << 10), (MHA, 1, 8 << 10)),
    chunk=(2 << 10, 16 << 10),
    decoding=(63, 4 << 10),
    fp8=(64, 8 << 10),
    splits=(0, 512, 2048),
    pool_bytes=96 << 30,
    pool_layers=32,
    pool=(64, 8 << 10),
    moved=(256, 8 << 10),
    copy_bytes=4 << 30,
    product=8192,
)
#: A few cases of `FULL`, at its sizes.
QUICK = replace(
    FULL,
    batches=(),
    contexts=(),
    first=FULL.first[:2],
    prompts=FULL.prompts[2:3],
    splits=(0,),
    pool_bytes=8 << 30,
    moved=(256,),
    copy_bytes=1 << 30,
)
TINY = Grid(
    batches=(1, 3),
    contexts=(16, 50),
    first=((LLAMA_8B, 3, 50), (LLAMA_8B, 1, 16)),
    prompts=((LLAMA_8B, 1, 40), (MHA, 2, 20)),
    chunk=(20, 50),
    decoding=(2, 30),
    fp8=(2, 40),
    splits=(0, 64),
    pool_bytes=8 << 20,
    pool_layers=4,
    pool=(2, 40),
    moved=(20,),
    copy_bytes=1 << 20,
    product=64,
)


def decode(heads: Heads, batch: int, context: int, kv_format: str = "auto", granularity: str = "tensor") -> Case:
    """One query token each."""
    return Case("decode", heads, (1,) * batch, (context,) * batch, kv_format=kv_format, granularity=granularity)


def main_cases(grid: Grid) -> list[Case]:
    """The decode batches that matter most, prompts, and a chunk alone and beside decoding sequences."""
    chunk, of = grid.chunk
    batch, context = grid.decoding
    cases = [decode(heads, batch, context) for heads, batch, context in grid.first]
    cases += [Case("prefill", heads, (n,) * count, (n,) * count) for heads, count, n in grid.prompts]
    cases += [Case("prefill", LLAMA_8B, (chunk,), (of,))]
    cases += [Case("mixed", LLAMA_8B, (1,) * batch + (chunk,), (context,) * batch + (of,))]
    return cases


def decode_grid(grid: Grid) -> Iterator[Case]:
    """Every batch and context with every shape, but for what `main_cases` has."""
    seen = set(grid.first)
    for heads in ALL_HEADS:
        for batch in grid.batches:
            for context in grid.contexts:
                if (heads, batch, context) not in seen:
                    yield decode(heads, batch, context)


def shown_to_slow_starters(grid: Grid) -> list[Case]:
    """The cases for libraries that compile anew for each shape: one of decode, one prompt."""
    main = main_cases(grid)
    return [next(case for case in main if case.kind == kind) for kind in ("decode", "prefill")]


def num_buffers(case: Case, l2_bytes: int) -> int:
    """How many layers to read in turn so that none of them is found in the cache: twice what it holds in all."""
    return max(1, -(-2 * l2_bytes // case.kv_bytes))

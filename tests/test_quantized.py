"""Quantised KV: the packer against its definition, the kernels against the packer and the oracle, and the layout."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from codes import AWKWARD, GRANULARITIES, Quantized, caches, scales_of
from pagedcore import KVCacheLayout, ops
from pagedcore.errors import InvalidArgumentError, UnsupportedError
from pagedcore.quantized import decode_e4m3, encode_e4m3, quantize
from reference import FEATURES, Batch, check, features, make_batch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


# The packer


def test_decode_is_the_definition() -> None:
    values = decode_e4m3(np.arange(256))
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        if code & 0x7F == 0x7F:
            assert np.isnan(values[code])
            continue
        size = Fraction(mantissa, 512) if exponent == 0 else Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)
        assert Fraction(float(values[code])) == (-size if code & 0x80 else size)
        assert np.signbit(values[code]) == bool(code & 0x80)
    assert np.nanmax(values) == 448


def test_encode_gives_the_nearest_and_of_two_the_even() -> None:
    codes = np.arange(256)
    values = decode_e4m3(codes)
    back = encode_e4m3(values)
    assert (back == np.where(np.isnan(values), 0x7F, codes)).all()
    low, high = values[:0x7E], values[1:0x7F]
    middle = (low + high) / 2
    even = np.where(codes[:0x7E] % 2 == 0, codes[:0x7E], codes[1:0x7F])
    assert (encode_e4m3(middle) == even).all()
    assert (encode_e4m3(np.nextafter(middle, np.float32(0))) == codes[:0x7E]).all()
    assert (encode_e4m3(np.nextafter(middle, np.float32(1e3))) == codes[1:0x7F]).all()
    assert (encode_e4m3(-middle) == even | 0x80).all()
    assert encode_e4m3([449, 1e30, np.inf, -np.inf, np.nan, -np.nan]).tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x7F]


def test_encode_equals_torch_where_torch_does_not_overflow() -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.randint(-12, 7, (20000,))
    x = x.clamp(-448, 448)
    assert (encode_e4m3(x.numpy()) == x.to(torch.float8_e4m3fn).view(torch.uint8).numpy()).all()


def test_packer_refuses_scales_of_other_shapes() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^scale: expected \[1\] or \[num_kv_heads\].*got shape \[3\]"):
        quantize(np.ones((5, 2, 8)), np.ones(3))


# Writing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", ["HND", "strided"])
def test_codes_and_scales_are_the_packers(dtype: torch.dtype, granularity: str, layout: str) -> None:
    """To the bit, whatever the rows hold; and nothing else is written."""
    generator = torch.Generator().manual_seed(1)
    tokens, heads, dim, v_dim = 40, 3, 33, 20
    key = (torch.randn(tokens, heads, dim, generator=generator) * 3).to(dtype)
    value = (torch.randn(tokens, heads, v_dim, generator=generator) * 0.01).to(dtype)
    key[0, 0, : len(AWKWARD)] = torch.tensor(AWKWARD).to(dtype)
    key[1], value[2] = 0, -0.0
    key[3, 1] = 1e-42 if dtype == torch.float32 else 1e-7
    value[4, 0] = float("inf")
    value[5, 0] = NAN
    k_cache, v_cache = caches(layout, 6, heads, 8, dim), caches(layout, 6, heads, 8, v_dim)
    slots = torch.randperm(48, generator=generator)[:tokens]
    slots[7] = -1
    k_scale, v_scale = scales_of(granularity, k_cache, 2), scales_of(granularity, v_cache, 3)
    given = [s.clone() for s in (k_scale, v_scale)]
    ops.reshape_and_cache(key, value, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)

    written = torch.tensor([i for i in range(tokens) if i != 7])
    blocks, places = slots[written] // 8, slots[written] % 8
    for rows, cache, scale, before in ((key, k_cache, k_scale, given[0]), (value, v_cache, v_scale, given[1])):
        own = None if granularity == "token" else before.numpy()
        codes, scales = quantize(rows.float().numpy(), own)
        assert (cache[blocks, :, places].numpy() == codes[written]).all()
        untouched = torch.ones(6, 8, dtype=torch.bool)
        untouched[blocks, places] = False
        assert (cache.transpose(1, 2)[untouched] == 0x55).all()
        if granularity == "token":
            got = scale[blocks, :, places].numpy()
            assert (got.view(np.int32) == scales[written].view(np.int32)).all()
            assert scale.transpose(1, 2)[untouched].isnan().all()
        else:
            assert torch.equal(scale, before)


def test_float8_and_uint8_caches_are_the_same() -> None:
    rows = torch.randn(4, 2, 16)
    codes = torch.zeros(2, 3, 2, 4, 16, dtype=torch.uint8)
    floats = torch.zeros(2, 3, 2, 4, 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    slots = torch.tensor([0, 5, 6, 11])
    ops.reshape_and_cache(rows, rows, codes[0], codes[1], slots)
    ops.reshape_and_cache(rows, rows, floats[0], floats[1], slots)
    assert torch.equal(codes, floats.view(torch.uint8))
    assert torch.equal(codes[0, 0, :, 0], rows[0].to(torch.float8_e4m3fn).view(torch.uint8))  # without scales: 1


# Attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", ["HND", "strided"])
def test_attention(isa: str, dtype: torch.dtype, granularity: str, layout: str) -> None:
    """Decode, chunks, a prompt, a padding row; slots nobody wrote hold NaN codes and NaN scales."""
    batch = make_batch([65, 2, 300, 40, 3, 0], [1, 2, 5, 40, 6, 1], dtype=dtype, heads=(8, 2), head_dim=80)
    quantized = Quantized(batch, granularity, layout)
    check(quantized.exact, *quantized.attend())


@pytest.mark.parametrize("options", FEATURES, ids="+".join)
def test_features(isa: str, options: dict[str, Any]) -> None:
    batch = make_batch([65, 300, 40], [1, 5, 40], heads=(8, 2), window=options.get("window"))
    quantized = Quantized(batch, "token")
    check(quantized.exact, *quantized.attend(**options), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(64, 64), (128, 128), (1, 1), (31, 33), (192, 128), (256, 17)])
def test_head_dims(isa: str, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> None:
    batch = make_batch([50, 70], [1, 33], dtype=dtype, heads=(6, 2), head_dim=head_dim, v_head_dim=v_head_dim)
    quantized = Quantized(batch, "head")
    check(quantized.exact, *quantized.attend())


@pytest.mark.parametrize("query_len", [1, 40])
def test_every_code_is_read_as_the_packer_reads_it(isa: str, query_len: int) -> None:
    """A cache of one token gives its V row back."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256)
    query = torch.zeros(query_len, 1, 8)
    keys = torch.zeros(1, 1, 1, 8, dtype=torch.uint8)
    index = (torch.zeros(1, 1).int(), torch.ones(1).int(), torch.tensor([0, query_len]).int())
    out = ops.paged_attention(query, keys, codes, *index, causal=False)
    want = decode_e4m3(np.arange(256))
    for row in out[:, 0].numpy():
        np.testing.assert_array_equal(row, want)


@pytest.mark.parametrize("query_len", [1, 3, 40])
def test_fixed_split_does_not_depend_on_companions(isa: str, query_len: int) -> None:
    options = features("softcap", "alibi_slopes", "sinks")
    batch = make_batch([210, 4, 300, 64], [query_len, 1, 1, 64], heads=(8, 2))
    together = Quantized(batch, "token")
    alone = Quantized(batch, "token")
    rows = slice(None, query_len)
    alone.batch = Batch(
        batch.query[rows], *batch.args[1:3], batch.block_table[:1], batch.seq_lens[:1], batch.query_start_loc[:2]
    )
    want = together.attend(split_size=50, **options)
    for threads in (1, 2, 5):
        for a, b in zip(alone.attend(split_size=50, num_threads=threads, **options), want, strict=True):
            assert torch.equal(a, b[rows])


def test_nan_that_was_written_shows(isa: str) -> None:
    batch = make_batch([70, 70], [1, 20], heads=(2, 1))
    batch.v_cache[batch.block_table[0, 0].item(), 0, 3] = NAN
    quantized = Quantized(batch, "head")
    out, lse = quantized.attend()
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()
    assert lse.isfinite().all()


def test_through_torch(isa: str) -> None:
    import pagedcore.torch  # noqa: F401

    batch = make_batch([20, 9], [1, 3], heads=(4, 2), head_dim=16)
    quantized = Quantized(batch, "token")
    k_scale, v_scale = (s.nan_to_num(1.0) for s in quantized.scales)
    codes = [c.contiguous().view(torch.float8_e4m3fn) for c in quantized.codes]
    rows, slots = torch.randn(3, 2, 16), torch.tensor([0, 1, 2])

    def step(query: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        k, v, ks, vs = tensors
        ops.reshape_and_cache(rows, rows, k, v, slots, k_scale=ks, v_scale=vs)
        return ops.paged_attention(query, k, v, *batch.args[3:], k_scale=ks, v_scale=vs)

    def copies() -> list[torch.Tensor]:
        return [t.clone() for t in (*codes, k_scale, v_scale)]

    eager, compiled = copies(), copies()
    want = step(batch.query, *eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(batch.query, *compiled)
    assert torch.equal(want, got)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# The layout


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layout(library: str, order: str, granularity: str) -> None:
    """Writing and copying through a `KVCache`: scales of tokens travel with their blocks."""
    layout = KVCacheLayout(
        6, 4, 2, 3, 24, "float32", v_head_dim=10, kv_format="fp8_e4m3", scale_granularity=granularity, order=order
    )
    record = 320 + 128 + (2 * 64 if granularity == "token" else 0)  # 3 * 4 * 24 codes, ..., on cache lines
    assert layout.layer_block_bytes == record
    assert layout.block_bytes == 2 * record
    kv = layout.allocate(library=library)
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((5, 3, dim), np.float32) for dim in (24, 10)]
    given = [torch.from_numpy(r) if library == "torch" else r for r in rows]
    slots = np.arange(9, 14)
    for layer in range(2):
        k_cache, v_cache = kv.layer(layer)
        k_scale, v_scale = kv.scales(layer)
        if granularity != "token":
            assert tuple(k_scale.shape) == ((1,) if granularity == "tensor" else (3,))
            k_scale[:], v_scale[:] = 0.02, 0.01
        index = torch.from_numpy(slots) if library == "torch" else slots
        ops.reshape_and_cache(*given, k_cache, v_cache, index, k_scale=k_scale, v_scale=v_scale)
    pairs = np.array([[2, 4], [3, 5]], np.int32)
    ops.copy_blocks(kv, torch.from_numpy(pairs) if library == "torch" else pairs)
    ops.zero_blocks(kv, torch.tensor([2, 3]).int() if library == "torch" else np.array([2, 3], np.int32))

    def bits(tensor: Any) -> np.ndarray:
        return tensor.view(torch.uint8).numpy() if isinstance(tensor, torch.Tensor) else tensor

    for layer in range(2):
        for row, cache, scale, fixed in zip(rows, kv.layer(layer), kv.scales(layer), (0.02, 0.01), strict=True):
            own = None if granularity == "token" else np.full(1, fixed, np.float32)
            codes, scales = quantize(row, own)
            places = (slots + 8) // 4, slice(None), (slots + 8) % 4
            assert (bits(cache)[places] == codes).all()
            assert (bits(cache)[2:4] == 0).all()
            if granularity == "token":
                assert (np.asarray(scale)[places] == scales).all()
                assert (np.asarray(scale)[2:4] == 0).all()


def test_layout_without_codes_has_no_scales() -> None:
    kv = KVCacheLayout(4, 4, 1, 1, 8, "float32").allocate()
    assert kv.scales(0) == (None, None)
    with pytest.raises(InvalidArgumentError, match=r"^i: expected a layer in \[0, 1\)"):
        kv.scales(1)


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_scales_of_any_strides(granularity: str) -> None:
    """One scale for all heads without a copy of it; and a token's scales wherever they lie, as they are written too."""
    batch = make_batch([20, 40], [1, 3], heads=(4, 2), head_dim=16)
    quantized = Quantized(batch, granularity)

    def spread(scale: torch.Tensor) -> torch.Tensor:
        if granularity == "head":
            return scale[:1].expand(2)
        return torch.empty(16, 2, len(batch.k_cache)).copy_(scale.permute(2, 1, 0)).permute(2, 1, 0)

    views = [spread(scale) for scale in quantized.scales]
    dense = [view.contiguous() for view in views]
    assert all(view.stride(-1) != 1 for view in views)
    call = (batch.query, *quantized.codes, *batch.args[3:])
    outs = [ops.paged_attention(*call, k_scale=k, v_scale=v) for k, v in (views, dense)]
    assert torch.equal(*outs)
    key, slots = torch.randn(3, 2, 16), torch.tensor([5, 17, -1])
    written = []
    for scales in (views, dense):
        codes = [code.clone() for code in quantized.codes]
        ops.reshape_and_cache(key, -key, *codes, slots, k_scale=scales[0], v_scale=scales[1])
        written.append(
            [tensor.view(torch.uint8) for tensor in codes] + [scale.contiguous().view(torch.int32) for scale in scales]
        )
    assert all(torch.equal(a, b) for a, b in zip(*written, strict=True))


# Errors


def test_refusals() -> None:
    batch = make_batch([20], [1], heads=(4, 2), head_dim=16)
    quantized = Quantized(batch, "head")
    one = torch.ones(1)
    with pytest.raises(UnsupportedError, match=r"^k_scale: expected None for a cache that is not quantised"):
        ops.paged_attention(*batch.args, k_scale=one)
    key = torch.ones(1, 2, 16)
    with pytest.raises(UnsupportedError, match=r"^v_scale: expected None for a cache that is not quantised"):
        ops.reshape_and_cache(key, key, batch.k_cache, batch.v_cache, torch.tensor([0]), v_scale=one)
    with pytest.raises(InvalidArgumentError, match=r"^v_cache: expected dtype float32 \(as query has\), got uint8"):
        ops.paged_attention(batch.query, batch.k_cache, quantized.codes[1], *batch.args[3:])
    with pytest.raises(InvalidArgumentError, match=r"^k_cache: expected dtype float32 \(as query has\), got uint8"):
        ops.paged_attention(batch.query, quantized.codes[0], batch.v_cache, *batch.args[3:])
    call = (batch.query, *quantized.codes, *batch.args[3:])
    for value, message in (
        (torch.ones(1).double(), "dtype float32, got float64|dtype float32"),
        (torch.ones(3), "num_kv_heads = 2 on axis 0"),
        (torch.ones(2, 2), r"shape \[1\], \[num_kv_heads\] or \[num_blocks, num_kv_heads, block_size\]"),
        (torch.ones(len(batch.k_cache), 2, 15), "block_size = 16"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"^k_scale: expected ({message})"):
            ops.paged_attention(*call, k_scale=value)
        with pytest.raises(InvalidArgumentError, match=f"^v_scale: expected ({message})"):
            ops.reshape_and_cache(key, key, *quantized.codes, torch.tensor([0]), v_scale=value)
    frozen = np.ones((len(batch.k_cache), 2, 16), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match=r"^k_scale: expected writable memory"):
        ops.reshape_and_cache(key, key, *quantized.codes, torch.tensor([0]), k_scale=frozen)

"""Fragment order: the way back, and which register multiplies what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.mosaic import gpu as mgpu

from qjax.pallas_kernels import hopper
from qjax.pallas_kernels.hopper import codes as stored
from qjax.pallas_kernels.matmul import gpu_layout, reference
from qjax.pallas_kernels.weights import Weight, WeightSpec

from .suite import FORMATS, random_weight

CODECS = [hopper.Codec("int", b) for b in range(1, 9)] + [
    hopper.Codec(kind, bits)
    for kind, bits in (("table", 4), ("e2m1", 4), ("e4m3", 8), ("e5m2", 8))
]
TAKEN = [name for name in FORMATS if name != "int4-g96-asym"]


def label(codec):
    return f"{codec.kind}{codec.bits}"


def random_codes(rng, codec, shape):
    codes = rng.integers(0, 2**codec.bits, shape).astype(np.uint8)
    special = {"e4m3": 0x7F, "e5m2": 0x7C}.get(codec.kind)
    if special:  # NaN and infinity
        codes = np.where(codes & special == special, codes & 0x83, codes)
    return codes.astype(np.uint8)


def same(a, b):
    assert (a is None) == (b is None)
    if a is not None:
        assert a.dtype == b.dtype and a.shape == b.shape
        raw = (np.asarray(v).view(np.uint8) for v in (a, b))
        np.testing.assert_array_equal(*raw)


@pytest.mark.parametrize("codec", [c for c in CODECS if c.kind != "table"], ids=label)
def test_every_bit_of_a_word_has_one_meaning(codec):
    bits = [
        (word, source + i, pair, code + i)
        for pair, parts in enumerate(codec.parts)
        for word, source, width, code in parts
        for i in range(width)
    ]
    assert len(bits) == 16 * codec.bits
    assert len({b[:2] for b in bits}) == len({b[2:] for b in bits}) == len(bits)
    assert {b[0] for b in bits} == set(range(codec.bits))
    assert {b[1] for b in bits} == set(range(16))


@pytest.mark.parametrize("codec", CODECS, ids=label)
def test_packing_has_an_inverse(codec, rng):
    codes = random_codes(rng, codec, (2, 128, 192))
    words = hopper.pack(jnp.asarray(codes), codec)
    assert words.shape == (2, 3, 2 * codec.bits, 128) and words.dtype == jnp.int32
    np.testing.assert_array_equal(hopper.unpack(words, codec), codes)


@pytest.mark.parametrize("codec", CODECS, ids=label)
def test_registers_are_those_of_the_tensor_core(codec, rng):
    """A product done as PTX describes `wgmma.m64nNk16` with A in registers.

    Thread `32 w + l` holds rows `16 w + l // 4` (registers 0 and 2) and 8 more
    (registers 1 and 3), and columns `2 (l % 4)`, its neighbour, and (registers 2 and 3)
    8 more.
    """
    codes = random_codes(rng, codec, (64, 64))
    words = hopper.pack(jnp.asarray(codes), codec)[0]
    own = stored.thread_words(words, codec)
    pairs = np.asarray(stored.thread_codes(own, codec)).astype(np.int64)
    x = rng.integers(-3, 4, (64, 8))
    total = np.zeros((64, 8), np.int64)
    for step in range(4):
        a = np.full((64, 16), -1)
        for thread in range(128):
            warp, lane = divmod(thread, 32)
            for register in range(4):
                row = 16 * warp + lane // 4 + 8 * (register % 2)
                column = 2 * (lane % 4) + 8 * (register // 2)
                a[row, column : column + 2] = pairs[thread, 4 * step + register]
        assert (a >= 0).all()
        total += a @ x[16 * step : 16 * step + 16]
    np.testing.assert_array_equal(total, codes.T.astype(np.int64) @ x)


def test_the_compiler_numbers_registers_so():
    shape = mgpu.WGMMA_LAYOUT.registers_shape((64, 64))
    assert shape == (1, 8, 1, 1, 2, 1, 1, 1, 1)


def value_of(codec, codes, table, dtype):
    if codec.kind == "int":
        value = codes.astype(np.int32)
        return np.where((codec.bits == 8) & (value > 127), value - 256, value)
    if codec.kind == "table":
        return np.asarray(jnp.asarray(table).astype(dtype).astype(jnp.float32))[codes]
    if codec.kind == "e2m1":
        return np.array(reference.E2M1)[codes]
    kind = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}[codec.kind]
    return np.asarray(jnp.asarray(codes.view(jnp.dtype(kind))).astype(jnp.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("codec", CODECS, ids=label)
def test_decoding_is_exact(codec, dtype, rng):
    """The instructions that the kernel emits, executed on arrays."""
    codes = random_codes(rng, codec, (64, 64))
    words = hopper.pack(jnp.asarray(codes), codec)[0]
    table = rng.normal(size=16).astype(np.float32)
    memory = None
    if codec.kind == "table":
        pairs = hopper.table_pairs(jnp.asarray(table), dtype)
        memory = jnp.broadcast_to(pairs[:, None], (256, 32))
    offsets = (0.0, 2.0 ** (codec.bits - 1), 0.5) if codec.kind == "int" else (0.0,)
    for offset in offsets:
        decode = hopper.Decode(codec, dtype, offset)
        got = hopper.fragment(words, decode, (), memory, interpret=True)
        wanted = value_of(codec, codes, table, dtype).T - offset
        wanted = jnp.asarray(wanted, jnp.float32).astype(dtype)
        assert got.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
@pytest.mark.parametrize("codec", CODECS, ids=label)
def test_scales_and_zero_points_reach_their_weights(codec, pieces, rng):
    codes = random_codes(rng, codec, (64, 64))
    words = hopper.pack(jnp.asarray(codes), codec)[0]
    table = np.arange(16).astype(np.float32)
    pairs = hopper.table_pairs(jnp.asarray(table), "bfloat16")
    memory = jnp.broadcast_to(pairs[:, None], (256, 32))
    integer = codec.kind == "int"
    vectors = [
        jnp.asarray(rng.integers(*span, (pieces, 64)), jnp.bfloat16)
        for span in ((1, 4), (-8, 8), (0, 100))
    ]
    scale, shift, center = (np.asarray(v.astype(jnp.float32)) for v in vectors)
    decode = hopper.Decode(codec, "bfloat16", 0.0, pieces, True, integer)
    rows = [row for v in vectors[: 2 + integer] for row in v]
    got = hopper.fragment(words, decode, rows, memory, interpret=True)
    value = value_of(codec, codes, table, "bfloat16").T

    def spread(a):
        return np.repeat(a.T, 64 // pieces, axis=1)

    wanted = (value - spread(center)) if integer else value
    wanted = wanted * spread(scale) + spread(shift)
    np.testing.assert_array_equal(got, jnp.asarray(wanted, jnp.bfloat16))


@settings(max_examples=10, deadline=None)
@given(
    name=st.sampled_from(TAKEN),
    k=st.integers(1, 300),
    n=st.integers(1, 300),
    layers=st.sampled_from([None, 2]),
    seed=st.integers(0, 2**16),
)
def test_prepacked_weights_have_a_way_back(name, k, n, layers, seed):
    weight, spec = random_weight(name, k, n, seed, layers)
    made = gpu_layout.prepack(weight, spec)
    assert made is not None
    packed, changed = made
    assert changed.layout in gpu_layout.TAGS
    for a, b in zip(weight, gpu_layout.unpack(packed, changed), strict=True):
        same(a, b)


def test_bits_without_meaning_survive():
    """Padding rows of the last byte need not be zero."""
    spec = WeightSpec(5, 3, "int", 3, 5)
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 3)), jnp.uint8)
    weight = Weight(codes, jnp.ones((1, 3)))
    packed, changed = gpu_layout.prepack(weight, spec) or pytest.fail("refused")
    same(gpu_layout.unpack(packed, changed).codes, codes)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (WeightSpec(384, 64, "int", 4, 96), "groups of 96"),
        (WeightSpec(384, 64, "int", 4, 4), "groups of 4"),
        (WeightSpec(384, 64, "table", 5, 64), "32 entries"),
    ],
)
def test_what_is_refused(spec, reason):
    assert reason in (gpu_layout.obstacle(spec) or "")
    shape = (spec.packed_k, spec.n)
    weight = Weight(jnp.zeros(shape, jnp.uint8), jnp.zeros((spec.groups, spec.n)))
    assert gpu_layout.prepack(weight, spec) is None


def test_packing_traces():
    weight, spec = random_weight("int4-g128", 256, 128)
    changed = {}

    def pack(w):
        packed, changed["spec"] = gpu_layout.prepack(w, spec) or (w, spec)
        return packed

    packed = jax.jit(pack)(weight)
    same(
        jax.jit(lambda w: gpu_layout.unpack(w, changed["spec"]))(packed).codes,
        weight.codes,
    )

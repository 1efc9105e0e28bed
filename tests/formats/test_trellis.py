"""Trellis codes against a decoder that reads bits one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import FormatError, SpecError
from qjax.formats import Trellis, format_from_dict
from qjax.formats.trellis import (
    CODEBOOKS,
    codebook_values,
    join_tiles,
    split_tiles,
    state_values,
    states_to_words,
    words_to_states,
)
from qjax.specs import describe, rebuild
from qjax.trellis import Incoherent, TrellisTensor, pack_signs, unpack_signs

GOLDEN = {  # of states 0, 1 and 2, as EXL3's torch decoder computes them
    "3inst": (0.768066, -0.919312, 0.931396),
    "mcg": (1.84375, 0.134521, -0.759277),
    "mul1": (-3.453125, 0.641075, -0.448456),
}


def value(state: int, codebook: str) -> float:
    """One state's value, from the definition."""
    if codebook == "mul1":
        x = state * 0x83DCD12D % 2**32
        total = sum(x >> 8 * i & 0xFF for i in range(4))
        step, shift = (
            float(np.array(v, np.uint16).view(np.float16)) for v in (0x1EEE, 0xC931)
        )
        return np.float32((1024 + total) * step + shift)
    x = state * 89226354 + 64248484 if codebook == "3inst" else state * 0xCBAC1FED
    x = (x % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
    low, high = (np.array(v, np.uint16).view(np.float16) for v in (x & 0xFFFF, x >> 16))
    return np.float32(low) + np.float32(high)


def read_tile(words: np.ndarray, bits: int, codebook: str) -> np.ndarray:
    """A tile from its words, symbol by symbol."""
    swapped = words.reshape(-1, 2)[:, ::-1].ravel()
    stream = "".join(f"{int(word):016b}" for word in swapped)
    symbols = [int(stream[i * bits : (i + 1) * bits], 2) for i in range(256)]
    state = 0
    for symbol in symbols[-16:]:
        state = (state << bits | symbol) % 2**16
    tile = np.zeros((16, 16), np.float32)
    for i, symbol in enumerate(symbols):
        state = (state << bits | symbol) % 2**16
        t, k = divmod(i, 8)
        row = t % 4 * 2 + (0, 1, 8, 9)[k % 4]
        tile[row, t // 4 + 8 * (k >= 4)] = value(state, codebook)
    return tile


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_values_of_states(codebook):
    states = jnp.arange(2**16, dtype=jnp.uint16)
    got = np.asarray(jax.jit(state_values, static_argnums=1)(states, codebook))
    np.testing.assert_allclose(got[:3], GOLDEN[codebook], atol=5e-7)
    some = np.random.default_rng(0).integers(0, 2**16, 2000)
    np.testing.assert_array_equal(got[some], [value(int(s), codebook) for s in some])
    np.testing.assert_array_equal(got, codebook_values(codebook))
    np.testing.assert_array_equal(got, state_values(states, codebook))
    if codebook == "3inst":
        assert got.std() == pytest.approx(1.24371088, abs=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_tiles_are_read_like_exl3s(bits, rng):
    codebook = CODEBOOKS[bits % 3]
    words = rng.integers(0, 2**16, (2, 3, 16 * bits)).astype(np.uint16)
    fmt = Trellis(bits, codebook)
    scale = jnp.full((1, 1), 0.5, jnp.float32)
    q = TrellisTensor(jnp.asarray(words.reshape(2, -1)), scale, fmt, (32, 48))
    got = np.asarray(q.dequantize())
    for r, c in np.ndindex(2, 3):
        tile = got[16 * r : 16 * r + 16, 16 * c : 16 * c + 16]
        want = read_tile(words[r, c], bits, codebook)
        np.testing.assert_array_equal(tile, want / 2)
    assert q.bits_per_weight == bits + 32 / (32 * 48)
    states = words_to_states(jnp.asarray(words), bits)
    np.testing.assert_array_equal(states_to_words(states, bits), words)


def test_tiles_split_and_join(rng):
    w = rng.normal(size=(2, 32, 48)).astype(np.float32)
    np.testing.assert_array_equal(join_tiles(split_tiles(jnp.asarray(w))), w)


def test_exl3_leaves_are_representable(rng):
    """`suh` and `svh` in float16 around codes without a scale."""
    words = rng.integers(0, 2**16, (16, 8, 32)).astype(np.uint16)
    suh, svh = (rng.normal(size=n).astype(np.float16) for n in (256, 128))
    base = TrellisTensor(
        jnp.asarray(words.reshape(16, -1)), None, Trellis(2), (256, 128)
    )
    q = Incoherent(base, jnp.asarray(suh), jnp.asarray(svh))
    inner = np.asarray(base.dequantize(), np.float64)
    h = np.ones((1, 1))
    while h.shape[0] < 128:
        h = np.block([[h, h], [h, -h]])
    h = h / 128**0.5
    w = np.concatenate([h @ inner[:128], h @ inner[128:]])
    w = suh[:, None].astype(np.float64) * w @ h * svh.astype(np.float64)
    np.testing.assert_allclose(np.asarray(q.dequantize()), w, rtol=1e-4, atol=1e-4)
    spec, arrays = describe("w", q)
    back = rebuild("w", spec, arrays.__getitem__)
    np.testing.assert_array_equal(back.dequantize(), q.dequantize())


def test_signs_take_a_bit_each(rng):
    signs = rng.choice([-1.0, 1.0], (3, 24)).astype(np.float32)
    packed = pack_signs(jnp.asarray(signs))
    assert packed.shape == (3, 3)
    np.testing.assert_array_equal(unpack_signs(packed, 24), signs)


@pytest.mark.parametrize("bits", [0, 9, 2.5, True])
def test_bits_out_of_range(bits):
    with pytest.raises(SpecError, match="expected an integer from 1 to 8"):
        Trellis(bits)


def test_what_the_format_refuses():
    with pytest.raises(SpecError, match="codebook is 'x'"):
        Trellis(codebook="x")
    with pytest.raises(SpecError, match=r"in=40.*multiples of 16"):
        Trellis().grouping((40, 32))
    with pytest.raises(SpecError, match="TrellisLDLQ"):
        Trellis().encode(jnp.zeros(4))
    assert format_from_dict(Trellis(3, "mcg").to_dict()) == Trellis(3, "mcg")
    names = [Trellis(2).name, Trellis(3, "mcg").name]
    assert names == ["trellis-2bit", "trellis-3bit-mcg"]


def damaged(**changes):
    codes = jnp.zeros((2, 32 * 2), jnp.uint16)
    q = TrellisTensor(codes, jnp.ones((1, 1)), Trellis(2), (32, 32))
    q = Incoherent(q, jnp.zeros((4,), jnp.uint8), jnp.zeros((4,), jnp.uint8))
    spec, arrays = describe("w", q)
    for path, new in changes.items():
        *nest, last = path.split("__")
        at = spec
        for key in nest:
            at = at["fields"][key]
        at[last] = new
    return spec, arrays


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 3}, "power of two"),
        ({"block": "128"}, "power of two"),
        ({"base__matrix": [48, 32]}, "w.base.codes: shape"),
        ({"base__matrix": [40, 32]}, "multiples of 16"),
        ({"base__format": {"kind": "Trellis", "bits": 3}}, "w.base.codes: shape"),
        ({"base__format": {"kind": "Trellis", "bits": 12}}, "from 1 to 8"),
        ({"base__format": {"kind": "FP8"}}, "cannot be a TrellisTensor"),
    ],
)
def test_damaged_descriptions(changes, message):
    spec, arrays = damaged(**changes)
    with pytest.raises(FormatError, match=message):
        rebuild("w", spec, arrays.__getitem__)


@pytest.mark.parametrize(
    ("name", "leaf", "message"),
    [
        ("w.left", np.zeros(5, np.uint8), "w.left: shape"),
        ("w.right", np.zeros(32, np.int32), "w.right: dtype"),
        ("w.base.codes", np.zeros((2, 64), np.int16), "w.base.codes: dtype"),
        ("w.base.scale", np.ones((1, 32), np.float32), "w.base.scale: shape"),
    ],
)
def test_damaged_leaves(name, leaf, message):
    spec, arrays = damaged()
    arrays[name] = leaf
    with pytest.raises(FormatError, match=message):
        rebuild("w", spec, arrays.__getitem__)

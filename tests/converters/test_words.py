"""Layouts of codes against `qjax.packing` and a bit string made bit by bit."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax.converters.halves as halves
import qjax.converters.words as words
from qjax.packing import pack

from . import packers

COUNT, COLS = 37, 5


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(words, "_CODES", 16)
    monkeypatch.setattr(words, "_COLUMNS", 3)
    monkeypatch.setattr(halves, "_WORDS", 2)


@pytest.mark.parametrize("bits", range(1, 9))
def test_layouts(bits, rng):
    codes = rng.integers(0, 2**bits, (COUNT, COLS), dtype=np.uint8)
    stored = packers.words(codes, bits, 0)
    string, own = words.stream(stored), np.asarray(pack(codes, bits))
    equal = np.testing.assert_array_equal
    equal(words.words_of(codes, bits), stored)
    equal(words.codes_of(string, bits, COUNT), codes)
    equal(words.codes_of(own, bits, COUNT, "planes"), codes)
    equal(words.packed_codes(string, bits, COUNT), own)
    equal(words.repacked(codes, bits), own)
    order = rng.permutation(COUNT)
    turned = pack(codes[order], bits)
    equal(words.repacked(codes, bits, order), turned)
    equal(words.reordered(string, bits, order), turned)
    equal(words.reordered(own, bits, order, "planes"), turned)


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_bits_behind_the_last_code(bits, rng):
    codes = rng.integers(0, 2**bits, (COUNT, COLS), dtype=np.uint8)
    string = words.stream(packers.words(codes, bits, 0)).copy()
    used, rest = divmod(COUNT * bits, 8)
    string[used] |= np.uint8(256 - 2**rest)
    string[used + 1 :] = 255
    want = pack(codes, bits)
    np.testing.assert_array_equal(words.packed_codes(string, bits, COUNT), want)
    np.testing.assert_array_equal(words.codes_of(string, bits, COUNT), codes)


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<i2", "uint16"])
def test_halves(dtype, rng):
    nibbles = rng.integers(0, 16, (5, 2, 4))  # word, half, place
    stored = packers.words(nibbles.reshape(1, -1), 4, 1)
    stored = stored.view(f"u{np.dtype(dtype).itemsize}").astype(dtype)
    want = nibbles[:, 0] | nibbles[:, 1] << 4
    np.testing.assert_array_equal(halves.halves(stored), want.reshape(-1))


@pytest.mark.parametrize("shape", [(3, 4), (1, 6), (6, 1)])
def test_transposed(shape):
    dtypes = ("uint8", "int16", "float16", "bfloat16", "float8_e4m3fn", "float32")
    for dtype in (*dtypes, "int64", "float64"):
        array = np.arange(shape[0] * shape[1]).reshape(shape).astype(jnp.dtype(dtype))
        made = words.transposed(array)
        assert made.dtype == array.dtype and made.flags.c_contiguous
        np.testing.assert_array_equal(made, array.T)


def test_without_a_cpu(monkeypatch):
    def none(backend):
        raise RuntimeError(f"no {backend}")

    monkeypatch.setattr(words.jax, "local_devices", none)
    words._host.cache_clear()
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    np.testing.assert_array_equal(words.transposed(array), array.T)
    assert words._host() is None
    words._host.cache_clear()

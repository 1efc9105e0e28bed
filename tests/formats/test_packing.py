"""Packing against an independent bit-by-bit reference of the documented layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import SpecError
from qjax.packing import pack, packed_rows, row_multiple, unpack, unpack_rows

PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
SIZES = (1, 7, 16, 21)


def reference(codes: np.ndarray, bits: int) -> np.ndarray:
    """Plane by plane, row by row, bit by bit."""
    unit = 8 if len(PLANES[bits]) > 1 else 8 // bits
    rows, out = codes.shape
    padded = np.zeros((-(-rows // unit) * unit, out), np.uint8)
    padded[:rows] = codes
    packed = []
    for block in padded.reshape(-1, unit, out):
        low = 0
        for width in PLANES[bits]:
            byte_rows = np.zeros((unit * width // 8, out), np.uint8)
            for row in range(unit):
                field = (block[row] >> low) & (2**width - 1)
                byte, position = divmod(row * width, 8)
                byte_rows[byte] |= (field << position).astype(np.uint8)
            packed.append(byte_rows)
            low += width
    return np.concatenate(packed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_and_identity(bits, size, rng):
    codes = rng.integers(0, 2**bits, (2, size, 3)).astype(np.uint8)
    codes[0, 0] = 2**bits - 1
    packed = np.asarray(jax.jit(pack, static_argnums=1)(codes, bits))
    assert packed.shape == (2, packed_rows(size, bits), 3)
    np.testing.assert_array_equal(packed[1], reference(codes[1], bits))
    back = jax.jit(unpack, static_argnums=(1, 2))(packed, bits, size)
    np.testing.assert_array_equal(np.asarray(back), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_rows_is_unpack_of_one_unit(bits, rng):
    unit = row_multiple(bits)
    packed = rng.integers(0, 256, (unit * bits // 8, 3)).astype(np.uint8)
    rows = jax.jit(lambda p: unpack_rows(list(p), bits))(packed)
    np.testing.assert_array_equal(
        np.stack(rows), np.asarray(unpack(jnp.asarray(packed), bits, unit))
    )


@given(st.integers(0, 2**60), st.integers(1, 8))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_every_bit_pattern_survives(seed, bits):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (16, 3)).astype(np.uint8)
    packed = jax.jit(pack, static_argnums=1)(codes, bits)
    assert packed.nbytes * 8 == codes.size * bits
    back = jax.jit(unpack, static_argnums=(1, 2))(packed, bits, 16)
    np.testing.assert_array_equal(np.asarray(back), codes)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits):
    with pytest.raises(
        SpecError, match=f"bits: got {bits}, expected an integer from 1"
    ):
        packed_rows(8, bits)

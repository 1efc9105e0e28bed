"""AQLM layers, decoded by loops as the format describes them."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.additive import AdditiveTensor
from qjax.converters.aqlm import AQLM
from qjax.converters.packed import check_parts
from qjax.errors import FormatError, UnsupportedError

ROWS, COLS = 24, 10
READER = AQLM({}, "here")


def draw(count: int, bits: int, group: int = 8, dtype="float16"):
    """A layer, and its codes as numbers from 0."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (COLS, ROWS // group, count))
    codes[0, 0, 0] = 2**bits - 1
    wrapped = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    books = rng.normal(size=(count, 2**bits, 1, group)).astype(jnp.dtype(dtype))
    scales = rng.uniform(0.5, 1, (COLS, 1, 1, 1)).astype(jnp.dtype(dtype))
    stored = wrapped.astype(np.int8 if bits <= 8 else np.int16)
    return {"codes": stored, "codebooks": books, "scales": scales}, codes


def decoded(parts, codes) -> np.ndarray:
    """The float32 weight `[in, out]`."""
    books, scales = (parts[n].astype(np.float32) for n in ("codebooks", "scales"))
    group = books.shape[3]
    w = np.zeros((ROWS, COLS), np.float32)
    for o in range(COLS):
        for j in range(ROWS // group):
            total = np.zeros(group, np.float32)
            for c in range(len(books)):
                total += books[c, codes[o, j, c], 0]
            w[j * group : (j + 1) * group, o] = total * scales[o, 0, 0, 0]
    return w


@pytest.mark.parametrize(
    ("count", "bits", "group", "dtype"),
    [
        (1, 16, 8, "float16"),
        (2, 8, 8, "bfloat16"),
        (3, 12, 4, "float32"),
        (1, 8, 12, "float16"),
        (2, 5, 8, "float16"),
    ],
)
def test_values(count, bits, group, dtype):
    parts, codes = draw(count, bits, group, dtype)
    check_parts(READER, parts, "here: layer")
    assert READER.shape(parts) == (COLS, ROWS)
    q = READER.read(parts, "here: layer")
    assert isinstance(q, AdditiveTensor)
    assert q.codes.dtype == (np.uint8 if bits <= 8 else np.uint16)
    assert q.codebooks.dtype == q.scale.dtype == jnp.dtype(dtype)
    assert q.dtype == ("bfloat16" if dtype == "bfloat16" else "float16")
    assert q.shape == (ROWS, COLS)
    np.testing.assert_array_equal(q.dequantize("float32"), decoded(parts, codes))


def test_unfit_layers():
    good, _ = draw(2, 8)
    tall = np.zeros((2, 256, 2, 8), np.float16)
    odd = np.zeros((2, 200, 1, 8), np.float16)
    large = np.zeros((2, 2**17, 1, 1), np.float16)
    many = {
        "codes": np.zeros((COLS, 3, 9), np.int8),
        "codebooks": np.zeros((9, 256, 1, 8), np.float16),
    }
    wide = {name: good[name].astype(np.float64) for name in ("codebooks", "scales")}
    for change, error, message in (
        ({"codebooks": tall}, UnsupportedError, "vectors of 2 outputs are not read"),
        ({"codebooks": odd}, UnsupportedError, "200 vectors per codebook"),
        ({"codebooks": large}, UnsupportedError, "131072 vectors per codebook"),
        (many, UnsupportedError, "9 codebooks are not read; expected at most 8"),
        (wide, UnsupportedError, "scales of float64 are not read"),
        ({"codes": good["codes"][..., :1]}, FormatError, "do not fit 2 codebooks"),
        ({"scales": good["scales"][:3]}, FormatError, r"scales \[3, 1, 1, 1\] do not"),
    ):
        with pytest.raises(error, match=message):
            READER.read({**good, **change}, "here: layer")

"""EXL3 layers, decoded by loops over symbols as the format describes them."""

import jax
import numpy as np
import pytest

from qjax.converters.exl3 import EXL3, MULTIPLIERS
from qjax.converters.packed import check_parts
from qjax.errors import FormatError, UnsupportedError
from qjax.ops import matmul
from qjax.trellis import Incoherent, TrellisTensor

ROWS, COLS = 128, 256
READER = EXL3({}, "here")


@jax.jit
def dense(q):
    return q.dequantize("float32")


def values(states, codebook: str) -> np.ndarray:
    """The numbers behind states."""
    x = np.asarray(states, np.uint64)
    if codebook == "mul1":
        x = x * np.uint64(0x83DCD12D) % 2**32
        total = sum((x >> np.uint64(8 * i) & np.uint64(255)) for i in range(4))
        step, shift = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16)
        # 0x6400 are the bits of the float16 1024, whose unit in the last place is 1.
        return np.float32((1024.0 + total) * np.float64(step) + np.float64(shift))
    factor, step = (89226354, 64248484) if codebook == "3inst" else (0xCBAC1FED, 0)
    x = (x * np.uint64(factor) + np.uint64(step)) % 2**32
    x = (x & np.uint64(0x8FFF8FFF)) ^ np.uint64(0x3B603B60)
    low, high = (
        half.astype(np.uint16).view(np.float16).astype(np.float32)
        for half in (x % 2**16, x >> np.uint64(16))
    )
    return low + high


def tile(words: np.ndarray, bits: int, codebook: str) -> np.ndarray:
    """One 16 x 16 tile, symbol by symbol."""
    stream = "".join(
        f"{int(w) & 0xFFFF:016b}" for w in words.reshape(-1, 2)[:, ::-1].ravel()
    )
    symbols = [int(stream[i : i + bits], 2) for i in range(0, len(stream), bits)]
    warm = -(-16 // bits) - 1
    state = 0
    for symbol in symbols[len(symbols) - warm :]:
        state = (state << bits | symbol) & 0xFFFF
    states = np.zeros((16, 16), int)
    for at, symbol in enumerate(symbols):
        state = (state << bits | symbol) & 0xFFFF
        t, k = divmod(at, 8)
        row = t % 4 * 2 + (0, 1, 8, 9)[k % 4]
        states[row, t // 4 + (8 if k >= 4 else 0)] = state
    return values(states, codebook)


def sylvester(size: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(size)


def decoded(trellis, left, right, codebook) -> np.ndarray:
    bits = trellis.shape[2] // 16
    w = np.block([[tile(t, bits, codebook) for t in row] for row in trellis])
    h = sylvester(128)
    for start in range(0, ROWS, 128):
        w[start : start + 128] = h @ w[start : start + 128]
    w = w * left[:, None]
    for start in range(0, COLS, 128):
        w[:, start : start + 128] = w[:, start : start + 128] @ h
    return w * right


def draw(bits: int, codebook: str = "3inst") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(bits)
    shape = (ROWS // 16, COLS // 16, 16 * bits)
    parts = {
        "trellis": rng.integers(-(2**15), 2**15, shape).astype(np.int16),
        "suh": rng.normal(size=ROWS).astype(np.float16),
        "svh": rng.normal(size=COLS).astype(np.float16),
    }
    if codebook != "3inst":
        multiplier = np.array([MULTIPLIERS[codebook]], np.uint32).view(np.int32)
        parts[codebook] = multiplier.reshape(())
    return parts


def test_published_values_of_states():
    want = {
        "3inst": (0.768066, -0.919312, 0.931396),
        "mcg": (1.84375, 0.134521, -0.759277),
        "mul1": (-3.453125, 0.641075, -0.448456),
    }
    for name, published in want.items():
        np.testing.assert_allclose(values(range(3), name), published, rtol=4e-4)


@pytest.mark.parametrize(
    ("bits", "codebook"),
    [(1, "3inst"), (2, "3inst"), (3, "mcg"), (4, "mul1"), (5, "3inst"), (8, "mcg")],
)
def test_values(bits, codebook):
    parts = draw(bits, codebook)
    check_parts(READER, parts, "here: layer")
    assert READER.shape(parts) == (COLS, ROWS)
    q = READER.read(parts, "here: layer")
    want = decoded(parts["trellis"], parts["suh"], parts["svh"], codebook)
    got = np.asarray(dense(q))
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())
    assert isinstance(q, Incoherent) and isinstance(q.base, TrellisTensor)
    assert q.base.format.bits == bits and q.base.format.codebook == codebook
    assert q.dtype == "float16"
    assert np.shares_memory(q.base.codes, parts["trellis"])
    assert q.left is parts["suh"] and q.right is parts["svh"]


def test_signs_of_older_files():
    parts = draw(3)
    signs = {}
    for name, size in (("su", ROWS), ("sv", COLS)):
        words = np.random.default_rng(size).integers(-(2**15), 2**15, size // 16)
        del parts[f"{name}h"]
        parts[name] = words.astype(np.int16)
        signs[name] = [-1.0 if words[i // 16] >> i % 16 & 1 else 1 for i in range(size)]
    q = READER.read(parts, "here: layer")
    assert isinstance(q, Incoherent) and q.left.dtype == np.uint8
    want = decoded(*map(np.array, (parts["trellis"], *signs.values())), "3inst")
    np.testing.assert_allclose(dense(q), want, atol=1e-5)
    x = np.random.default_rng(0).normal(size=(3, ROWS)).astype(np.float32)
    np.testing.assert_allclose(matmul(x, q), x @ want, atol=1e-4)


def test_unfit_layers():
    good = draw(2)
    wide = np.zeros((8, 16, 40), np.int16)
    other = np.array([5], np.int32)
    for change, error, message in (
        ({"trellis": wide}, UnsupportedError, "2.5 bits per weight are not read"),
        ({"trellis": wide[..., :15]}, FormatError, "15 words per tile, expected 16"),
        ({"trellis": np.zeros((8, 16, 144), np.int16)}, FormatError, "144 words per"),
        ({"trellis": good["trellis"][:3]}, FormatError, "in=48, out=256.*of 128"),
        ({"suh": good["suh"][:64]}, FormatError, "suh: has 64 numbers, expected 128"),
        ({"mcg": other}, UnsupportedError, "mcg: is 0x5 .of 1., expected 0xcbac1fed"),
        ({"mcg": other, "mul1": other}, FormatError, "both mcg and mul1"),
    ):
        with pytest.raises(error, match=message):
            READER.read({**good, **change}, "here: layer")
    with pytest.raises(KeyError, match="suh"):
        READER.read({"trellis": good["trellis"]}, "here: layer")
    signs = {"trellis": good["trellis"], "su": np.zeros(2, np.int16)}
    with pytest.raises(FormatError, match="su: has 2 numbers, expected 8"):
        READER.read(signs, "here: layer")

"""SpQR layers, packed and decoded by loops as the format describes them."""

import numpy as np
import pytest

from qjax.converters.packed import check_parts
from qjax.converters.spqr import SpQR
from qjax.errors import FormatError, UnsupportedError
from qjax.ops import matmul
from qjax.tensor import AffineTensor
from qjax.wrappers import Permuted, WithOutliers

READER = SpQR({"bits": 3, "beta1": 16, "beta2": 16, "shapes": {}}, "here")


def tile_words(rng, tall: int, wide: int) -> tuple[list[int], np.ndarray]:
    """Words of one tile of `tall` outputs and `wide` inputs, and its weights."""
    halves = rng.uniform(0.05, 0.2, 4).astype(np.float16)
    halves[2:] = rng.uniform(0, 7, 2)
    pieces = halves.tobytes()
    words, w = [], np.zeros((16, 16), np.float32)
    h = halves.astype(np.float32)
    for row in range(16):
        if row >= tall:
            words.append(0)
            continue
        codes = rng.integers(0, 8, 18)
        scale, zero = h[0] * (codes[0] - h[2]), h[1] * (codes[1] - h[3])
        word = pieces[row // 2] << 54
        for i, code in enumerate(codes[: 2 + wide]):
            word |= int(code) << 3 * i
        words.append(word)
        w[row] = (codes[2:].astype(np.float32) - zero) * scale
    return words, w


def draw(cols: int, rows: int, layout: str = "csr", ordered: bool = True):
    """A layer, and its weight `[in, out]`."""
    rng = np.random.default_rng(cols + rows)
    words, lines = [], []
    for top in range(0, cols, 16):
        line = []
        for left in range(0, rows, 16):
            more, w = tile_words(rng, min(cols - top, 16), min(rows - left, 16))
            words += more
            line.append(w)
        lines.append(line)
    dense = np.block(lines)[:cols, :rows]
    entries = [
        [
            (int(j), np.float16(rng.normal()))
            for j in np.flatnonzero(rng.random(rows) < 0.1)
        ]
        for _ in range(cols)
    ]
    if layout == "none":
        entries = [[] for _ in range(cols)]
    for o, found in enumerate(entries):
        for j, value in found:
            dense[o, j] += np.float32(value)
    offsets, stored = [0], []
    if layout == "ptcsr":
        for top in range(0, cols, 16):
            group = entries[top : top + 16]
            for k in range(max(map(len, group))):
                stored += [e[k] if k < len(e) else (0, np.float16(0)) for e in group]
            offsets.append(len(stored))
    else:
        for found in entries:
            stored += found
            offsets.append(len(stored))
    joined = [int(v.view(np.uint16)) << 16 | j for j, v in stored]
    order = (
        rng.permutation(rows).astype(np.uint32) if ordered else np.zeros(0, np.uint32)
    )
    w = np.zeros_like(dense)
    w[:, order if ordered else np.arange(rows)] = dense
    parts = {
        "dense_weights": np.array(words, np.uint64).view(np.int64),
        "row_offsets": np.array(offsets, np.int32),
        "col_vals": np.array(joined, np.uint32).view(np.int32),
        "in_perm": (order[1::2] << 16 | order[::2]).view(np.int32),
    }
    return parts, w.T


@pytest.mark.parametrize(
    ("cols", "rows", "layout", "ordered"),
    [
        (48, 32, "csr", True),
        (48, 32, "ptcsr", True),
        (32, 64, "csr", False),
        (32, 64, "ptcsr", False),
        (48, 32, "none", True),
        (48, 32, "none", False),
        (32, 42, "csr", True),
        (16, 16, "ptcsr", True),
    ],
)
def test_values(cols, rows, layout, ordered):
    parts, w = draw(cols, rows, layout, ordered)
    full = {k: v for k, v in parts.items() if len(v)}
    check_parts(READER, full, "here: layer")
    assert READER.shape(parts) == (cols, rows)
    q = READER.read(parts, "here: layer")
    assert q.dtype == "float16"
    np.testing.assert_allclose(q.dequantize("float32"), w, rtol=2e-5, atol=1e-6)
    x = np.random.default_rng(1).normal(size=(3, rows)).astype(np.float32)
    np.testing.assert_allclose(matmul(x, q), x @ w, atol=3e-3)
    assert isinstance(q, Permuted) == ordered
    inner = q.base if isinstance(q, Permuted) else q
    assert isinstance(inner, WithOutliers) == (layout != "none")
    if isinstance(inner, WithOutliers):
        assert inner.values.dtype == np.float16 and (inner.values != 0).all()
        inner = inner.base
    assert isinstance(inner, AffineTensor)
    assert inner.scale.codes.dtype == np.uint8


def test_bits_behind_the_last_input():
    parts, _ = draw(16, 20)
    clean = READER.read(parts, "here: layer")
    parts["dense_weights"] = parts["dense_weights"].copy()
    parts["dense_weights"][16:] |= np.int64(2**54 - 2**18)  # codes of inputs 20 to 31
    q = READER.read(parts, "here: layer")
    for name in ("codes", "scale", "zero"):
        one, other = (getattr(t.base.base, name) for t in (q, clean))
        if name != "codes":
            one, other = one.dequantize(), other.dequantize()
        np.testing.assert_array_equal(one, other)


def test_unfit_layers():
    good, _ = draw(48, 32)
    twice = good["in_perm"].copy()
    twice[0] = twice[1]
    for change, message in (
        ({"dense_weights": good["dense_weights"][16:]}, "80 words are not the tiles"),
        ({"row_offsets": good["row_offsets"][:3]}, "with 3 row_offsets"),
        ({"row_offsets": good["row_offsets"][:1]}, "with 1 row_offsets"),
        ({"row_offsets": good["row_offsets"] + 1}, "49 offsets that rise from 0"),
        ({"col_vals": good["col_vals"] | 32}, "outliers at in .*, expected 0 to 31"),
        ({"col_vals": good["col_vals"].astype(np.float32)}, "col_vals: is float32"),
        ({"in_perm": twice}, "in_perm: is not a permutation of 0..31"),
        ({"in_perm": good["in_perm"][:4]}, "96 words are not the tiles"),
    ):
        with pytest.raises(FormatError, match=message):
            READER.read({**good, **change}, "here: layer")
    for name in ("bits", "beta1", "beta2"):
        with pytest.raises(UnsupportedError, match=f"with {name} 4 is not read"):
            SpQR({name: 4}, "here")

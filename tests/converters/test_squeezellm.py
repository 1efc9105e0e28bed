"""SqueezeLLM layers, decoded by loops as the format describes them."""

import numpy as np
import pytest

from qjax.converters.packed import check_parts
from qjax.converters.squeezellm import SqueezeLLM
from qjax.errors import FormatError, QjaxError
from qjax.ops import matmul
from qjax.tensor import CodebookTensor
from qjax.wrappers import LowRank, WithOutliers

from .packers import words

ROWS, COLS = 64, 12
READER = SqueezeLLM({}, "here")


def draw(bits: int, sparse: bool = False, whole: bool = False):
    """A layer, and its float32 weight `[in, out]`."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (ROWS, COLS))
    table = rng.normal(size=(COLS, 2**bits)).astype(np.float32)
    w = np.zeros((ROWS, COLS), np.float32)
    for i in range(ROWS):
        for o in range(COLS):
            w[i, o] = table[o, codes[i, o]]
    parts = {"qweight": words(codes, bits, 0), "lookup_table": table}
    if sparse:
        dense = np.where(rng.random(w.shape) < 0.1, rng.normal(size=w.shape), 0)
        offsets, cols, values = [0], [], []
        for o in range(COLS):
            inputs = np.flatnonzero(dense[:, o])
            cols += [*inputs]
            values += [*dense[inputs, o]]
            offsets.append(len(cols))
        w = w + dense.astype(np.float32)
        parts |= {
            "rows": np.array(offsets, np.int32),
            "cols": np.array(cols, np.int32),
            "vals": np.array(values, np.float32),
            "startrows": np.zeros(4, np.int32),
        }
    if whole:
        index = np.array([7, 0], np.int32)
        full = rng.normal(size=(ROWS, 2)).astype(np.float32)
        for n, o in enumerate(index):
            w[:, o] += full[:, n]
        parts |= {"full_rows": full, "full_row_indices": index}
    return parts, w


@pytest.mark.parametrize(
    ("bits", "sparse", "whole"),
    [(3, False, False), (4, True, False), (3, True, True), (4, False, True)],
)
def test_values(bits, sparse, whole):
    parts, w = draw(bits, sparse, whole)
    check_parts(READER, parts, "here: layer")
    assert READER.shape(parts) == (COLS, ROWS)
    q = READER.read(parts, "here: layer")
    np.testing.assert_allclose(q.dequantize("float32"), w, rtol=1e-6)
    x = np.random.default_rng(1).normal(size=(3, ROWS)).astype(np.float32)
    np.testing.assert_allclose(matmul(x, q), x @ w, atol=1e-5)
    assert isinstance(q, LowRank) == whole
    inner = q.base if isinstance(q, LowRank) else q
    assert isinstance(inner, WithOutliers) == sparse
    if isinstance(inner, WithOutliers):
        assert inner.rows.dtype == inner.cols.dtype == np.uint16
        inner = inner.base
    assert isinstance(inner, CodebookTensor)
    np.testing.assert_array_equal(inner.codebook, parts["lookup_table"].T)
    assert q.dtype == "float16"


def test_no_entries():
    parts, w = draw(4)
    parts |= {
        "rows": np.zeros(COLS + 1, np.int32),
        "cols": np.zeros(0, np.int32),
        "vals": np.zeros(0, np.float32),
    }
    q = READER.read(parts, "here: layer")
    assert isinstance(q, CodebookTensor)
    np.testing.assert_array_equal(q.dequantize("float32"), w)


def test_unfit_layers():
    good, _ = draw(3, True, True)
    rows, cols = good["rows"], good["cols"]
    for change, message in (
        ({"lookup_table": good["lookup_table"][:, :7]}, r"\[12, 7\], expected \[12, 2"),
        ({"lookup_table": good["lookup_table"][:5]}, r"\[5, 8\], expected \[12, 2"),
        (
            {"qweight": good["qweight"][:5]},
            "5 words per output do not hold whole codes",
        ),
        ({"qweight": good["qweight"][:3]}, "outliers at in"),
        ({"rows": rows[:-1]}, "rise from 0 to"),
        ({"rows": rows[::-1].copy()}, "rise from 0 to"),
        ({"rows": np.append(rows, rows[-1])}, "expected 13 offsets .* got 14 from 0"),
        ({"cols": cols[1:]}, "cols: has .* entries, expected"),
        ({"cols": cols - 64}, "outliers at in -64"),
        ({"full_rows": good["full_rows"][1:]}, r"full_rows: has shape \[63, 2\] for 2"),
        ({"full_row_indices": np.array([0, 12])}, "outputs below 12"),
        ({"full_row_indices": np.array([0, -1])}, "outputs below 12"),
    ):
        with pytest.raises(FormatError, match=message):
            READER.read({**good, **change}, "here: layer")
    half = {**good, "lookup_table": good["lookup_table"].astype(np.float64)}
    with pytest.raises(QjaxError, match="table_dtype"):
        READER.read(half, "here: layer")

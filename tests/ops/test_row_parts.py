"""`RowParts`: weights whose rows are in several formats, alone and in stacks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import FormatError
from qjax.formats import Int, KMeans
from qjax.methods import quantize
from qjax.ops import explain, grouped_matmul, matmul
from qjax.ops.grouped import explain_grouped
from qjax.specs import describe, rebuild
from qjax.tensor import dequantize, with_dtype
from qjax.wrappers import MAX_PARTS, Permuted, RowParts, Transposed, layer_of

from .conftest import random

ROWS, COLS = 64, 16
FORMATS = {"int4": (Int(4, 16), 32), "int3": (Int(3, 8, symmetric=False), 32)}


def weight(lead=()):
    """Two formats behind one another, and a third over the seam, in another order."""
    made = [
        quantize(random((*lead, rows, COLS), i), fmt)
        for i, (fmt, rows) in enumerate(FORMATS.values())
    ]
    made.append(Transposed(quantize(random((*lead, COLS, 20), 5), Int(8, "channel"))))
    parts = RowParts(tuple(made), (0, 32, 22), (ROWS, COLS))
    order = np.random.default_rng(1).permutation(ROWS).astype(np.int32)
    return Permuted(parts, jnp.broadcast_to(jnp.asarray(order), (*lead, ROWS)))


def close(got, want):
    want = np.asarray(want, np.float32)
    tolerance = 3e-3 * np.abs(want).max()
    np.testing.assert_allclose(np.float32(got), want, atol=tolerance)


def test_values():
    q = weight()
    w = np.zeros((ROWS, COLS), np.float32)
    for start, part in zip(q.base.starts, q.base.parts, strict=True):
        w[start : start + part.shape[0]] += np.asarray(part.dequantize("float32"))
    w[np.asarray(q.perm)] = w.copy()
    np.testing.assert_array_equal(q.dequantize(), w)
    assert q.shape == (ROWS, COLS) and q.matrix == (ROWS, COLS)
    assert q.base.nbytes == sum(part.nbytes for part in q.base.parts)
    assert q.format == Int(4, 16)
    assert with_dtype(q, "bfloat16").dequantize().dtype == jnp.bfloat16
    assert repr(q.base).startswith("RowParts(AffineTensor(int4-g16")


def test_stacks():
    q, x = weight((3,)), random((3, 2, ROWS), 2)
    w = np.asarray(jax.jit(dequantize)(q))
    want = np.einsum("lmk,lkn->lmn", x, w)
    assert q.shape == (3, ROWS, COLS) and q[1].shape == (ROWS, COLS)
    np.testing.assert_allclose(q[1].dequantize(), w[1], rtol=1e-6)

    @jax.jit
    def products(x, q):
        layers = jnp.arange(3, dtype=jnp.int32)
        one = lambda i: (i, matmul(x[i], layer_of(q, i)))  # noqa: E731
        by_layer = jax.lax.scan(lambda c, i: one(i), 0, layers)[1]
        cut = jax.lax.scan(lambda c, xs: (c, matmul(*xs)), 0, (x, q))[1]
        return jax.vmap(matmul)(x, q), by_layer, cut

    for got in products(x, q):
        close(got, want)
    sizes = jnp.asarray([2, 1, 3], jnp.int32)
    y = jax.jit(grouped_matmul)(x.reshape(6, ROWS), sizes, q)
    expert = np.repeat(np.arange(3), sizes)
    close(y, np.einsum("mk,mkn->mn", x.reshape(6, ROWS), w[expert]))
    back = random((6, COLS), 3)
    y = jax.jit(grouped_matmul)(back, sizes, Transposed(q))
    close(y, np.einsum("mn,mkn->mk", back, w[expert]))


def test_rounded_activations():
    q, x = weight().base, random((4, ROWS), 2)
    for activation in ("int8", "float8_e4m3fn"):
        got = matmul(x, q, activation=activation)
        want = matmul(x, q, activation=activation, backend="reference")
        close(got, want)
        assert np.abs(np.asarray(want - matmul(x, q))).max() > 0


def test_explain():
    said = explain((1, ROWS), weight())
    assert "int4-g16 inside Permuted, RowParts (the first of 3)" in said
    assert "int4-g16" in explain_grouped(4, weight((3,)))


def stored():
    """Spec and arrays of a weight, as files hold them."""
    spec, arrays = describe("w", weight())
    return json.loads(json.dumps(spec)), arrays


def test_artifacts():
    spec, arrays = stored()
    assert "w.base.parts.2.base.codes" in arrays
    again = rebuild("w", spec, arrays.__getitem__)
    q = weight()
    assert jax.tree.structure(again) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, again, q)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("starts", [0, 32, 45], r"parts.2: Transposed.* at row 45 does not fit"),
        ("starts", [0, 32], "as many parts as starts"),
        ("starts", [0, 32, -1], r"starts \[0, 32, -1\] are not places"),
        ("starts", None, "starts None are not places"),
        ("matrix", [64, 17], "parts.0: .* does not fit"),
    ],
)
def test_unfit_places(field, value, message):
    spec, arrays = stored()
    spec["fields"]["base"][field] = value
    with pytest.raises(FormatError, match=message):
        rebuild("w", spec, arrays.__getitem__)


@pytest.mark.parametrize("parts", [None, [], {}, [{"type": "array"}] * (MAX_PARTS + 1)])
def test_unfit_parts(parts):
    spec, arrays = stored()
    spec["fields"]["base"]["fields"]["parts"] = parts
    with pytest.raises(FormatError, match="parts: expected 1 to 64 of them"):
        rebuild("w", spec, arrays.__getitem__)


def test_parts_that_are_not_weights():
    spec, arrays = stored()
    inner = spec["fields"]["base"]["fields"]
    arrays["w.base.parts.0"] = arrays["w.perm"]
    inner["parts"][0] = {"type": "array"}
    with pytest.raises(FormatError, match=r"parts.0: expected a quantized tensor"):
        rebuild("w", spec, arrays.__getitem__)
    spec, arrays = stored()
    affine = spec["fields"]["base"]["fields"]["parts"][0]
    affine["fields"]["scale"] = spec["fields"]["base"]
    with pytest.raises(FormatError):
        rebuild("w", spec, lambda name: arrays.get(name, arrays["w.perm"]))


def test_tables_of_columns_as_parts():
    rng = np.random.default_rng(0)
    q = weight().base
    first = q.parts[0]
    table = jnp.asarray(np.sort(rng.normal(size=(4, COLS)), 0), jnp.float32)
    from qjax.tensor import assemble

    codes = jnp.asarray(rng.integers(0, 4, (32, COLS)), jnp.uint8)
    fmt = KMeans(2, table_dtype="float32")
    other = assemble(fmt, codes, None, (32, COLS), codebook=table)
    q = dataclasses.replace(q, parts=(first, other), starts=(0, 32))
    x = random((3, ROWS), 2)
    close(matmul(x, q), x @ q.dequantize())

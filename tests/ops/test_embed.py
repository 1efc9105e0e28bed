"""`embed` gathers the rows that `dequantize` would have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import SpecError, UnsupportedError
from qjax.methods import quantize
from qjax.ops import embed
from qjax.wrappers import Rotated, Transposed, WithOutliers

from .conftest import FORMATS, random, weight, wrap

IDS = jnp.array([[0, 39, 7], [7, 12, 5]])


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    q = weight(name)
    table = Transposed(q)
    got = jax.jit(embed)(IDS, table)
    assert got.shape == (2, 3, 96)
    dense = jax.jit(lambda q: q.dequantize(jnp.float32))(q)
    np.testing.assert_allclose(got, dense.T[IDS], rtol=1e-6)
    if not q.flat:  # a table quantized along its rows
        np.testing.assert_allclose(jax.jit(embed)(IDS, q), dense[IDS], rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["transposed", "permuted", "scaled", "rotated", "low-rank", "split"]
)
def test_wrappers(name):
    w = wrap(weight("int4-g32"))[name]
    tables = [Transposed(w)] if isinstance(w, Rotated) else [Transposed(w), w]
    for table in tables:
        np.testing.assert_allclose(
            embed(IDS, table), table.dequantize()[IDS], atol=1e-5
        )


def test_dtype_and_dense_tables():
    q = quantize(random((40, 96), 1, "bfloat16"), FORMATS["int4-g32"], axis=-1)
    assert embed(IDS, q).dtype == jnp.bfloat16
    assert embed(IDS, q, dtype="float32").dtype == jnp.float32
    dense = random((40, 96), 1)
    np.testing.assert_array_equal(embed(IDS, dense), dense[IDS])
    assert embed(IDS, dense, dtype="bfloat16").dtype == jnp.bfloat16
    assert embed(jnp.zeros((0, 2), jnp.int32), q).shape == (0, 2, 96)
    np.testing.assert_array_equal(
        embed(jnp.array([99, -5]), dense), dense[jnp.array([39, 0])]
    )


def test_errors():
    q = weight("int4-g32")
    with pytest.raises(SpecError, match="ids have dtype float32, expected integers"):
        embed(jnp.ones(3), q)
    with pytest.raises(SpecError, match=r"shape \[2, 3, 4\], expected \[vocab, dim\]"):
        embed(IDS, jnp.ones((2, 3, 4)))
    with pytest.raises(SpecError, match="6 ids into an empty table"):
        embed(IDS, jnp.ones((0, 4)))
    with pytest.raises(UnsupportedError, match="stored flat over the transpose"):
        embed(IDS, weight("nf4-flat"))
    none = jnp.zeros(0, jnp.int32)
    with pytest.raises(UnsupportedError, match="through WithOutliers"):
        embed(IDS, WithOutliers(q, jnp.zeros(0), none, none))

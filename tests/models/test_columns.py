"""Tensors that hold several weights, taken apart without unpacking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import UnsupportedError
from qjax.formats import NF4, Int
from qjax.methods import quantize
from qjax.models.columns import columns, joined
from qjax.models.layouts import Kind
from qjax.models.weights import Entry
from qjax.wrappers import Permuted

ROWS, HEADS, WIDE = 64, 2, 4


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(
    "fmt", [Int(3, 32, symmetric=False), Int(8, "channel"), NF4(32), NF4(32, True)]
)
def test_each_weight_is_what_splitting_the_dense_one_gives(
    fmt, permuted, interleaved, rng
):
    shape = (ROWS, HEADS * WIDE)
    w = rng.normal(size=(ROWS, 3 * shape[1])).astype(np.float32)
    q = quantize(w, fmt)
    if permuted:
        q = Permuted(q, jnp.asarray(rng.permutation(ROWS), jnp.int32))
    kind, paths = Kind(True, interleaved), ("q", "k", "v")
    entry = Entry("qkv", w.shape[::-1], paths, (shape,) * 3, 0, kind, HEADS)
    want = entry.read(np.asarray(q.dequantize()).T)
    got = entry.read(q)
    for path in paths:
        assert got[path].shape == shape
        np.testing.assert_array_equal(got[path].dequantize(), want[path])
    nested = isinstance(fmt, NF4) and fmt.double
    again = entry.write_packed(got)
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())
    if not nested:  # whose scales were taken apart decoded
        jax.tree.map(np.testing.assert_array_equal, again, q)


def test_weights_that_cannot_be_joined(rng):
    w = rng.normal(size=(64, 8)).astype(np.float32)
    a, b = quantize(w, Int(4, 32)), quantize(w, Int(3, 32))
    with pytest.raises(UnsupportedError, match="they need one format"):
        joined([a, b])
    orders = [jnp.asarray(rng.permutation(64), jnp.int32) for _ in range(2)]
    with pytest.raises(UnsupportedError, match="their perm differ"):
        joined([Permuted(a, order) for order in orders])
    with pytest.raises(UnsupportedError, match="scales are codes themselves"):
        joined([quantize(w, NF4(32, True))] * 2)


def test_blocks_that_cross_columns_are_refused(rng):
    q = quantize(rng.normal(size=(33, 8)).astype(np.float32), NF4(64))
    with pytest.raises(UnsupportedError, match="blocks cross output columns"):
        columns(q, slice(0, 4))

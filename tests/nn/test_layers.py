"""`QLinear` and `QEmbed` compute what their dequantized weights compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.formats import FP8, NF4, Int
from qjax.methods import quantize
from qjax.nn import QEmbed, QLinear, QuantizedParam

FORMATS = [Int(4, 16), NF4(32), FP8("e4m3", "channel")]


def near(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance * float(np.abs(b).max()))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_linear_multiplies_by_the_packed_kernel(rng, fmt):
    q = quantize(rng.normal(size=(64, 24)).astype("f4"), fmt)
    bias = rng.normal(size=24).astype("f4")
    x = jnp.asarray(rng.normal(size=(2, 5, 64)), jnp.float32)
    layer = QLinear(q, bias)
    assert layer.frozen and isinstance(layer.kernel, QuantizedParam)
    near(layer(x), x @ q.dequantize() + bias)
    assert QLinear(q, bias, dtype=jnp.bfloat16)(x).dtype == jnp.bfloat16
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_dense_linear_is_a_product(rng):
    w = rng.normal(size=(8, 4)).astype("f4")
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    layer = QLinear(w)
    assert isinstance(layer.kernel, nnx.Param) and not layer.frozen
    near(layer(x), x @ w)


def test_stacked_layers_scan(rng):
    q = quantize(rng.normal(size=(3, 16, 16)).astype("f4"), Int(4, 8))
    layers = QLinear(q, rng.normal(size=(3, 16)).astype("f4"))
    x = jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)
    graph, state = nnx.split(layers)

    def step(x, one):
        return jnp.tanh(nnx.merge(graph, one)(x)), None

    y, _ = jax.jit(lambda x, s: jax.lax.scan(step, x, s))(x, state)
    for i in range(3):
        x = jnp.tanh(x @ q[i].dequantize() + layers.bias[i])
    near(y, x)


@pytest.mark.parametrize(
    "fmt", [None, Int(4, 16), NF4(32)], ids=lambda f: f.name if f else "dense"
)
def test_embed_looks_up_and_attends(rng, fmt):
    table = jnp.asarray(rng.normal(size=(40, 64)), jnp.float32)
    stored = quantize(table, fmt, axis=-1) if fmt else table
    dense = stored.dequantize() if fmt else table
    layer = QEmbed(stored)
    ids = jnp.asarray([[0, 39], [7, 7]], jnp.int32)
    near(layer(ids), dense[ids])
    assert QEmbed(stored, dtype=jnp.bfloat16)(ids).dtype == jnp.bfloat16
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
    near(layer.attend(x), x @ dense.T)

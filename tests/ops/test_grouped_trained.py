"""Experts that are trained for a format: grouped products of codes, float gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.errors import UnsupportedError
from qjax.formats import Int
from qjax.ops import grouped_gate_up, grouped_matmul
from qjax.wrappers import RoundedInputs, Trained

SIZES = jnp.asarray([3, 0, 2], jnp.int32)  # of 6 rows; the last has no expert


@pytest.fixture(scope="module")
def experts():
    rng = np.random.default_rng(0)
    x, w, up = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((6, 8), (3, 8, 4), (3, 8, 4))
    )
    return x, w, up


def trained(w, **more):
    base = qjax.quantize(w, Int(4, 8))
    return Trained(base, base.dequantize(jnp.float32) + 0.0 * w, **more)


def test_products_are_those_of_the_codes_and_gradients_those_of_floats(experts):
    x, w, _ = experts
    base = qjax.quantize(w, Int(4, 8))
    np.testing.assert_array_equal(
        grouped_matmul(x, SIZES, trained(w)), grouped_matmul(x, SIZES, base)
    )

    def loss(product):
        factors = jnp.sin(jnp.arange(24.0)).reshape(6, 4)
        return lambda x, w: jnp.sum(factors * product(x, w))

    def straight(w):
        return w + lax.stop_gradient(base.dequantize(jnp.float32) - w)

    def learned(x, w):
        own = Trained(lax.stop_gradient(base), straight(w))
        return grouped_matmul(x, SIZES, own)

    def plain(x, w):
        parts = jnp.split(x, [3, 3, 5])
        dense = straight(w)
        made = [parts[0] @ dense[0], parts[2] @ dense[2], jnp.zeros((1, 4))]
        return jnp.concatenate(made)

    got, want = (
        jax.grad(loss(product), argnums=(0, 1))(x, w) for product in (learned, plain)
    )
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_both_halves_and_a_delayed_start(experts):
    x, w, up = experts
    on = jnp.ones(3, bool)
    packed = [qjax.quantize(one, Int(4, 8)) for one in (w, up)]
    made = grouped_gate_up(x, SIZES, trained(w, active=on), trained(up, active=on))
    np.testing.assert_allclose(made, grouped_gate_up(x, SIZES, *packed), atol=1e-5)
    free = Trained(packed[0], w, active=~on)
    np.testing.assert_array_equal(
        grouped_matmul(x, SIZES, free), grouped_matmul(x, SIZES, w)
    )


def test_what_has_no_rule(experts):
    x, w, _ = experts
    with pytest.raises(UnsupportedError, match=r"no int8 gradients.*backward=\(\)"):
        grouped_matmul(x, SIZES, trained(w, backward=("dgrad",)))
    own = Trained(RoundedInputs(qjax.quantize(w, Int(4, 8)), "int8"), w)
    with pytest.raises(UnsupportedError, match="no rule for RoundedInputs"):
        grouped_matmul(x, SIZES, own)

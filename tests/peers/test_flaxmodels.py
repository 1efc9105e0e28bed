"""Linen models of the flaxmodels package run on packed parameters, unchanged."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import Int
from qjax.nn import linen
from qjax.recipes import Recipe, Rule
from qjax.tree import model_size

RECIPE = Recipe((Rule("*kernel", Int(8, 32)), Rule("*embedding", Int(8, "channel"))))


@pytest.fixture(scope="module")
def flaxmodels():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("flaxmodels")


def _check(model, variables, recipe, read, *args, **options):
    """Packs, runs and compares with the float model."""
    packed = linen.quantize_params(model, variables, recipe, *args, **options)
    y = read(jax.jit(lambda v: model.apply(v, *args, **options))(variables))
    z = read(jax.jit(lambda v: linen.apply(model, v, *args, **options))(packed))
    assert y.shape == z.shape and y.dtype == z.dtype
    np.testing.assert_allclose(z, y, atol=0.05 * float(np.abs(y).max()))
    return model_size(packed)


def test_gpt2(flaxmodels, monkeypatch):
    reshape = jnp.reshape

    def with_newshape(a, shape=None, *, newshape=None, **options):
        return reshape(a, shape if newshape is None else newshape, **options)

    # The package spells an argument in a way that JAX has dropped.
    monkeypatch.setattr(jnp, "reshape", with_newshape)
    config = types.SimpleNamespace(
        vocab_size=96,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=None,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        activation_function="gelu_new",
    )
    with jax.numpy_dtype_promotion("standard"):
        model = flaxmodels.gpt2.GPT2Model(config=config)
        ids = jnp.asarray([[1, 2, 3, 4, 5]], jnp.int32)
        variables = jax.jit(model.init)(jax.random.key(0), ids)
        size = _check(
            model, variables, RECIPE, lambda out: out["last_hidden_state"], ids
        )
    assert size.quantized_parameters > 0.95 * size.parameters


def test_resnet18(flaxmodels):
    with jax.numpy_dtype_promotion("standard"):
        model = flaxmodels.ResNet18(
            output="logits", pretrained=None, num_classes=10, normalize=False
        )
        x = jax.random.uniform(jax.random.key(0), (1, 32, 32, 3))
        init = jax.jit(lambda key, x: model.init(key, x, train=False))
        variables = init(jax.random.key(0), x)
        recipe = Recipe((Rule("*kernel", Int(8, "channel")),))
        size = _check(model, variables, recipe, lambda out: out, x, train=False)
    assert size.bits_per_weight < 8.1

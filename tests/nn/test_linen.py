"""Linen models run on packed parameters without being changed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import SpecError
from qjax.formats import Int
from qjax.nn import linen, quantization_report
from qjax.recipes import Recipe, Rule
from qjax.tree import dequantize_tree, is_quantized, model_size, quantize_tree

FMT = Int(4, 8)
ALL = Recipe((Rule("*kernel", FMT), Rule("*embedding", FMT)))
IDS = jnp.asarray([[1, 2, 3]], jnp.int32)


def near(a, b, tolerance=2e-6):
    np.testing.assert_allclose(a, b, atol=tolerance * max(float(np.abs(b).max()), 1.0))


class Own(nn.Module):
    """Multiplies by a parameter of its own, which no adapter knows."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (16, 16))


class Layer(nn.Module):
    """One step of a scan."""

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(16)(x)), None


class Model(nn.Module):
    """Every layer of Linen that is packed, Flax's attention, a scan and a tied head."""

    @nn.compact
    def __call__(self, ids, train=False):
        table = nn.Embed(32, 16)
        x = table(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x, x)
        x = nn.Dropout(0.1)(x, deterministic=not train)
        x = nn.Conv(16, (3,))(x)
        x = nn.Einsum((16, 2, 8), "btd,dhk->bthk")(x)
        x = Own()(nn.DenseGeneral(16, axis=(-2, -1))(x))
        stack = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack()(x, None)
        return table.attend(nn.LayerNorm()(x))


def grown(variables, packed):
    """The float variables with every packed kernel replaced by its decoded value."""
    shapes = jax.tree.map(jnp.shape, variables)
    dense = dequantize_tree(packed)
    return jax.tree.map(
        lambda leaf, shape: leaf.reshape(shape),
        dense,
        shapes,
        is_leaf=lambda leaf: not isinstance(leaf, dict),
    )


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Model().init)(jax.random.key(0), IDS)


@pytest.mark.parametrize("by_tree", [False, True], ids=["layers", "tree"])
def test_a_model_runs_on_packed_parameters(variables, by_tree):
    model = Model()
    if by_tree:
        packed = quantize_tree(variables, Recipe((Rule("*kernel", Int(4, 2)),)))
    else:
        packed = linen.quantize_params(model, variables, ALL, IDS)
        attention = packed["params"]["MultiHeadDotProductAttention_0"]
        assert attention["query"]["kernel"].shape == (16, 16)
        assert packed["params"]["Conv_0"]["kernel"].shape == (48, 16)
        assert packed["params"]["ScanLayer_0"]["Dense_0"]["kernel"].shape == (3, 16, 16)
        assert packed["params"]["Own_0"]["kernel"].shape == (16, 16)
        report = {entry.path: entry for entry in quantization_report(packed)}
        assert report["params.Own_0.kernel"].format == "int4-g8"
        assert report["params.LayerNorm_0.scale"].reason == "vector"
        assert report["params.ScanLayer_0.Dense_0.bias"].state == "kept"
    assert model_size(packed).nbytes < model_size(variables).nbytes
    y = jax.jit(lambda v, ids: linen.apply(model, v, ids))(packed, IDS)
    near(y, jax.jit(model.apply)(grown(variables, packed), IDS))


def test_packed_products_do_not_decode(variables, monkeypatch):
    packed = linen.quantize_params(
        Model(), variables, Recipe((Rule("*query.kernel", FMT),)), IDS
    )
    kind = type(packed["params"]["MultiHeadDotProductAttention_0"]["query"]["kernel"])

    def refuse(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr(kind, "dequantize", refuse)
    jax.eval_shape(lambda v: linen.apply(Model(), v, IDS), packed)


def test_results_keep_packed_leaves_packed(variables):
    recipe = Recipe((Rule("*Einsum_0.kernel", FMT), Rule("*embedding", FMT)))
    packed = linen.quantize_params(Model(), variables, recipe, IDS)
    run = jax.jit(lambda v: linen.apply(Model(), v, IDS, mutable=["params"]))
    _, changed = run(packed)
    kinds = jax.tree.leaves(jax.tree.map(type, changed, is_leaf=is_quantized))
    before = jax.tree.leaves(jax.tree.map(type, packed, is_leaf=is_quantized))
    assert kinds == before


def test_dense_layer_on_the_fly_and_packed():
    layer = linen.QDense(8, format=FMT)
    x = jax.random.normal(jax.random.key(1), (2, 16))
    variables = layer.init(jax.random.key(0), x)
    packed = quantize_tree(variables, FMT)
    dense = dequantize_tree(packed)["params"]["kernel"]
    near(layer.apply(packed, x), x @ dense)
    near(layer.apply(variables, x), x @ dense)
    grad = jax.grad(lambda v: jnp.sum(layer.apply(v, x)))(variables)["params"]["kernel"]
    near(grad, jnp.broadcast_to(x.sum(0)[:, None], (16, 8)))
    half = linen.QDense(8, format=FMT, dtype=jnp.bfloat16, use_bias=False)
    assert half.apply(packed, x).dtype == jnp.bfloat16


def test_scans_over_another_axis_are_refused():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(16, use_bias=False)(x), None

    class Last(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 2}
            stack = nn.scan(
                Plain, variable_axes=axes, split_rngs={"params": True}, length=3
            )
            return stack()(x, None)[0]

    x = jnp.ones((1, 16))
    variables = Last().init(jax.random.key(0), x)
    with pytest.raises(SpecError, match="scan over the first axis"):
        linen.quantize_params(Last(), variables, ALL, x)


def test_partitioned_parameters_are_unboxed():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer = nn.Dense(8, kernel_init=init)
    x = jnp.ones((1, 16))
    packed = linen.quantize_params(layer, layer.init(jax.random.key(0), x), ALL, x)
    assert is_quantized(packed["params"]["kernel"])
    assert linen.apply(layer, packed, x).shape == (1, 8)

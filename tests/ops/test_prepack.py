"""Prepacked weights: the same products, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.export import DisabledSafetyCheck

import qjax
from qjax.ops import canonical, explain, kernels, matmul, prepack, target
from qjax.ops.blocks import materialize_scale
from qjax.ops.prepack import Prepacked
from qjax.pallas_kernels import native
from qjax.pallas_kernels.matmul import cpu_layout
from qjax.wrappers import Transposed, layer_of

from .conftest import FORMATS, random, weight, wrap

NESTED = ("int4-nested", "nf4-double")


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


PLANES = ("int3", "int5", "int6", "int7", "kmeans3-g")
UNREAD = ("int4-g2", "int4-out", "nf4-f", "kmeans3-g24", "additive")
OWN_TABLES = ("kmeans2", "kmeans3", "kmeans4", "kmeans6")
"""Formats with a table per column, which no kernel reads."""


def strips(name):
    """Whether native code reads another layout of a weight than the one at rest."""
    spec = kernels.kernel_spec(materialize_scale(weight(name)))
    loaded = native.status().loaded and not isinstance(spec, str)
    return loaded and cpu_layout.obstacle(spec) is None


LAYOUTS = {
    "cpu": strips,
    "TPU v5 lite": lambda name: name.startswith(PLANES),
    "NVIDIA H200": lambda name: not name.startswith(UNREAD) and name not in OWN_TABLES,
}


@pytest.mark.parametrize("activation", [None, "int8"])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_the_way_back_is_exact(name, kind, activation):
    q = weight(name)
    packed = prepack(q, kind=kind, activation=activation)
    if (activation is None or kind == "cpu") and name not in ("dynamic8", "bfloat16"):
        changed = name in NESTED or LAYOUTS[kind](name)
        assert isinstance(packed, Prepacked) == changed
    same(canonical(packed), q)
    assert packed.shape == q.shape and packed.format == q.format
    np.testing.assert_array_equal(packed.dequantize(), q.dequantize())


@pytest.mark.parametrize("name", NESTED)
def test_products_and_gradients_are_the_same(name):
    q = weight(name)
    packed = prepack(q)
    for wrapped, plain in (
        (packed, q),
        (Transposed(packed), Transposed(q)),
        *zip(wrap(packed).values(), wrap(q).values(), strict=True),
    ):
        x = random((3, plain.shape[0]), 2)
        close = dict(rtol=1e-4, atol=2e-3)
        y, expected = matmul(x, wrapped), x @ plain.dequantize()
        np.testing.assert_allclose(y, expected, **close)
        dx = jax.grad(lambda x, w=wrapped: jnp.sum(matmul(x, w) ** 2))(x)
        expected = jax.grad(lambda x, w=plain: jnp.sum(matmul(x, w) ** 2))(x)
        np.testing.assert_allclose(dx, expected, rtol=1e-3, atol=1e-1)


def test_layers_of_a_prepacked_stack():
    stack = jax.tree.map(lambda *v: jnp.stack(v), *[weight("nf4-double")] * 3)
    packed = prepack(stack)
    assert packed.shape == stack.shape
    x = random((2, 96), 2)
    for i in range(3):
        y = jax.jit(lambda i: matmul(x, layer_of(packed, i)))(jnp.int32(i))
        np.testing.assert_allclose(y, x @ stack[i].dequantize(), rtol=1e-4, atol=2e-3)


def test_explain_asks_for_it():
    q = weight("nf4-double")
    assert "nf4" in explain((1, 96), q) and "nf4" in explain((1, 96), prepack(q))


def test_a_model_is_prepacked_and_saved_as_it_was(model_path, tmp_path):
    model, tokenizer = qjax.load(model_path)
    model = qjax.quantize_model(model, qjax.NF4(double=True))
    packed = qjax.prepack(model)
    leaves = jax.tree.leaves(nnx.state(packed), is_leaf=is_prepacked)
    assert any(map(is_prepacked, leaves))
    tokens = jnp.asarray([tokenizer.encode("Once upon a time")], jnp.int32)
    np.testing.assert_allclose(packed(tokens)[0], model(tokens)[0], atol=1e-3)
    same(packed.params(), model.params())
    qjax.save(packed, tmp_path / "out")
    again, _ = qjax.load(tmp_path / "out")
    same(again.params(), model.params())


def is_prepacked(leaf):
    return isinstance(leaf, Prepacked)


def test_hopper_programs_hold_the_kernel():
    """Lowered without a GPU: product and gradient of a layer of a prepacked stack."""
    stack = jax.tree.map(lambda *v: jnp.stack(v), *[weight("int4-g32", (256, 64))] * 2)

    def step(x, q, i):
        y, pull = jax.vjp(lambda x: matmul(x, layer_of(q, i)), x)
        return pull(y)

    with target("NVIDIA H200"):
        q = prepack(stack)
        first = jnp.int32(0)
        assert explain((4, 256), layer_of(q, first), jnp.bfloat16).startswith("gpu: ")
        assert "prepack" in explain((4, 256), stack[0], jnp.bfloat16)
        lowered = jax.export.export(
            jax.jit(step),
            platforms=["cuda"],
            disabled_checks=[DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
        )(jax.ShapeDtypeStruct((4, 256), jnp.bfloat16), q, first)
    assert "mosaic_gpu" in lowered.mlir_module()

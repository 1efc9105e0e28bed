"""Layers with adapters beside their equations in NumPy, over every kind of weight."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import ops
from qjax.formats import NF4, Int
from qjax.methods import quantize
from qjax.nn import QEinsum, QEmbed, QLinear
from qjax.nn.lora import (
    Adapter,
    DropoutKey,
    LoRAEinsum,
    LoRAEmbed,
    LoRALinear,
    with_dropout_key,
    without_adapter,
)
from qjax.tensor import QuantizedTensor
from qjax.wrappers import RoundedInputs, Transposed
from tests.conformance.test_tensors import WRAPPERS, build

ROWS, COLS, RANK, SCALE = 32, 8, 3, 1.5
KINDS = ("int4-nested", "int4-out", "nf4-double", "fp8-block", "nvfp4", "bfloat16")
KINDS += ("kmeans4-group", "additive2x8", "incoherent", "ggml-q4_k")
CLOSE: Any = {"rtol": 2e-5, "atol": 2e-5}


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def adapter(w: Any, *, dora=False, pool=1, rate=0.0, lead=()):
    """Random factors beside a weight, and magnitudes that are not its norms."""
    w = np.asarray(w, np.float32)
    rows, cols = w.shape[-2:]
    a, b = 0.3 * floats(*lead, rows // pool, RANK), floats(*lead, RANK, cols, seed=1)
    more = {}
    if dora:
        more["magnitude"] = jnp.asarray(1 + np.abs(floats(*lead, cols, seed=2)))
        more["squares"] = jnp.asarray((w * w).sum(-2))
    scale = jnp.full(lead, SCALE)
    a, b = jnp.asarray(a), jnp.asarray(b)
    return Adapter(a, b, scale, rate=rate, pool=pool, **more)


def value(variable):
    return np.asarray(variable.get_value(), np.float64)


def expected(x: Any, w: Any, lora: Adapter, bias: Any = 0.0, dropped: Any = None):
    """The equations of `qjax.nn.lora`, float64, of one matrix."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    delta = SCALE * np.repeat(value(lora.a), lora.pool, 0) @ value(lora.b) / lora.pool
    dropped = x if dropped is None else dropped
    if lora.magnitude is None:
        return x @ w + dropped @ delta + bias
    factor = value(lora.magnitude) / np.linalg.norm(w + delta, axis=0)
    kept = x @ w - dropped @ w
    return kept + factor * (dropped @ (w + delta)) + bias


def trained_part(layer):
    """Gradients of `sum(y * dy)` of the trained variables, and what is stored."""
    graph, trained, frozen = nnx.split(layer, nnx.LoRAParam, ...)

    def function(x, dy):
        y, pull = jax.vjp(lambda t: nnx.merge(graph, t, frozen)(x), trained)
        return pull(dy)[0], jax.tree.leaves(pull), y

    return jax.jit(function)


@pytest.mark.parametrize("kind", ["plain", "dora", "pooled"])
@pytest.mark.parametrize("fmt", [None, Int(4, 8), NF4(32, double=True)])
def test_values_and_gradients(kind, fmt):
    w: Any = jnp.asarray(floats(ROWS, COLS, seed=3))
    packed = w if fmt is None else quantize(w, fmt)
    dense = np.asarray(w if fmt is None else packed.dequantize(), np.float64)
    lora = adapter(dense, dora=kind == "dora", pool=4 if kind == "pooled" else 1)
    bias = jnp.asarray(floats(COLS, seed=4))
    layer = LoRALinear(QLinear(packed, bias), lora)
    x, dy = floats(2, 5, ROWS, seed=5), floats(2, 5, COLS, seed=6)
    slopes, _, y = trained_part(layer)(jnp.asarray(x), jnp.asarray(dy))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected(x, dense, lora, np.asarray(bias)), **CLOSE)
    assert set(slopes["lora"]) == {"a", "b", "magnitude"} - (
        {"magnitude"} if kind != "dora" else set()
    )
    # The norm of DoRA is a constant: its gradient is that of a scaled product.
    x = x.reshape(-1, ROWS // lora.pool, lora.pool).mean(-1).astype(np.float64)
    dy, factor = dy.reshape(-1, COLS).astype(np.float64), 1.0
    a, b = value(lora.a), value(lora.b)
    if kind == "dora":
        merged = dense + SCALE * a @ b
        norm = np.linalg.norm(merged, axis=0)
        factor = value(lora.magnitude) / norm
        slope = (dy * (x @ merged)).sum(0) / norm
        np.testing.assert_allclose(slopes["lora"]["magnitude"][...], slope, **CLOSE)
    down = x.T @ (dy * factor)
    close: Any = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(slopes["lora"]["a"][...], SCALE * down @ b.T, **close)
    np.testing.assert_allclose(slopes["lora"]["b"][...], SCALE * a.T @ down, **close)


@pytest.mark.parametrize("name", (*KINDS, *WRAPPERS))
def test_every_kind_of_weight(name):
    """The adapter adds to what the base gives; norms are of what it decodes to."""
    w = build(name)[1]
    dense = np.asarray(w.dequantize(), np.float64)
    x = jnp.asarray(floats(3, dense.shape[0]))
    layer = LoRALinear(QLinear(w), adapter(dense, dora=True))
    dy = jnp.ones((3, dense.shape[1]))
    _, stored, y = trained_part(layer)(x, dy)
    base = np.asarray(ops.matmul(x, w), np.float64)
    want = expected(x, dense, layer.lora)
    rounded = base - np.asarray(x, np.float64) @ dense  # activations, where they are
    factor = value(layer.lora.magnitude) / np.linalg.norm(
        dense + SCALE * value(layer.lora.a) @ value(layer.lora.b), axis=0
    )
    spread = np.abs(want).max()
    assert np.abs(y - want - rounded * factor).max() < 2e-5 * spread
    floating = [s for s in stored if jnp.issubdtype(s.dtype, jnp.floating)]
    own = {leaf.shape for leaf in jax.tree.leaves(w)}
    assert not [
        s.shape for s in floating if s.shape == dense.shape and s.shape not in own
    ]


def test_a_float_weight_is_rounded_on_the_fly():
    w, fmt = jnp.asarray(floats(ROWS, COLS)), Int(3, 8)
    dense = np.asarray(quantize(w, fmt).dequantize())
    layer = LoRALinear(QLinear(w, format=fmt), adapter(dense))
    x = floats(5, ROWS, seed=5)
    np.testing.assert_allclose(
        layer(jnp.asarray(x)), expected(x, dense, layer.lora), **CLOSE
    )
    plain = without_adapter(layer)
    assert type(plain) is QLinear
    assert plain.format == fmt
    assert plain.kernel is layer.kernel


def test_compute_dtype_is_that_of_the_input():
    w = quantize(jnp.asarray(floats(ROWS, COLS)), Int(8, 8))
    for dora in (False, True):
        layer = LoRALinear(QLinear(w), adapter(w.dequantize(), dora=dora))
        x = jnp.asarray(floats(5, ROWS, seed=5), jnp.bfloat16)
        slopes, _, y = trained_part(layer)(x, jnp.ones((5, COLS), x.dtype))
        assert y.dtype == jnp.bfloat16
        want = expected(x, w.dequantize(), layer.lora)
        assert (
            np.abs(np.asarray(y, np.float32) - want).max() < 0.02 * np.abs(want).max()
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(slopes)} == {
            jnp.dtype("float32")
        }


def test_embedding_has_its_own_row_and_the_tied_head_the_table():
    table = floats(16, COLS)
    packed = quantize(jnp.asarray(table), Int(8, "channel"), axis=-1)
    lora = adapter(np.zeros((16, COLS)))
    ids, x = jnp.asarray([[0, 3], [15, 3]]), jnp.asarray(floats(2, COLS))
    for weight in (jnp.asarray(table), packed):
        plain = QEmbed(weight)
        layer = LoRAEmbed(plain, lora)
        want = np.asarray(plain(ids)) + SCALE * value(lora.a)[np.asarray(ids)] @ value(
            lora.b
        )
        np.testing.assert_allclose(layer(ids), want, **CLOSE)
        np.testing.assert_array_equal(layer.attend(x), plain.attend(x))


@pytest.mark.parametrize(
    ("kind", "fmt"), [("plain", None), ("dora", Int(4, 8)), ("pooled", Int(4, 8))]
)
def test_every_expert_has_its_own(kind, fmt):
    w: Any = jnp.asarray(floats(3, ROWS, COLS, seed=3))
    w = w if fmt is None else quantize(w, fmt)
    dense = np.asarray(w if fmt is None else w.dequantize())
    pool = 4 if kind == "pooled" else 1
    lora = adapter(dense, dora=kind == "dora", pool=pool, lead=(3,))
    bias = floats(3, COLS)
    plain = QEinsum("ecd,edf->ecf", w, jnp.asarray(bias), kernel_shape=dense.shape)
    x, dy = jnp.asarray(floats(3, 5, ROWS, seed=5)), jnp.ones((3, 5, COLS))
    slopes, _, y = trained_part(LoRAEinsum(plain, lora))(x, dy)
    graph, state = nnx.split(lora)
    own = [nnx.merge(graph, jax.tree.map(lambda v, e=e: v[e], state)) for e in range(3)]
    for e in range(3):
        want = expected(x[e], dense[e], own[e], bias[e])
        np.testing.assert_allclose(y[e], want, **CLOSE)
    alone = trained_part(LoRALinear(QLinear(w[1]), own[1]))(x[1], dy[1])[0]
    for name, slope in alone["lora"].items():
        got = slopes["lora"][name][...][1]
        np.testing.assert_allclose(got, slope[...], rtol=1e-4, atol=1e-4)


def test_heads_of_an_einsum_are_one_matrix():
    w = jnp.asarray(floats(ROWS, 2, 4))
    plain = QEinsum("btd,dhk->bthk", w)
    matrix = plain.to_matrix(w)
    layer = LoRAEinsum(plain, adapter(matrix))
    x = floats(2, 5, ROWS, seed=5)
    want = expected(x, matrix, layer.lora).reshape(2, 5, 2, 4)
    np.testing.assert_allclose(layer(jnp.asarray(x)), want, **CLOSE)
    np.testing.assert_array_equal(plain.equation.from_matrix(matrix, (ROWS, 2, 4)), w)


class Two(nnx.Module):
    """Two equal layers, and one whose adapter drops nothing."""

    def __init__(self, rate=0.5, dora=False):
        w = jnp.asarray(floats(ROWS, COLS))
        self.w = np.asarray(w, np.float64)
        self.first = LoRALinear(QLinear(w), adapter(w, rate=rate, dora=dora))
        self.second = LoRALinear(QLinear(w), adapter(w, rate=rate, dora=dora))
        self.third = LoRALinear(QLinear(w), adapter(w))


def test_dropout_is_off_without_a_key():
    model = Two()
    x = floats(5, ROWS, seed=5)
    want = expected(x, model.w, model.first.lora)
    np.testing.assert_allclose(model.first(jnp.asarray(x)), want, **CLOSE)
    on = with_dropout_key(model, jax.random.key(1))
    assert np.abs(np.asarray(on.first(jnp.asarray(x))) - want).max() > 0.1
    off = with_dropout_key(on, None)
    np.testing.assert_array_equal(
        off.first(jnp.asarray(x)), model.first(jnp.asarray(x))
    )
    assert model.third.lora.key is None


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_zeroes_and_scales_inputs_of_the_adapter(dora):
    model = with_dropout_key(Two(0.25, dora), jax.random.key(1))
    x = floats(50, ROWS, seed=5)
    dropped = np.asarray(model.first.lora.drop(jnp.asarray(x)))
    kept = dropped != 0
    assert 0.7 < kept.mean() < 0.8
    np.testing.assert_allclose(dropped[kept], x[kept] / 0.75, rtol=1e-6)
    want = expected(x, model.w, model.first.lora, dropped=dropped.astype(np.float64))
    np.testing.assert_allclose(model.first(jnp.asarray(x)), want, rtol=1e-4, atol=1e-4)


def test_keys_differ_between_adapters_layers_and_steps_alone():
    x = jnp.ones((4, ROWS))
    graph, trained, frozen = nnx.split(Two(), nnx.LoRAParam, ...)

    def masks(key):
        model = nnx.merge(graph, trained, with_dropout_key(frozen, key))
        return [np.asarray(one.lora.drop(x)) for one in (model.first, model.second)]

    first, second = masks(jax.random.key(1))
    again, _ = masks(jax.random.key(1))
    later, _ = masks(jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    assert (first != later).any()
    stack = Adapter(jnp.ones((5, 2, 1)), jnp.ones((5, 1, 2)), jnp.ones(5), rate=0.5)
    keys = with_dropout_key(nnx.state(stack), jax.random.key(1))["key"]
    assert isinstance(keys, DropoutKey)
    assert len(np.unique(np.asarray(keys[...]), axis=0)) == 5


def test_experts_drop_their_own():
    lora = adapter(np.zeros((3, ROWS, COLS)), rate=0.5, lead=(3,))
    layer = LoRAEinsum(QEinsum("ecd,edf->ecf", jnp.zeros((3, ROWS, COLS))), lora)
    layer = with_dropout_key(layer, jax.random.key(1))
    same = jnp.broadcast_to(jnp.asarray(floats(1, 2, ROWS)), (3, 2, ROWS))
    off = with_dropout_key(layer, None)
    y = np.asarray(layer(same)) / np.asarray(off(same))
    assert np.abs(y[0] - y[1]).max() > 0.1


def test_adapters_are_a_tree_of_their_own():
    model = Two()
    state = nnx.state(model, nnx.LoRAParam)
    assert len(jax.tree.leaves(state)) == 6
    graph, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)
    x = jnp.asarray(floats(5, ROWS))
    run = jax.jit(lambda t, f, x: nnx.merge(graph, t, f).first(x))
    np.testing.assert_allclose(run(trained, frozen, x), model.first(x), **CLOSE)
    mapped = jax.vmap(lambda x: nnx.merge(graph, trained, frozen).first(x))(x)
    np.testing.assert_allclose(mapped, model.first(x), **CLOSE)


def test_norms_are_of_the_weight_though_activations_are_rounded():
    q = quantize(jnp.asarray(floats(32, COLS)), Int(8, 8))
    rounded = Transposed(Transposed(RoundedInputs(q)))
    lora = adapter(q.dequantize(), dora=True)
    np.testing.assert_array_equal(lora.columns(rounded), lora.columns(q))


def test_no_dense_weight_in_the_gradient():
    """What the compiler reserves beyond arguments and results, of a large weight."""
    jax.config.update("jax_disable_most_optimizations", False)
    rows, cols = 2048, 4096
    shapes = jax.eval_shape(
        lambda w: quantize(w, NF4(64, double=True)),
        jax.ShapeDtypeStruct((rows, cols), jnp.float32),
    )
    factors = [
        jax.ShapeDtypeStruct(s, jnp.float32)
        for s in ((rows, RANK), (RANK, cols), (cols,), (cols,))
    ]
    arrays = [jax.ShapeDtypeStruct((8, n), jnp.float32) for n in (rows, cols)]

    def slopes(factors, w, x, dy):
        a, b, magnitude, squares = factors
        lora = Adapter(a, b, jnp.float32(1), magnitude=magnitude, squares=squares)
        slopes, _, y = trained_part(LoRALinear(QLinear(w), lora))(x, dy)
        return slopes, y

    compiled = jax.jit(slopes).lower(factors, shapes, *arrays).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * 2 * rows * cols
    assert isinstance(shapes, QuantizedTensor)

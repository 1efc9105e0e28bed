"""Layers in training for their format: values, gradients, time, and freezing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import ops
from qjax.errors import NonFiniteError, SpecError
from qjax.formats import FP8, MXFP4, NF4, NVFP4, Cast, Format, Int, KMeans
from qjax.methods import HQQ, RTN, Lloyd
from qjax.nn import QEinsum, QEmbed, QLinear, quantize_module
from qjax.nn.qat import Clock, Fixed, Learned, Training, at_step
from qjax.ops.trained import instead, learned_inputs
from qjax.recipes import Recipe, Rule
from qjax.wrappers import RoundedInputs

ROWS, COLS = 24, 8


def weight(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape or (ROWS, COLS)), jnp.float32)


def training(w, fmt, method=None, *, layer: type = QLinear, **settings):
    made = layer(w, format=fmt, method=method or RTN("mse"))
    made.qat = Training(made, **settings)
    return made


def expected_gradients(fmt: Int, w, scale, zero, dw):
    """`(dw, dscale, doffset)`, weight by weight, from the papers' equations."""
    low, high = -(2.0 ** (fmt.bits - 1)), 2.0 ** (fmt.bits - 1) - 1
    edges = (-1.0, 1.0) if fmt.bits == 1 and fmt.symmetric else (low, high)
    group = fmt.grouping(w.shape)
    rows, cols = group.scale_shape
    numbers = jnp.arange(rows * cols, dtype=jnp.float32).reshape(rows, cols)
    shape = group.split(jnp.zeros(w.shape)).shape
    place = np.asarray(group.join(jnp.broadcast_to(group.load(numbers), shape)), int)
    passed = np.zeros_like(w)
    dscale, doffset, count = (np.zeros(rows * cols) for _ in range(3))
    for index in np.ndindex(*w.shape):
        own = place[index]
        u = w[index] / scale.flat[own]
        if zero is not None:
            u = u + zero.flat[own] - 2 ** (fmt.bits - 1)
        level = np.clip(np.round(u), low, high)
        if fmt.bits == 1 and fmt.symmetric:
            level = 0.5 if u > 0 else -0.5
        count[own] += 1
        if edges[0] < u < edges[1]:
            passed[index] = dw[index]
            dscale[own] += dw[index] * (level - u)
        else:
            dscale[own] += dw[index] * level
            doffset[own] += dw[index]
    share = 1 / np.sqrt(count * max(edges[1], 1))
    shape = scale.shape
    return passed, (dscale * share).reshape(shape), (doffset * share).reshape(shape)


LEARNED = {
    "4": Int(4, 8),
    "4-asym": Int(4, 8, symmetric=False),
    "3-asym-f16": Int(3, 8, symmetric=False, scale_dtype="float16", zero_dtype="uint8"),
    "2-short": Int(2, 10, symmetric=False, scale_dtype="bfloat16"),
    "2-out": Int(2, 3, axis="out"),
    "1": Int(1, 8),
    "1-asym": Int(1, "channel", symmetric=False),
    "8-tensor": Int(8, "tensor"),
}


@pytest.mark.parametrize("fmt", LEARNED.values(), ids=LEARNED)
def test_learned_scales_have_the_gradients_of_the_papers(rng, fmt):
    layer = training(weight(rng), fmt, learn="lsq")
    scale = layer.qat.scale
    scale.set_value(scale.get_value() * 0.7)  # so that weights lie beyond the range
    dw = np.asarray(rng.standard_normal((ROWS, COLS)), np.float32)
    graph, state, rest = nnx.split(layer, nnx.Param, ...)

    def total(state):
        return jnp.sum(nnx.merge(graph, state, rest).weight().dense * dw)

    found = jax.grad(total)(state)
    packed = layer.quantized()
    zero = None if packed.zero is None else np.asarray(packed.zero, np.float32)
    stored = np.asarray(packed.scale, np.float32)
    w = np.asarray(layer.kernel.get_value())
    passed, dscale, doffset = expected_gradients(fmt, w, stored, zero, dw)
    assert 0 < np.count_nonzero(passed) <= passed.size - (fmt.bits < 8)
    np.testing.assert_array_equal(found.kernel.get_value(), passed)
    got = found.qat.scale.get_value()
    np.testing.assert_allclose(got, dscale, rtol=1e-4, atol=1e-5)
    assert (layer.qat.offset is None) == fmt.symmetric
    if not fmt.symmetric:
        got = found.qat.offset.get_value()
        np.testing.assert_allclose(got, doffset, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [RTN(), RTN("mse"), HQQ()])
def test_learning_starts_from_least_squares_or_the_method(rng, method):
    w, fmt = weight(rng), Int(3, 8, symmetric=False)
    first = RTN("mse") if isinstance(method, RTN) else method
    expected: Any = QLinear(w, format=fmt, method=first).quantized()
    found: Any = training(w, fmt, method, learn="lsq").quantized()
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scale, expected.scale)
    np.testing.assert_allclose(found.zero, expected.zero, rtol=1e-5)


def test_straight_through_passes_everything(rng):
    layer = training(weight(rng), Int(2, 8))
    graph, state, rest = nnx.split(layer, nnx.Param, ...)
    slope = jax.grad(lambda s: nnx.merge(graph, s, rest).weight().dense.sum())(state)
    np.testing.assert_array_equal(slope.kernel.get_value(), np.ones((ROWS, COLS)))


def test_values_are_exact_in_bfloat16():
    value = jnp.array([0.003, 0.010, -0.007], jnp.bfloat16)
    carrier = jnp.array([1.01, 3.3, -7.7], jnp.bfloat16)
    trap = carrier + jax.lax.stop_gradient(value - carrier)
    assert bool((trap != value).any())
    for run in (instead, jax.jit(instead)):
        np.testing.assert_array_equal(run(value, carrier), value)
    slopes = jax.grad(lambda v, c: instead(v, c).sum(), argnums=(0, 1))(value, carrier)
    np.testing.assert_array_equal(slopes[0], np.zeros(3))
    np.testing.assert_array_equal(slopes[1], np.ones(3))


FORMATS: dict[str, tuple[Format, str]] = {
    "int4": (Int(4, 8, symmetric=False, scale_dtype="float16"), "none"),
    "int3-lsq": (Int(3, 8, symmetric=False, scale_dtype="float16"), "lsq"),
    "int4-double-lsq": (Int(4, 8, scale_dtype="uint8"), "lsq"),
    "int8-lsq": (Int(8, "channel"), "lsq"),
    "nf4": (NF4(32, double=True), "none"),
    "fp8": (FP8("e4m3", "channel"), "none"),
    "mxfp4": (MXFP4(), "none"),
    "nvfp4": (NVFP4(), "none"),
    "kmeans": (KMeans(3), "none"),
    "cast": (Cast("bfloat16"), "none"),
}


def logits(layer, x):
    """Eagerly, and compiled."""
    graph, state = nnx.split(layer)
    compiled = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return layer(x), compiled(state, x)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        *((name, None) for name in FORMATS),
        ("int3-lsq", "int8"),
        ("nf4", "int8"),
        ("int4", "float8_e4m3fn"),
    ],
)
def test_frozen_layers_multiply_as_they_did(rng, name, activation):
    fmt, learn = FORMATS[name]
    method = Lloyd() if isinstance(fmt, KMeans) else RTN()
    rows = 32 if isinstance(fmt, NF4 | MXFP4 | NVFP4) else ROWS
    layer = training(
        weight(rng, rows, COLS), fmt, method, learn=learn, activation=activation
    )
    x = jnp.asarray(rng.standard_normal((5, rows)), jnp.float32)
    before = logits(layer, x)
    dense = jax.jit(lambda layer: layer.weight().dense)(layer)
    layer.freeze()
    assert layer.frozen and layer.qat is None
    packed = layer.kernel.get_value()
    assert isinstance(packed, RoundedInputs) == (activation is not None)
    np.testing.assert_array_equal(packed.dequantize(jnp.float32), dense)
    for old, new in zip(before, logits(layer, x), strict=True):
        np.testing.assert_array_equal(old, new)


def test_stacks_freeze_to_what_each_layer_multiplied_by(rng):
    fmt = Int(3, 8, symmetric=False)
    stack = training(weight(rng, 3, ROWS, COLS), fmt, learn="lsq")
    graph, state = nnx.split(stack)
    x = jnp.asarray(rng.standard_normal((5, ROWS)), jnp.float32)

    def step(x, one):
        return x, nnx.merge(graph, one)(x)

    _, before = jax.lax.scan(step, x, state)
    packed = stack.quantized()
    for i in range(3):
        np.testing.assert_array_equal(ops.matmul(x, packed[i]), before[i])


def test_embeddings_round_rows_and_logits(rng):
    table = weight(rng, 16, ROWS)
    layer = training(table, Int(3, 8), layer=QEmbed, learn="lsq")
    ids, x = jnp.arange(4), weight(rng, 2, ROWS)
    rows, heads = layer(ids), layer.attend(x)
    graph, state = nnx.split(layer)

    def total(state):
        made = nnx.merge(graph, state)
        return made(ids).sum() + made.attend(x).sum()

    slope = jax.grad(total)(state)
    seen = slope.embedding.get_value() != 0
    assert 0.5 < float(seen.mean()) < 1  # zero beyond the range of the codes
    assert bool((slope.qat.scale.get_value() != 0).all())
    layer.freeze()
    np.testing.assert_array_equal(layer(ids), rows)
    np.testing.assert_array_equal(layer.attend(x), heads)


def test_experts_are_rounded_each(rng):
    module = nnx.Einsum("btd,bdk->btk", (2, 16, 8), rngs=nnx.Rngs(0))
    rule = Rule("*", Int(4, 8), RTN("mse"))
    layer = quantize_module(module, Recipe((rule,)))
    assert isinstance(layer, QEinsum)
    layer.qat = Training(layer, learn="lsq", start=3)
    x = weight(rng, 2, 5, 16)
    before = layer(x)
    layer.freeze()
    np.testing.assert_array_equal(layer(x), before)


@pytest.mark.parametrize("activation", ["int8", "float8_e4m3fn"])
def test_activations_are_those_of_the_product(rng, activation):
    w, x = weight(rng), weight(rng, 5, ROWS)
    layer = training(w, Int(4, 8), activation=activation)
    packed = layer.quantized().base
    expected = ops.matmul(x, packed, activation=activation)
    np.testing.assert_array_equal(layer(x), expected)
    slope = jax.grad(lambda x: layer(x).sum())(x)
    dense = np.asarray(packed.dequantize())
    np.testing.assert_allclose(slope, np.tile(dense.sum(1), (5, 1)), rtol=1e-5)


def test_static_scale_of_activations_is_learned(rng):
    x = np.asarray(rng.standard_normal((5, ROWS)), np.float32)
    scale = np.float32(np.abs(x).max() / 200)  # some lie beyond 127 steps
    dy = np.asarray(rng.standard_normal((5, ROWS)), np.float32)
    _, pull = jax.vjp(lambda x, s: learned_inputs(x, s, "int8"), x, scale)
    found = pull(jnp.asarray(dy))
    u = x / scale
    inside = np.abs(u) < 127
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(found[0], np.where(inside, dy, 0))
    moved = np.where(inside, np.round(u) - u, np.sign(u) * 127)
    share = 1 / np.sqrt(ROWS * 127)
    np.testing.assert_allclose(found[1], (dy * moved).sum() * share, rtol=1e-4)


@pytest.mark.parametrize("kind", [Learned, Fixed])
def test_static_scale_is_frozen_with_the_weight(rng, kind):
    layer = training(weight(rng), Int(4, 8), activation="int8")
    layer.qat.inputs = kind(jnp.float32(0.02))
    x = weight(rng, 5, ROWS)
    graph, state = nnx.split(layer)
    slope = jax.grad(lambda s: nnx.merge(graph, s)(x).sum())(state)
    moved = float(slope.qat.inputs.get_value())
    assert (moved != 0) == (kind is Learned)
    before = layer(x)
    layer.freeze()
    assert float(layer.kernel.get_value().scale) == np.float32(0.02)
    np.testing.assert_array_equal(layer(x), before)


@pytest.mark.parametrize("learn", ["none", "lsq"])
def test_rounding_starts_when_it_is_time(rng, learn):
    w, x = weight(rng), weight(rng, 5, ROWS)
    layer = training(w, Int(2, 8), learn=learn, activation="int8", start=3)
    rounded = layer(x)  # outside of training
    graph, state = nnx.split(layer)
    traces = []

    @jax.jit
    def run(state, step):
        traces.append(1)

        def total(state):
            y = nnx.merge(graph, at_step(state, step))(x)
            return jnp.sum(y), y

        return jax.grad(total, has_aux=True, allow_int=True)(state)

    for step in range(5):
        slope, y = run(state, jnp.asarray(step, jnp.int32))
        expected = x @ w if step < 3 else rounded
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        dw = slope.kernel.get_value()
        if step < 3:
            np.testing.assert_allclose(dw, np.tile(x.sum(0)[:, None], COLS), rtol=1e-4)
        if learn == "lsq":
            assert bool((slope.qat.scale.get_value() == 0).all()) == (step < 3)
    assert len(traces) == 1
    assert isinstance(layer.qat.clock, Clock)


def test_gradients_on_int8_operands_are_close(rng):
    w, x = weight(rng), weight(rng, 64, ROWS)
    dy = weight(rng, 64, COLS)

    def slopes(**settings):
        layer = training(w, Int(8, "channel"), RTN(), **settings)
        graph, state = nnx.split(layer)

        def total(state, x):
            return jnp.sum(nnx.merge(graph, state)(x) * dy)

        dw, dx = jax.grad(total, argnums=(0, 1))(state, x)
        return np.asarray(dw.kernel.get_value()), np.asarray(dx)

    exact, both = slopes(), slopes(backward=("dgrad", "wgrad"))
    one = slopes(backward=("wgrad",))
    for i in range(2):
        error = np.linalg.norm(both[i] - exact[i]) / np.linalg.norm(exact[i])
        assert 0 < error < 0.02
    np.testing.assert_array_equal(one[0], both[0])
    np.testing.assert_array_equal(one[1], exact[1])


def test_what_cannot_be_learned_is_refused(rng):
    with pytest.raises(SpecError, match="learns scales of Int formats, not of nf4"):
        training(weight(rng), NF4(32), learn="lsq")


def test_spoiled_weights_are_not_frozen(rng):
    layer = training(weight(rng), Int(4, 8), learn="lsq")
    scale = layer.qat.scale
    scale.set_value(scale.get_value().at[0, 0].set(jnp.nan))
    with pytest.raises(NonFiniteError, match=r"mlp\.up\.kernel: 1 of 24"):
        layer.freeze("mlp.up.kernel")
    with pytest.raises(SpecError, match="restore an earlier checkpoint"):
        layer.freeze("mlp.up.kernel", nonfinite="zero")

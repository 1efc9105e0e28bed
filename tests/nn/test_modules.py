"""Conversion of NNX modules: drop-in outputs, training, freezing, reports."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qjax.errors import NonFiniteError, SpecError, UnsupportedError
from qjax.formats import NF4, Int
from qjax.methods import HQQ
from qjax.models import Decoder, ModelConfig
from qjax.models.weights import param_shapes
from qjax.nn import (
    QConv,
    QEinsum,
    QEmbed,
    QLinear,
    QuantizedParam,
    fake_quantize,
    freeze,
    quantization_report,
    quantize_module,
)
from qjax.nn.equation import Equation, general_equation, parse_einsum
from qjax.recipes import Recipe, Rule
from qjax.tensor import QuantizedTensor

FMT = Int(4, 8)
ALL = Recipe((Rule("*", FMT),))

LAYERS = {
    "linear": lambda r: nnx.Linear(16, 8, rngs=r),
    "linear-bf16": lambda r: nnx.Linear(16, 8, dtype=jnp.bfloat16, rngs=r),
    "linear-param-bf16": lambda r: nnx.Linear(16, 8, param_dtype=jnp.bfloat16, rngs=r),
    "linear-wide": lambda r: nnx.Linear(
        16,
        8,
        dtype=jnp.bfloat16,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
        use_bias=False,
        rngs=r,
    ),
    "general-split": lambda r: nnx.LinearGeneral(16, (4, 8), rngs=r),
    "general-join": lambda r: nnx.LinearGeneral((4, 16), (4, 8), axis=(-2, -1), rngs=r),
    "general-front": lambda r: nnx.LinearGeneral((4, 16), 8, axis=(1, -1), rngs=r),
    "general-batch": lambda r: nnx.LinearGeneral(16, 8, batch_axis={0: 2}, rngs=r),
    "einsum": lambda r: nnx.Einsum("btd,dhk->bthk", (16, 4, 8), (4, 8), rngs=r),
    "einsum-first": lambda r: nnx.Einsum("...d,cdhk->c...hk", (3, 16, 4, 8), rngs=r),
    "einsum-batch": lambda r: nnx.Einsum("btd,bdk->btk", (2, 16, 8), (2, 8), rngs=r),
    "conv": lambda r: nnx.Conv(16, 8, (3,), strides=2, padding="CAUSAL", rngs=r),
    "conv-groups": lambda r: nnx.Conv(
        16, 16, (2,), feature_group_count=2, padding="CIRCULAR", rngs=r
    ),
    "conv-mask": lambda r: nnx.Conv(
        16, 8, (3,), mask=jnp.ones((3, 16, 8)).at[2].set(0.0), rngs=r
    ),
    "conv-transpose": lambda r: nnx.ConvTranspose(16, 8, (3,), strides=2, rngs=r),
}


run = nnx.jit(lambda module, x: module(x))


def near(a, b, tolerance=2e-6):
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    np.testing.assert_allclose(a, b, atol=tolerance * max(float(np.abs(b).max()), 1.0))


def dense_twin(layer, packed):
    """The float layer with its kernel replaced by the dequantized one."""
    twin = nnx.clone(layer)
    dense = packed.quantized().dequantize()
    kernel = twin.kernel.get_value()
    if isinstance(packed, QEinsum):
        equation = packed.equation
        order = equation.batch + equation.contracted + equation.features
        size = equation.sizes(kernel.shape)
        dense = dense.reshape([size[c] for c in order])
        dense = jnp.transpose(dense, [order.index(c) for c in equation.kernel])
    twin.kernel[...] = dense.reshape(kernel.shape)
    return twin


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_are_drop_in(rng, make):
    layer = make(nnx.Rngs(0))
    if layer.bias is not None:
        layer.bias[...] = jnp.asarray(rng.normal(size=layer.bias.shape)).astype(
            layer.bias.dtype
        )
    x = jnp.asarray(rng.normal(size=(2, 4, 16)), jnp.float32)
    live = quantize_module(layer, ALL)
    packed = freeze(live)
    assert isinstance(live.kernel, nnx.Param) and live.format == FMT
    assert isinstance(packed.kernel, QuantizedParam)
    with jax.numpy_dtype_promotion("standard"):  # Flax's own layers need it
        y, wanted = run(packed, x), run(dense_twin(layer, packed), x)
    assert (y.shape, y.dtype) == (wanted.shape, wanted.dtype)
    low = jnp.bfloat16 in (layer.dtype, layer.param_dtype)
    near(y, wanted, 1e-2 if low else 2e-6)
    near(run(live, x), y, 1e-2 if low else 2e-6)


def test_precision_is_that_of_the_layer():
    x = jnp.ones((2, 16), jnp.bfloat16)
    for given, wanted in [
        (jax.lax.Precision.HIGHEST, "HIGHEST"),
        ("high", "HIGH"),
        ((jax.lax.Precision.HIGH, jax.lax.Precision.DEFAULT), "HIGH"),
    ]:
        layer = QLinear(jnp.ones((16, 8)), precision=given)
        assert f"Precision.{wanted}" in str(jax.make_jaxpr(layer)(x))


def test_embed_is_drop_in(rng):
    layer = nnx.Embed(12, 16, rngs=nnx.Rngs(0))
    live = quantize_module(layer, ALL)
    packed = freeze(live)
    assert isinstance(packed, QEmbed)
    assert (packed.num_embeddings, packed.features) == (12, 16)
    dense = packed.quantized().dequantize()
    assert dense.shape == (12, 16)
    ids = jnp.asarray([[3, 11]], jnp.int32)
    near(packed(ids), dense[ids])
    near(live(ids), dense[ids])
    x = jnp.asarray(rng.normal(size=(3, 16)), jnp.float32)
    near(packed.attend(x), x @ dense.T)
    near(live.attend(x), x @ dense.T)


class Block(nnx.Module):
    """Attention and an MLP, residual."""

    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Model(nnx.Module):
    """Embedding, blocks, a head."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(24, 16, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(16, 24, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]], jnp.int32)


def codes(module):
    state = nnx.state(module, QuantizedParam)
    return jax.tree.leaves(state)


def loss(model, ids):
    logits = model(ids[:, :-1])
    picked = jax.nn.one_hot(ids[:, 1:], 24, dtype=jnp.float32)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * picked, -1))


@pytest.mark.parametrize("method", [None, HQQ()], ids=["rtn", "hqq"])
def test_frozen_codes_are_the_codes_of_the_last_call(method):
    live = quantize_module(Block(nnx.Rngs(0)), Int(4, 8), method)
    packed = freeze(live)
    kernel = live.up.kernel[...]
    inside = jax.jit(lambda w: fake_quantize(w, FMT, method))(kernel)
    frozen = packed.up.kernel.get_value()
    np.testing.assert_array_equal(inside, frozen.dequantize())
    x = jnp.ones((1, 3, 16))
    near(run(packed, x), run(live, x), 1e-5)
    once = quantize_module(Block(nnx.Rngs(0)), Int(4, 8), method, freeze=True)
    for a, b in zip(codes(packed), codes(once), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_on_the_fly_then_freezing():
    live = quantize_module(Model(nnx.Rngs(0)), Int(3, 8))
    optimizer = nnx.Optimizer(live, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model, IDS)
        optimizer.update(model, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        values = [float(step(live, optimizer)) for _ in range(12)]
    assert values[-1] < 0.6 * values[0]
    packed = freeze(live)
    near(run(packed, IDS), run(live, IDS), 1e-5)
    assert len(codes(packed)) > 0 and not codes(live)


def test_gradients_never_reach_packed_leaves():
    packed = quantize_module(Model(nnx.Rngs(0)), NF4(32), freeze=True)
    grads = nnx.jit(nnx.grad(loss))(packed, IDS)
    flat = dict(nnx.to_flat_state(grads))
    assert ("layers", 0, "up", "bias") in flat
    assert ("layers", 0, "up", "kernel") not in flat
    assert all(jnp.issubdtype(g.dtype, jnp.floating) for g in jax.tree.leaves(grads))
    graph, params, rest = nnx.split(packed, nnx.Param, ...)
    again = nnx.merge(graph, params, rest)
    np.testing.assert_array_equal(run(again, IDS), run(packed, IDS))
    doubled = jax.tree.map(lambda leaf: leaf, nnx.state(packed))
    nnx.update(packed, doubled)
    assert isinstance(packed.layers[0].up.kernel.get_value(), QuantizedTensor)


def test_straight_through_gradient(rng):
    w = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    c = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    grad = jax.grad(lambda w: jnp.sum(fake_quantize(w, FMT) * c))(w)
    np.testing.assert_array_equal(grad, c)
    _, tangent = jax.jvp(lambda w: fake_quantize(w, FMT), (w,), (c,))
    np.testing.assert_array_equal(tangent, c)


def test_original_is_unchanged_unless_donated():
    model = Model(nnx.Rngs(0))
    before = run(model, IDS)
    packed = quantize_module(model, FMT, freeze=True)
    np.testing.assert_array_equal(run(model, IDS), before)
    kernel = model.layers[0].up.kernel.get_value()
    donated = quantize_module(model, FMT, freeze=True, donate=True)
    assert kernel.is_deleted() and not model.head.kernel.get_value().is_deleted()
    np.testing.assert_array_equal(run(donated, IDS), run(packed, IDS))
    with pytest.raises(SpecError, match="donate=True needs freeze=True"):
        quantize_module(Model(nnx.Rngs(0)), FMT, donate=True)


def test_shared_modules_and_variables_stay_shared():
    shared = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    tied = nnx.Linear(16, 16, rngs=nnx.Rngs(1))
    tied.kernel = shared.kernel
    model = nnx.Sequential(shared, jnp.tanh, shared, tied)
    packed = quantize_module(model, FMT, freeze=True, donate=True)
    first, _, third, fourth = packed.layers
    assert first is third and isinstance(first, QLinear)
    assert fourth.kernel is first.kernel and not shared.kernel.get_value().is_deleted()
    paths = [entry.path for entry in quantization_report(packed)]
    assert len(paths) == len(set(paths)) == 3


def test_stacked_modules():
    @nnx.vmap(in_axes=0)
    def make(key):
        return nnx.Linear(16, 16, rngs=nnx.Rngs(key))

    stacked = make(jax.random.split(jax.random.key(0), 3))
    packed = quantize_module(stacked, FMT, freeze=True)
    assert packed.kernel.get_value().shape == (3, 16, 16)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def scanned(layer, x):
        return jnp.tanh(layer(x))

    x = jnp.ones((2, 16))
    y = scanned(packed, x)
    q = packed.kernel.get_value()
    for i in range(3):
        x = jnp.tanh(x @ q[i].dequantize())
    near(y, x, 1e-5)
    live = quantize_module(stacked, FMT)
    near(scanned(live, jnp.ones((2, 16))), y, 1e-5)


def test_report_lists_every_parameter_with_its_reason():
    class Odd(nnx.Linear):
        """A subclass with its own product."""

    class Mixed(nnx.Module):
        def __init__(self, r):
            self.a = nnx.Linear(16, 16, rngs=r)
            self.b = Odd(16, 16, use_bias=False, rngs=r)
            self.c = nnx.Linear(
                16,
                16,
                use_bias=False,
                dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k),
                rngs=r,
            )
            self.d = nnx.Einsum("ab,bc->ac", (16, 16), rngs=r)
            self.e = nnx.Einsum("ab,bc->a", (16, 16), rngs=r)
            self.head = nnx.Linear(16, 16, use_bias=False, rngs=r)
            self.table = nnx.Param(jnp.ones((4, 4)))

    live = quantize_module(Mixed(nnx.Rngs(0)), FMT)
    report = {entry.path: entry for entry in quantization_report(live)}
    assert report["a.kernel"].state == "on the fly"
    assert report["a.bias"].reason == "vector"
    assert "subclass of nnx.Linear" in report["b.kernel"].reason
    assert report["c.kernel"].reason == "custom dot_general"
    assert report["d.kernel"].format == "int4-g8"
    assert "summed over" in report["e.kernel"].reason
    assert report["head.kernel"].reason == "no rule of the recipe"
    assert "but Mixed" in report["table"].reason
    frozen = {e.path: e for e in quantization_report(freeze(live))}
    assert frozen["a.kernel"].state == "frozen"
    assert frozen["a.kernel"].nbytes == 16 * 8 + 2 * 16 * 4
    assert frozen["a.kernel"].bits_per_weight == 8.0
    assert frozen["a.kernel"].method == "rtn"


def test_printing_shows_format_and_size():
    live = quantize_module(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), FMT)
    assert "format=int4-g8" in str(live) and "method=rtn" in str(live)
    assert (live.in_features, freeze(live).out_features) == (16, 8)
    text = str(freeze(live))
    assert "QLinear(" in text
    assert "AffineTensor(int4-g8, [16, 8], 8.000 bits/weight, 128 B)" in text
    assert "precision" not in text


def test_errors_name_the_weight():
    model = Model(nnx.Rngs(0))
    with pytest.raises(SpecError, match=r"attn\.key\.kernel: .*group of 128.*keeps it"):
        quantize_module(model, Int(4, 128))
    with pytest.raises(SpecError, match=r"names no parameter: patterns \['\*\.w'\]"):
        quantize_module(model, Recipe((Rule("*.w", FMT),)))
    model.layers[1].down.kernel[...] = jnp.full((32, 16), jnp.nan)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.down\.kernel: 512 of 512"):
        quantize_module(model, FMT, freeze=True)
    quantize_module(model, FMT, freeze=True, nonfinite="zero")
    with pytest.raises(SpecError, match="this QLinear is dense and has no format"):
        QLinear(jnp.ones((4, 4))).freeze()


def test_kept_layers_are_logged(caplog):
    layer = nnx.Sequential(
        nnx.Einsum("ab,bc->a", (16, 16), rngs=nnx.Rngs(0)),
        nnx.Linear(16, 16, rngs=nnx.Rngs(0)),
    )
    with caplog.at_level(logging.INFO, "qjax"):
        quantize_module(layer, FMT)
    assert "layers.0.kernel is kept: einsum ab,bc->a" in caplog.text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ab,bc->a", "axis 'c' is summed over"),
        ("ab,cd->abcd", "nothing is contracted"),
        ("ab,b->a", "adds no features"),
        ("aab,bc->ac", "repeats an axis"),
        ("...b,bc->c", "ellipsis is summed"),
        ("ab,...bc->ac", "kernel has an ellipsis"),
        ("ab,bc", "expected two operands"),
        ("ab,bc->acz", "in neither operand"),
    ],
)
def test_equations_that_are_not_products_are_refused(text, reason):
    with pytest.raises(UnsupportedError, match=reason):
        parse_einsum(text)


def test_equation_of_linear_general():
    assert str(general_equation((-1,), 2)) == "...a,aAB->...AB"
    assert str(general_equation((1, -1), 1)) == "ab...c,bcA->a...A"
    assert str(general_equation((-1,), 1, (0,))) == "a...b,abA->a...A"
    with pytest.raises(UnsupportedError, match="input order"):
        general_equation((-1, -2), 1)
    with pytest.raises(UnsupportedError, match="the input has 1 axes"):
        Equation("ab", "bc", "ac").expand(1)


def test_dense_quantized_layers_take_a_format(rng):
    dense = nnx.Sequential(QLinear(rng.normal(size=(16, 8)).astype("f4")), jnp.tanh)
    live = quantize_module(dense, FMT)
    assert dense.layers[0].format is None and live.layers[0].format == FMT
    other = quantize_module(live, Int(8, 8), freeze=True)
    assert other.layers[0].quantized().format.bits == 8
    assert quantization_report(dense)[0].reason == "no rule of the recipe"


def test_a_decoder_is_converted():
    config = ModelConfig(
        family="gpt2",
        vocab_size=24,
        dim=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=8,
        mlp_dim=32,
        max_context=8,
        gated=False,
    )
    shapes = param_shapes(config)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        path: 0.1 * jax.random.normal(key, shape)
        for (path, shape), key in zip(shapes.items(), keys, strict=True)
    }
    model = Decoder(config, params)
    packed = quantize_module(model, Int(8, 16), freeze=True)
    report = {entry.path: entry for entry in quantization_report(packed)}
    assert report["layers.0.attn.q.kernel"].state == "frozen"
    assert report["layers.0.attn.q.kernel"].shape[0] == config.layers
    assert report["embed.tokens.embedding"].state == "kept"
    near(run(packed, IDS)[0], run(model, IDS)[0], 0.1)


def test_conv_2d_and_stacked_conv():
    conv = nnx.Conv(3, 8, (3, 3), padding="REFLECT", rngs=nnx.Rngs(0))
    packed = quantize_module(conv, Int(8, "channel"), freeze=True)
    assert isinstance(packed, QConv)
    assert packed.kernel.get_value().shape == (27, 8)
    image = jax.random.normal(jax.random.key(0), (1, 6, 6, 3))
    near(packed(image), conv(image), 0.05)

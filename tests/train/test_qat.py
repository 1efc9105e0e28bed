"""A decoder trained for its formats, and what it is converted to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from qjax.errors import NonFiniteError, SpecError, UnsupportedError
from qjax.formats import NF4, Int
from qjax.methods import RTN, RoundInputs
from qjax.models import Decoder, ModelConfig
from qjax.models.weights import param_shapes
from qjax.nn import quantize_module
from qjax.nn.qat import at_step
from qjax.recipes import Recipe, Rule
from qjax.train.lora import LoRA
from qjax.train.loss import token_losses
from qjax.train.qat import QAT, convert, prepare
from qjax.tree import dequantize_tree
from qjax.wrappers import RoundedInputs
from tests.train.lora_models import Mixed

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
)
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 32, (2, 8)), jnp.int32)
FMT = Int(3, 8, symmetric=False, scale_dtype="float16", zero_dtype="float16")


@pytest.fixture
def model():
    shapes = param_shapes(CONFIG)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        path: 0.3 * jax.random.normal(key, shape) + float(len(shape) == 1)
        for (path, shape), key in zip(shapes.items(), keys, strict=True)
    }
    return Decoder(CONFIG, params)


def logits(model):
    """Of the compiled model."""
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)[0])
    return compiled(state, TOKENS)


def train(model, config, steps=3, rate=0.01):
    """Trains in place with a loop of its own; the loss of every step."""
    graph, state, frozen = nnx.split(model, config.wrt, ...)
    tx = optax.adam(rate)

    def loss(state, frozen):
        found = nnx.merge(graph, state, frozen)(TOKENS)[0]
        return jnp.mean(token_losses(found[:, :-1], TOKENS[:, 1:]))

    @jax.jit
    def step(state, moments, number):
        value, slope = jax.value_and_grad(loss)(state, at_step(frozen, number))
        with jax.numpy_dtype_promotion("standard"):  # optax counts with integers
            change, moments = tx.update(slope, moments, state)
        return optax.apply_updates(state, change), moments, value

    moments, losses = tx.init(state), []
    for number in range(steps):
        state, moments, value = step(state, moments, jnp.asarray(number))
        losses.append(float(value))
    nnx.update(model, state)
    return losses


ENDS = (Rule("*embed*", Int(4, 8)), Rule("*head*", Int(8, "channel")))
CONFIGS = {
    "w3a8": QAT(FMT, learn="lsq", activations="int8"),
    "nf4-fp8": QAT(NF4(32), activations="float8_e4m3fn", start_step=1),
    "ends": QAT(
        Recipe((*ENDS, Rule("*kernel", FMT))),
        learn="lsq",
        backward=("dgrad", "wgrad"),
        others=True,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_converted_models_are_the_trained_ones(model, name):
    config = CONFIGS[name]
    prepare(model, config)
    losses = train(model, config)
    assert losses[-1] < losses[0]
    made = convert(model)
    np.testing.assert_array_equal(logits(model), logits(made))
    down = made.params()["layers.2.mlp.down.kernel"]
    assert isinstance(down, qjax.QuantizedTensor)
    assert isinstance(down, RoundedInputs) == (config.activations is not None)
    with pytest.raises(SpecError, match="no layer is in quantization-aware training"):
        convert(made)


def test_preparing_changes_nothing_but_the_rounding(model):
    recipe = Recipe((Rule("*kernel", FMT, RTN("mse")),))
    packed = qjax.quantize_model(model, recipe)
    prepare(model, QAT(recipe))
    np.testing.assert_array_equal(logits(model), logits(packed))
    np.testing.assert_array_equal(model(TOKENS)[0], packed(TOKENS)[0])  # eagerly


def test_quantizing_a_trained_model_again_loses_nothing(model):
    recipe = Recipe((Rule("*kernel", FMT, RTN("mse")),))
    prepare(model, QAT(recipe))
    held = model.layers[0].mlp.up.kernel
    held.set_value(held.get_value() * 1.1 - 0.01)
    made, again = convert(model).params(), qjax.quantize_model(model, recipe).params()
    assert set(made) == set(again)
    for path, leaf in made.items():
        jax.tree.map(np.testing.assert_array_equal, leaf, again[path])


def test_quantizing_rounded_weights_again_loses_nothing(model):
    recipe = Recipe((Rule("*kernel", FMT, RTN("mse")),))
    prepare(model, QAT(recipe, learn="lsq"))
    scale = model.layers[0].mlp.up.qat.scale
    scale.set_value(scale.get_value() * 0.9)
    rounded = dequantize_tree(convert(model).params())
    again = qjax.quantize_model(Decoder(CONFIG, rounded), recipe).params()
    for path, leaf in dequantize_tree(again).items():
        np.testing.assert_array_equal(leaf, rounded[path])


def test_report_names_every_weight(model):
    rules = (Rule("*head*", None), Rule("*embed*", None), Rule("*kernel", FMT))
    report = prepare(model, QAT(Recipe(rules), learn="lsq", activations="int8"))
    found = {one.path: one for one in report.weights}
    assert set(report.kept) == {"embed.embedding", "head.kernel"}
    assert len(found) == 7
    down = found["layers.0-2.mlp.down.kernel"]
    assert dataclasses.asdict(down) == {
        "path": "layers.0-2.mlp.down.kernel",
        "shape": (3, 32, 16),
        "format": FMT.name,
        "method": "lsq",
        "activations": "int8",
        "learned": 2 * 3 * 4 * 16,
        "adapter": False,
    }


def test_rules_for_some_layers_cut_runs(model):
    rules = (Rule("layers.1.mlp.*", Int(8, 8)), Rule("layers.2.*kernel", FMT))
    report = prepare(model, QAT(Recipe(rules)))
    assert model.runs == ((0, 1), (1, 2), (2, 3))
    names = {one.path: one.format for one in report.weights}
    assert names["layers.1.mlp.up.kernel"] == "int8-g8"
    assert names["layers.2.attn.q.kernel"] == FMT.name
    assert "layers.0.attn.q.kernel" in report.kept
    made = convert(model)
    np.testing.assert_array_equal(logits(model), logits(made))
    assert made.params()["layers.1.mlp.up.kernel"].format == Int(8, 8)


def test_what_trains(model):
    config = QAT(Recipe((Rule("*kernel", FMT),)), learn="lsq")
    prepare(model, config)

    def paths(wrt):
        state = nnx.split(model, wrt, ...)[1]
        return {".".join(map(str, p)) for p, _ in nnx.to_flat_state(state)}

    own, every = paths(config.wrt), paths(dataclasses.replace(config, others=True).wrt)
    assert "layers.0.attn.q.kernel" in own
    assert {"layers.0.attn.q.qat.scale", "layers.0.attn.q.qat.offset"} <= own
    assert every - own == {
        "layers.0.attn_norm.scale",
        "layers.0.mlp_norm.scale",
        "norm.scale",
        "embed.tokens.embedding",
    }


def test_masters_are_wide_and_codes_stand_for_what_the_model_holds(model):
    narrow = {path: leaf.astype(jnp.bfloat16) for path, leaf in model.params().items()}
    model = Decoder(CONFIG, narrow, dtype=jnp.bfloat16)
    prepare(model, QAT(FMT, learn="lsq"))
    held = model.layers[0].attn.q.kernel.get_value()
    assert held.dtype == jnp.float32
    made = convert(model)
    assert made.params()["layers.0.attn.q.kernel"].dtype == "bfloat16"
    np.testing.assert_array_equal(logits(model), logits(made))


def test_static_scales_are_calibrated_and_learned(model):
    config = QAT(FMT, learn="lsq", activations="int8", static=True)
    prepare(model, config, calibration=np.asarray(TOKENS))
    scales = model.layers[0].mlp.down.qat.inputs.get_value().copy()
    assert scales.shape == (3,) and bool((scales > 0).all())
    assert "inputs" in str(nnx.split(model, config.wrt, ...)[1])
    moved = scales * 1.25
    model.layers[0].mlp.down.qat.inputs.set_value(moved)
    made = convert(model)
    down = made.params()["layers.1.mlp.down.kernel"]
    assert float(down.scale) == float(moved[1])
    np.testing.assert_array_equal(logits(model), logits(made))


def test_start_is_the_training_step(model):
    config = QAT(Int(1, 8), start_step=2)
    dense = logits(model)
    prepare(model, config)
    assert bool((logits(model) != dense).any())  # outside of training: rounded
    losses = train(model, config, steps=3, rate=0.0)
    assert losses[0] == losses[1] != losses[2]
    expected = jnp.mean(token_losses(dense[:, :-1], TOKENS[:, 1:]))
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)


def test_modules_of_other_kinds(rng):
    class Net(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(16, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.up(x)

    x = jnp.asarray(rng.standard_normal((4, 16)), jnp.float32)
    model = quantize_module(Net(), Int(4, 8))
    prepare(model, QAT(Int(4, 8), learn="lsq"))
    made = convert(model)
    np.testing.assert_array_equal(model(x), made(x))
    with pytest.raises(SpecError, match="names no parameter"):
        prepare(Net(), QAT(Int(4, 8)))


def test_adapters_in_lists_and_dicts_are_taken():
    model, targets = Mixed(), ("one", "seq.layers.0", "held.a", "pair.b")
    config = QAT(Int(4, 8), lora=LoRA(rank=2, targets=targets))
    report = prepare(model, config, key=jax.random.key(0))
    assert len(report.weights) == 4 and all(one.adapter for one in report.weights)
    assert model.one is model.again and model.pair["b"].qat.adapter is not None


def test_rounded_inputs_of_a_recipe_are_settings_too(model):
    method = RoundInputs(RTN("mse"), "int8")
    recipe = Recipe((Rule("*kernel", FMT, method),))
    report = prepare(model, QAT(recipe))
    assert {one.activations for one in report.weights} == {"int8"}
    assert {one.method for one in report.weights} == {"rtn-mse"}
    with pytest.raises(SpecError, match="rounds activations to int8"):
        prepare(nnx.clone(model), QAT(recipe, activations="float8_e4m3fn"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learn": "scales"}, "learn is 'scales', expected one of 'none', 'lsq'"),
        ({"activations": "int4"}, "activations is 'int4', expected one of None"),
        ({"backward": ("forward",)}, "backward is 'forward', expected one of"),
        ({"start_step": -1}, "start_step is -1, expected the number of a step"),
        ({"start_step": 0.5}, "start_step is 0.5, expected"),
        ({"static": True}, "set activations too"),
        ({"calibration": "words.txt"}, "is for static scales of activations"),
        ({"others": True, "lora": object()}, "leave one out"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(SpecError, match=message):
        QAT(**settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QAT("gptq-int4-g128"), "gptq.* needs calibration .hessian"),
        (QAT("int4-g128"), "layers.0-2.attn.k.kernel: int4-g128-asym: group of 128"),
        (QAT(NF4(32), learn="lsq"), "layers.0-2.* learns scales of Int formats"),
        (QAT(Recipe((Rule("*", FMT),), rotate=1)), "rotates the model"),
        (QAT(Recipe((Rule("*.nothing", FMT),))), "names no parameter"),
        (QAT(FMT, activations="int8", static=True), "calibration=tokens"),
        (QAT(FMT, lora=object()), "pass key="),
    ],
)
def test_what_cannot_be_trained(model, config, message):
    with pytest.raises(SpecError, match=message):
        prepare(model, config)


def test_packed_and_spoiled_models(model):
    packed = qjax.quantize_model(model, Recipe((Rule("*kernel", FMT),)))
    with pytest.raises(SpecError, match="is packed already; train the original"):
        prepare(packed, QAT(FMT))
    prepare(model, QAT(FMT))
    held = model.layers[0].mlp.up.kernel
    held.set_value(held.get_value().at[1, 2, 3].set(jnp.nan))
    with pytest.raises(NonFiniteError, match=r"layers\.0-2\.mlp\.up\.kernel: 1 of"):
        convert(model)


def merged_weight(w, adapter, layer):
    """The sum of one layer's weight and its adapter, by NumPy."""
    a, b, scale = (
        np.asarray(v.get_value()[layer], "f8")
        for v in (adapter.a, adapter.b, adapter.scale)
    )
    a = np.repeat(a, adapter.pool, axis=0) / adapter.pool
    total = np.asarray(w, "f8") + scale * a @ b
    if adapter.magnitude is None:
        return total
    magnitude = np.asarray(adapter.magnitude.get_value()[layer])
    return total * magnitude / np.linalg.norm(total, axis=0)


@pytest.mark.parametrize(
    ("variant", "learn", "packed"),
    [("lora", "lsq", True), ("dora", "none", False), ("qalora", "none", True)],
)
def test_sums_with_adapters_are_rounded(model, variant, learn, packed):
    if packed:
        model = qjax.quantize_model(model, Recipe((Rule("*kernel", Int(8, 8)),)))
    base = model.params()
    held = base["layers.1.mlp.down.kernel"]
    lora = LoRA(rank=2, alpha=4.0, variant=variant, targets=("q", "down"), pool=4)
    recipe = Recipe((Rule("*head*", None), Rule("*kernel", FMT)))
    config = QAT(recipe, learn=learn, lora=lora)
    report = prepare(model, config, key=jax.random.key(1))
    adapted = {one.path for one in report.weights if one.adapter}
    assert adapted == {"layers.0-2.attn.q.kernel", "layers.0-2.mlp.down.kernel"}
    losses = train(model, config, rate=0.05)
    assert losses[-1] < losses[0]
    adapter = model.layers[0].mlp.down.qat.adapter
    assert bool((adapter.b.get_value() != 0).all())
    made = convert(model)
    np.testing.assert_array_equal(logits(model), logits(made))
    down = made.params()["layers.1.mlp.down.kernel"]
    assert down.format == FMT
    if learn == "none":
        dense = held.dequantize() if packed else held
        total = merged_weight(dense, adapter, 1)
        expected = qjax.quantize(np.asarray(total, np.float32), FMT)
        miss = np.abs(np.asarray(down.dequantize() - expected.dequantize()))
        assert np.mean(miss > 1e-3) < 0.02  # ties may fall to either side


def test_dropout_of_adapters_is_refused(model):
    config = QAT(FMT, lora=LoRA(rank=2, targets=("q",), dropout=0.1))
    with pytest.raises(UnsupportedError, match=r"attn\.q\.kernel: dropout"):
        prepare(model, config, key=jax.random.key(1))

"""Where adapters go, and settings that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.errors import SpecError, UnsupportedError
from qjax.formats import Int
from qjax.models import Decoder
from qjax.nn import QLinear
from qjax.nn.lora import LoRALinear
from qjax.train.lora import LoRA, adapter_tree, attach, detach
from qjax.train.qat import QAT, prepare
from tests.train.lora_models import CONFIG, KEY, Mixed, random_params, shaken


def test_names_of_targets():
    def paths(**settings):
        model = Decoder(CONFIG, random_params())
        report = attach(model, LoRA(rank=2, **settings), KEY)
        assert len(report.modules) + len(report.kept) == 3 * 7 + 2
        return {one.path for one in report.modules}, dict(report.kept)

    chosen, kept = paths()
    assert len(chosen) == 21
    assert kept == {"embed": "not a target", "head": "not a target"}
    chosen, kept = paths(exclude=("down_proj", "layers.0.attn.k"))
    assert len(chosen) == 17
    assert kept["layers.0.attn.k"] == "excluded"
    ours = r"layers\.[02]\.attn\.[qv]"
    theirs = r"model\.layers\.[02]\.self_attn\.(q|v)_proj"
    assert paths(targets=ours) == paths(targets=theirs)
    assert paths(targets=("layers.1.mlp.up",))[0] == {"layers.1.mlp.up"}
    assert paths(targets=["lm_head", "embed_tokens"])[0] == {"embed", "head"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"targets": ("q_prj",)},
            r"names 'q_prj', which this model does not have.*'q_proj'",
        ),
        (
            {"targets": "q_proj.*"},
            r"regular expression of whole names, matches none.*q_proj",
        ),
        ({"targets": "q_proj("}, "is no regular expression"),
        ({"targets": ()}, "leave nothing to adapt.*not a target"),
        ({"exclude": ("wq",)}, "exclude names 'wq'"),
        (
            {"targets": ("q",), "exclude": "layers.*"},
            "leave nothing to adapt.*excluded",
        ),
        ({"rank_pattern": {"dwn": 3}}, "rank_pattern has 'dwn', which fits no adapted"),
        ({"targets": ("q",), "alpha_pattern": {"k_proj": 3}}, "fits no adapted weight"),
        ({"alpha_pattern": {"(": 3}}, "is no regular expression"),
        ({"rank": 40, "init": "pissa"}, "rank 40 exceeds 16, the rank of a weight"),
        ({"init": "loftq"}, "say where they are with original="),
        ({"variant": "qalora", "pool": 5}, "has 32 inputs, which pool=5"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    model = Decoder(CONFIG, random_params())
    with pytest.raises(SpecError, match=message):
        attach(model, LoRA(**settings), KEY)
    assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"targets": ("embed",), "variant": "dora"},
            "table of embeddings, which has no dora",
        ),
        ({"targets": ("embed",), "init": "pissa"}, "no init='pissa'"),
        ({"variant": "qalora", "pool": 8, "init": "pissa"}, "qalora has no init"),
        (
            {"variant": "dora", "exclude": ("layers.1.attn.q",)},
            r"layers\.1\.attn\.q: is not adapted while",
        ),
    ],
)
def test_what_a_weight_cannot_have_is_refused(settings, message):
    model = Decoder(CONFIG, random_params())
    with pytest.raises(UnsupportedError, match=message):
        attach(model, LoRA(rank=2, **settings), KEY)
    assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "lor"}, r"variant='lor'; expected one of"),
        ({"init": "zero"}, "init='zero'"),
        ({"rank": 0}, "rank 0"),
        ({"rank_pattern": {"q": 1.5}}, "rank 1.5 of 'q'"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"alpha_pattern": {"q": -1}}, "alpha -1 of 'q'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": "0.1"}, "dropout='0.1'"),
        ({"pool": 0}, "pool=0"),
        ({"loftq_rounds": -1}, "loftq_rounds=-1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(SpecError, match=message):
        LoRA(**settings)


def test_weights_in_training_are_not_adapted_below():
    model = Decoder(CONFIG, random_params())
    prepare(model, QAT(Int(4, 32)))
    with pytest.raises(UnsupportedError, match=r"q: is in quantization-aware training"):
        attach(model, LoRA(rank=2, targets=("q",)), KEY)


def test_any_module():
    model, ids = Mixed(), jnp.arange(4)
    before = model(ids)
    report = attach(model, LoRA(rank=2), KEY)
    paths = {one.path: one.shape for one in report.modules}
    assert paths == dict.fromkeys(
        ("general", "held.a", "one", "pair.b", "seq.layers.0", "seq.layers.2"), (8, 8)
    ) | {"experts": (3, 8, 8)}
    assert model.one is model.again
    kept = dict(report.kept)
    for path, why in {
        "fixed.0": "in a tuple",
        "heads": "repeats an axis",
        "table": "not a target",
        "conv": "a Conv has no adapters",
        "custom": "a Custom computes something of its own",
        "product": "its dot_general is a function of its own",
    }.items():
        assert why in kept.pop(path)
    assert not kept
    np.testing.assert_allclose(model(ids), before, rtol=1e-6, atol=1e-6)
    shaken(model)
    assert np.abs(model(ids) - before).max() > 0.1
    tree = adapter_tree(model)
    assert tree["experts"]["a"].shape == (3, 8, 2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)), jnp.float32)
    own, layer = tree["one"], model.one
    assert isinstance(layer, LoRALinear)
    assert layer.bias is not None
    w = np.asarray(layer.kernel[...]) + own["scale"] * own["a"] @ own["b"]
    np.testing.assert_allclose(layer(x), x @ w + layer.bias[...], rtol=1e-4, atol=1e-4)
    detach(model)
    assert type(model.again) is QLinear
    np.testing.assert_allclose(model(ids), before, rtol=1e-6, atol=1e-6)
    with pytest.raises(
        UnsupportedError, match="conv: a Conv has no adapters; leave it"
    ):
        attach(model, LoRA(rank=2, targets=("conv", "one")), KEY)
    with pytest.raises(SpecError, match="no layers in it"):
        attach(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), LoRA(), KEY)

"""Adapters under training as PEFT files: out, in again, served, merged."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.artifact import Artifact
from qjax.checkpoint import Assets
from qjax.converters import adapters as served
from qjax.converters.peft import read_adapter, write_adapter
from qjax.errors import NonFiniteError, SpecError, UnsupportedError
from qjax.formats import Int
from qjax.models import Decoder, ModelConfig, param_shapes
from qjax.train.adapters import (
    detached_parts,
    load_adapter,
    save_adapter,
    save_base,
)
from qjax.train.lora import LoRA, adapter_tree, attach
from qjax.train.merge import merge

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
TOKENS = np.arange(6)[None]
VARIANTS = {
    "lora": LoRA(
        rank=4,
        alpha=6.0,
        targets=("q_proj", "mlp.down"),
        rank_pattern={r"layers\.1\..*down_proj": 2},
    ),
    "rslora": LoRA(rank=4, variant="rslora", targets=("q", "embed", "head")),
    "dora": LoRA(rank=4, variant="dora", targets=("attn.v", "mlp.up")),
    "qalora": LoRA(rank=4, variant="qalora", pool=16, targets=("layers.1.mlp.up",)),
}


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype("float32")


def base_model(packed: bool = True, **more) -> Decoder:
    config = ModelConfig.from_hf(LLAMA | more)
    params = {p: 0.2 * floats(*s, seed=len(p)) for p, s in param_shapes(config).items()}
    if packed:
        for path in params:
            if path.startswith("layers.") and path.endswith("kernel"):
                params[path] = qjax.quantize(params[path], Int(4, 16, symmetric=False))
    return Decoder(config, params, dtype=jnp.float32)


def trained(config: LoRA, model: Decoder | None = None) -> Decoder:
    """A model whose adapters are no longer what they were at first."""
    model = model or base_model()
    attach(model, config, jax.random.key(0))
    state = nnx.state(model, nnx.LoRAParam)
    key = jax.random.key(1)

    def moved(x):
        return x + 0.1 * jax.random.normal(key, x.shape)

    nnx.update(model, jax.tree.map(moved, state))
    for _, module in nnx.iter_modules(model):
        own = getattr(module, "lora", None)
        if own is not None:  # what stands for no rank stays nothing, as in training
            ranks = own.rank.get_value()
            width = own.a.get_value().shape[-1]
            live = jnp.arange(width) < ranks[..., None]
            own.a.set_value(jnp.where(live[..., None, :], own.a.get_value(), 0))
            own.b.set_value(jnp.where(live[..., :, None], own.b.get_value(), 0))
    return model


@nnx.jit
def run(model):
    return model(TOKENS)[0]


def equal_trees(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, own in one.items():
        assert own.keys() == other[name].keys()
        for key, value in own.items():
            np.testing.assert_array_equal(
                np.float32(value), np.float32(other[name][key])
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_out_served_and_in_again(variant, tmp_path):
    model, base = trained(VARIANTS[variant]), base_model()
    form = "pooled" if variant == "qalora" else "plain"
    save_adapter(model, tmp_path / "a", base_model="me/base", form=form)
    adapter = read_adapter(tmp_path / "a")
    assert adapter.base_model == "me/base"
    with jax.default_matmul_precision("float32"):
        want = np.asarray(run(model))
        got = np.asarray(run(served.attach(base, adapter)))
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    done = load_adapter(base, tmp_path / "a")
    equal_trees(adapter_tree(base), adapter_tree(model))
    assert {one.path for one in done.modules} == adapter_tree(model).keys()


def test_a_trained_model_is_merged():
    """Groups of the weight and averages of the adapter agree: nothing is rounded."""
    model, base = trained(VARIANTS["qalora"]), base_model()
    path = "layers.1.mlp.up.kernel"
    own = adapter_tree(model)["layers.1.mlp.up"]
    want = np.asarray(base.params()[path].dequantize("float32"), np.float64)
    want += own["scale"] * np.repeat(own["a"], 16, 0) / 16 @ own["b"]
    made, report = merge(model)
    np.testing.assert_allclose(made.params()[path], want, rtol=1e-5, atol=1e-6)
    assert report.mode == "dequantized" and report.relative < 1e-5
    made, report = merge(model, mode="requantized")
    assert report.relative < 1e-5 and report.tensors.keys() == {path}
    got = made.params()[path]
    np.testing.assert_array_equal(got.codes, base.params()[path].codes)
    assert made.params().keys() == base.params().keys()
    assert adapter_tree(model)  # still there


def test_weights_below_adapters_are_those_of_the_base():
    model, base = trained(VARIANTS["rslora"]), base_model()
    parts = [(layer, sorted(part)) for layer, part in detached_parts(model)]
    assert parts == [(layer, sorted(part)) for layer, part in base.parts()]


def test_nothing_that_is_not_finite_is_written(tmp_path):
    model = trained(VARIANTS["lora"])
    bad = jax.tree.map(
        lambda x: x.at[..., 0].set(jnp.nan), nnx.state(model, nnx.LoRAParam)
    )
    nnx.update(model, bad)
    with pytest.raises(NonFiniteError, match=r"a of layers.0.attn.q has 32 values"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(SpecError, match="has no adapters"):
        save_adapter(base_model(), tmp_path / "a")


def with_assets(model: Decoder, folder, recipe: str | None) -> Decoder:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA), "utf-8")
    model.assets = Assets(str(folder), recipe)
    return model


def test_a_model_with_adapters_is_not_saved_as_one_without(tmp_path):
    model = with_assets(trained(VARIANTS["qalora"]), tmp_path / "m", None)
    with pytest.raises(SpecError, match=r"save: the model has adapters.*save_adapter"):
        qjax.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SpecError, match="quantize_model: the model has adapters"):
        qjax.quantize_model(model, "int8")


def test_an_adapter_of_a_changed_base_fits_no_other(tmp_path):
    model = with_assets(base_model(), tmp_path / "m", '{"name": "int4"}')
    model = trained(replace(VARIANTS["lora"], init="pissa"), model)
    save_adapter(model, tmp_path / "a")
    save_base(model, tmp_path / "base")
    base = with_assets(base_model(), tmp_path / "m", '{"name": "int4"}')
    adapter = read_adapter(tmp_path / "a")
    for use in (
        lambda: served.attach(base, adapter),
        lambda: load_adapter(base, tmp_path / "a"),
        lambda: merge(base, adapter),
        lambda: merge(model, mode="original", original=base_model(False)),
    ):
        with pytest.raises(UnsupportedError, match=r"was changed for it .*no other"):
            use()
    own = Artifact(tmp_path / "base")
    again = with_assets(
        base_model(), tmp_path / "m", json.dumps(own.manifest["recipe"])
    )
    load_adapter(again, tmp_path / "a")
    equal_trees(adapter_tree(again), adapter_tree(model))
    first = {p: x for _, part in own.parts() for p, x in part.items()}
    want = dict(base.params())
    assert first.keys() == want.keys()
    model.assets = None
    with pytest.raises(SpecError, match="save_base: the model was not made by"):
        save_base(model, tmp_path / "x")


def test_what_replaces_the_base_is_not_trained_on(tmp_path):
    save_adapter(trained(VARIANTS["rslora"]), tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    model = base_model()
    table = np.asarray(model.params()["embed.embedding"])
    copy = replace(adapter, base={"model.embed_tokens.weight": table})
    write_adapter(tmp_path / "copy", copy)
    assert load_adapter(base_model(), tmp_path / "copy").modules
    other = replace(adapter, base={"model.embed_tokens.weight": table + 1})
    write_adapter(tmp_path / "other", other)
    with pytest.raises(UnsupportedError, match=r"replaces embed.embedding of the base"):
        load_adapter(model, tmp_path / "other")
    saved = {"model.norm.weight": np.ones(32, np.float32)}
    whole = replace(adapter, saved=saved, modules_to_save=("norm",))
    write_adapter(tmp_path / "whole", whole)
    with pytest.raises(UnsupportedError, match=r"replaces norm.scale of the base"):
        load_adapter(model, tmp_path / "whole")

"""Adapters by path of weights, to and from the layers and settings of PEFT."""

import dataclasses
import json

import numpy as np
import pytest

from qjax.convert import convert
from qjax.converters.adapter_tree import adapter_of_tree, tree_of
from qjax.converters.adapters import by_path, merged
from qjax.converters.peft import read_adapter, write_adapter
from qjax.converters.peft_forms import plain, uniform
from qjax.converters.peft_settings import Adapter, Factors
from qjax.errors import NonFiniteError, SpecError, UnsupportedError
from qjax.models import ModelConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
PHI = LLAMA | {"model_type": "phi3", "pad_token_id": 0}
NEOX = LLAMA | {"model_type": "gpt_neox"}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
}


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype("float32")


def one(rows: int, cols: int, rank: int = 4, alpha: float = 8, seed: int = 0, **more):
    """A member of a tree; `pool` and `root` change its shape and its scale."""
    pool, root = more.pop("pool", 1), more.pop("root", False)
    scale = alpha / (rank**0.5 if root else rank) * (rows // pool if pool > 1 else 1)
    a, b = floats(rows // pool, rank, seed=seed), floats(rank, cols, seed=seed + 1)
    return {
        "a": a,
        "b": b,
        "rank": rank,
        "alpha": alpha,
        "scale": np.float32(scale),
        **more,
    }


def full(own: dict, rows: int) -> np.ndarray:
    """What a member adds to its weight, in float64."""
    a = own["a"].astype(np.float64)
    pool = rows // len(a)
    return np.repeat(a, pool, 0) / pool @ own["b"] * float(own["scale"])


def added(config: ModelConfig, adapter: Adapter) -> dict[str, np.ndarray]:
    """What an adapter adds to every weight, by path."""
    made = {}
    for path, own in by_path(config, adapter)[0].items():
        zeros = np.zeros((own.inputs, own.b.shape[1]), np.float32)
        made[path] = np.asarray(merged(zeros, own))
    return made


def same_product(data: dict, tree: dict) -> Adapter:
    """Writes a tree as an adapter that adds the same; weights without a member, 0."""
    config = ModelConfig.from_hf(data)
    adapter = adapter_of_tree(config, tree)
    for path, got in added(config, adapter).items():
        name = path.removesuffix(".kernel").removesuffix(".embedding")
        want = full(tree[name], len(got)) if name in tree else 0
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    return adapter


def equal_trees(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, own in one.items():
        assert own.keys() == other[name].keys()
        for key, value in own.items():
            np.testing.assert_array_equal(np.float32(value), other[name][key])


@pytest.mark.parametrize("root", [False, True])
def test_a_tree_comes_back_from_its_file(root, tmp_path):
    tree = {
        "layers.0.attn.q": one(32, 32, root=root, magnitude=floats(32)),
        "layers.1.attn.q": one(32, 32, rank=3, root=root, magnitude=floats(32)),
        "layers.0.mlp.down": one(48, 32, alpha=5, root=root, magnitude=floats(32)),
        "layers.1.mlp.down": one(48, 32, alpha=5, root=root, magnitude=floats(32)),
        "embed": one(40, 32, root=root, magnitude=floats(32)),
        "head": one(32, 40, root=root, magnitude=floats(40)),
    }
    config = ModelConfig.from_hf(LLAMA)
    write_adapter(tmp_path / "a", adapter_of_tree(config, tree, base_model="me/base"))
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text("utf-8"))
    q = "model.layers.1.self_attn.q_proj"
    assert settings["r"] == 4 and settings["lora_alpha"] == 8
    assert settings["rank_pattern"] == {q: 3}
    assert settings["alpha_pattern"] == {"down_proj": 5}
    assert settings["use_rslora"] == root and settings["use_dora"]
    targets = ["down_proj", "embed_tokens", "lm_head", "q_proj"]
    assert settings["target_modules"] == targets
    assert settings["base_model_name_or_path"] == "me/base"
    equal_trees(tree_of(config, read_adapter(tmp_path / "a")), tree)


def test_targets_name_no_layer_that_has_no_adapter():
    config = ModelConfig.from_hf(LLAMA)
    tree = {"layers.1.attn.q": one(32, 32), "head": one(32, 40)}
    made = adapter_of_tree(config, tree).target_modules
    assert made == ("1.self_attn.q_proj", "lm_head")
    gpt = {f"layers.{i}.attn.o": one(32, 32) for i in range(2)}
    made = adapter_of_tree(ModelConfig.from_hf(GPT2), gpt)
    assert made.target_modules == ("attn.c_proj",) and made.fan_in_fan_out
    table = adapter_of_tree(ModelConfig.from_hf(GPT2), {"embed": one(40, 32)})
    assert table.target_modules == ("wte",) and not table.fan_in_fan_out


@pytest.mark.parametrize("data", [PHI, NEOX], ids=["phi3", "gpt_neox"])
@pytest.mark.parametrize("dora", [False, True])
def test_weights_of_one_tensor_stand_side_by_side(data, dora):
    config = ModelConfig.from_hf(data)
    cols = {"q": 32, "k": config.kv_dim, "v": config.kv_dim}
    tree = {
        f"layers.0.attn.{n}": one(32, c, rank=i + 1, alpha=4 * i + 4, seed=9 * i)
        for i, (n, c) in enumerate(cols.items())
    }
    if dora:
        for i, own in enumerate(tree.values()):
            own["magnitude"] = floats(own["b"].shape[1], seed=i)
        adapter = adapter_of_tree(config, tree)
    else:
        adapter = same_product(data, tree)
    (layer,) = adapter.layers.values()
    assert layer.rank == 6 and layer.scaling == 4.0 and adapter.alpha == 24
    if dora:
        again = tree_of(config, adapter)
        for name, own in tree.items():
            np.testing.assert_array_equal(again[name]["magnitude"], own["magnitude"])


def test_a_shared_factor_stays_shared():
    tree = {f"layers.0.mlp.{n}": one(32, 48) for n in ("gate", "up")}
    tree["layers.0.mlp.up"]["b"] = floats(4, 48, seed=5)
    adapter = same_product(PHI, tree)
    (layer,) = adapter.layers.values()
    assert layer.rank == 4
    equal_trees(tree_of(ModelConfig.from_hf(PHI), adapter), tree)


def test_a_part_of_a_tensor_gets_zeros_beside_it():
    tree = {"layers.1.attn.k": one(32, 16, pool=4)}
    adapter = same_product(PHI, tree)
    assert list(adapter.layers) == ["model.layers.1.self_attn.qkv_proj"]
    tree["layers.1.attn.k"]["magnitude"] = floats(16)
    with pytest.raises(UnsupportedError, match="adapt all of layers"):
        adapter_of_tree(ModelConfig.from_hf(PHI), tree)


def test_pooled_inputs_are_kept_or_written_out(tmp_path):
    config = ModelConfig.from_hf(LLAMA)
    tree = {
        "layers.0.attn.q": one(32, 32, pool=16),
        "layers.0.mlp.down": one(48, 32, pool=16),
    }
    adapter = same_product(LLAMA, tree)
    assert adapter.pool == 16
    assert adapter.alpha == 8 and not adapter.alpha_pattern
    write_adapter(tmp_path / "a", adapter)
    equal_trees(tree_of(config, read_adapter(tmp_path / "a")), tree)
    done = convert(tmp_path / "a", tmp_path / "b", "peft")
    assert sorted(done.exact) == sorted(adapter.layers)
    again = read_adapter(tmp_path / "b")
    # PEFT multiplies pooled inputs by the number of averages: 2 and 3
    assert again.pool == 1
    assert again.rank_and_scaling("model.layers.0.self_attn.q_proj") == (4, 4.0)
    assert again.rank_and_scaling("model.layers.0.mlp.down_proj") == (4, 6.0)
    want = added(config, adapter)
    for path, got in added(config, again).items():
        np.testing.assert_allclose(got, want[path], rtol=1e-6)
    mixed = tree | {"layers.1.attn.q": one(32, 32)}
    assert same_product(LLAMA, mixed).pool == 1


def test_one_rank_and_scale_for_servers_without_patterns():
    config = ModelConfig.from_hf(LLAMA)
    tree = {
        "layers.0.attn.q": one(32, 32, rank=2, alpha=3),
        "layers.1.attn.q": one(32, 32, rank=5),
    }
    adapter = adapter_of_tree(config, tree)
    assert adapter.rank_pattern and adapter.alpha_pattern
    made = uniform(adapter)
    assert (made.r, made.alpha) == (5, 5)
    assert not made.rank_pattern and not made.alpha_pattern
    want = added(config, adapter)
    for path, got in added(config, made).items():
        np.testing.assert_allclose(got, want[path], rtol=1e-5, atol=1e-5)
    same = uniform(made)
    for name, own in made.layers.items():
        assert same.layers[name].a is own.a and same.layers[name].b is own.b
    root = adapter_of_tree(config, {"layers.0.attn.q": one(32, 32, root=True)})
    assert root.use_rslora and root.alpha == 8 and plain(root) == root
    flat = uniform(root)
    assert not flat.use_rslora and (flat.r, flat.alpha) == (4, 16)


@pytest.mark.parametrize(
    "tree, error, message",
    [
        ({}, SpecError, "no adapted layers"),
        ({"layers.9.attn.q": one(32, 32)}, SpecError, "1 of 1 .*'layers.9.attn.q'"),
        ({"norm": one(32, 32)}, SpecError, "'norm'"),
        ({"layers.0.attn.q": one(31, 32)}, SpecError, r"expected \[32, 4\] and \[4, 3"),
        ({"layers.0.attn.q": one(32, 30)}, SpecError, r"b \[4, 30\]; expected"),
        ({"layers.0.attn.q": one(32, 32) | {"rank": 3}}, SpecError, r"\[32, 3\]"),
        (
            {"layers.0.attn.q": one(32, 32) | {"b": np.full((4, 32), np.nan)}},
            NonFiniteError,
            "b of layers.0.attn.q has 128 values",
        ),
    ],
)
def test_trees_that_are_refused(tree, error, message):
    with pytest.raises(error, match=message):
        adapter_of_tree(ModelConfig.from_hf(LLAMA), tree)


def test_layers_must_pool_as_the_settings_say(tmp_path):
    own = Factors(floats(8, 4), floats(4, 32), 2.0, pool=4)
    adapter = Adapter({"model.layers.0.self_attn.q_proj": own}, r=4)
    with pytest.raises(SpecError, match="averages 4 inputs, the settings say 1"):
        write_adapter(tmp_path / "a", adapter)
    made = dataclasses.replace(adapter, pool=4, alpha=1)
    write_adapter(tmp_path / "a", made)
    with pytest.raises(SpecError, match="form is 'flat', expected one of"):
        convert(tmp_path / "a", tmp_path / "b", "peft", form="flat")
    with pytest.raises(SpecError, match="only peft has forms"):
        convert(tmp_path / "a", tmp_path / "b", "safetensors", form="uniform")

"""Adapters of PEFT: read, written, applied over dense and packed weights."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest

import qjax
from qjax.artifact import Artifact
from qjax.checkpoint import Assets
from qjax.cli import main
from qjax.converters.adapters import attach, attached
from qjax.converters.peft import Adapter, Factors, read_adapter, write_adapter
from qjax.errors import FormatError, SpecError, UnsupportedError
from qjax.formats import Int
from qjax.io.safetensors import write_safetensors
from qjax.models import Decoder, ModelConfig, param_shapes
from qjax.recipes import preset
from qjax.wrappers import InputScaled, LowRank, Transposed

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
LAYER = "model.layers.0.self_attn.q_proj"
KERNEL = "layers.0.attn.q.kernel"
PREFIX = "base_model.model."


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype("float32")


def params_of(config: ModelConfig) -> dict:
    return {p: 0.2 * floats(*s, seed=len(p)) for p, s in param_shapes(config).items()}


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.from_hf(LLAMA)


def factors(rank: int = 4, scaling: float = 2.0, rows=32, cols=32, **more) -> Factors:
    return Factors(floats(rows, rank), floats(rank, cols, seed=1), scaling, **more)


def applied(config: ModelConfig, params: dict, adapter: Adapter) -> dict:
    parts = [(None, params)]
    return {
        p: x for _, part in attached(config, parts, adapter) for p, x in part.items()
    }


def test_a_dense_weight_takes_the_adapter_in(config):
    params, own = params_of(config), factors()
    made = applied(config, params, Adapter({LAYER: own}))
    want = params[KERNEL].astype(np.float64) + 2.0 * own.a.astype(np.float64) @ own.b
    np.testing.assert_allclose(made.pop(KERNEL), want, rtol=1e-5, atol=1e-5)
    assert made.keys() | {KERNEL} == params.keys()
    for path, leaf in made.items():
        np.testing.assert_array_equal(leaf, params[path])


def test_dense_weights_are_rounded_once(config):
    params = params_of(config)
    params[KERNEL] = params[KERNEL].astype(jax.numpy.bfloat16)
    own = factors()
    made = applied(config, params, Adapter({LAYER: own}))[KERNEL]
    want = params[KERNEL].astype(np.float64) + 2.0 * own.a.astype(np.float64) @ own.b
    assert made.dtype == jax.numpy.bfloat16
    error = np.abs(np.asarray(made, np.float64) - want)
    assert (error <= 2.0**-8 * np.abs(want) + 1e-5).all()  # half a unit, and float32's


@pytest.mark.parametrize("dora", [False, True])
def test_packed_weights_stay_packed_and_survive_a_file(config, dora, tmp_path):
    params = params_of(config)
    for path in (KERNEL, "layers.1.attn.q.kernel", "embed.embedding"):
        axis = -1 if path.startswith("embed") else -2
        params[path] = qjax.quantize(params[path], Int(4, 16), axis=axis)
    magnitude = np.abs(floats(32)) + 0.1 if dora else None
    own = factors(magnitude=magnitude)
    table = factors(rows=40, magnitude=magnitude, embedding=True)
    adapter = Adapter({LAYER: own, "model.embed_tokens": table}, use_dora=dora)
    model = Decoder(config, params)
    made = attach(model, adapter)
    for path, one in ((KERNEL, own), ("embed.embedding", table)):
        base, got = params[path], made.params()[path]
        want = np.asarray(base.dequantize("float32"), np.float64)
        want = want + 2.0 * one.a.astype(np.float64) @ one.b
        if dora:
            want *= magnitude / np.linalg.norm(want, axis=0)
            assert isinstance(got, Transposed) and isinstance(got.base, InputScaled)
            low = got.base.base.base
        else:
            low = got
        assert isinstance(low, LowRank)
        for a, b in zip(jax.tree.leaves(low.base), jax.tree.leaves(base), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(
            got.dequantize("float32"), want, rtol=1e-5, atol=1e-5
        )
    plain = Decoder(
        config,
        {
            path: leaf.dequantize() if hasattr(leaf, "dequantize") else leaf
            for path, leaf in made.params().items()
        },
    )
    tokens = np.arange(12).reshape(2, 6)
    with jax.default_matmul_precision("float32"):
        want = plain(tokens)[0]
        np.testing.assert_allclose(made(tokens)[0], want, rtol=1e-3, atol=1e-3)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), "utf-8")
    made.assets = Assets(str(tmp_path))
    qjax.save(made, tmp_path / "out")
    artifact = Artifact(tmp_path / "out")
    again = {p: leaf for _, part in artifact.parts() for p, leaf in part.items()}
    for a, b in zip(
        jax.tree.leaves(again), jax.tree.leaves(made.params()), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_column_of_zeros_stays_one(config):
    params = params_of(config)
    params[KERNEL] = np.zeros((32, 32), np.float32)
    own = factors(magnitude=np.ones(32, np.float32))
    own = dataclasses.replace(own, b=np.zeros((4, 32), np.float32))
    made = applied(config, params, Adapter({LAYER: own}, use_dora=True))
    np.testing.assert_array_equal(made[KERNEL], 0)


def test_a_tied_head_keeps_the_embedding_it_had():
    config = ModelConfig.from_hf({**LLAMA, "tie_word_embeddings": True})
    params = params_of(config)
    table = factors(rows=40, embedding=True)
    made = applied(config, params, Adapter({"model.embed_tokens": table}))
    np.testing.assert_array_equal(made["head.kernel"], params["embed.embedding"].T)
    assert not np.array_equal(made["embed.embedding"], params["embed.embedding"])
    made = applied(config, params, Adapter({LAYER: factors()}))
    assert "head.kernel" not in made
    head = Adapter({"lm_head": factors(cols=40)})
    made = applied(config, params, head)
    np.testing.assert_array_equal(made["embed.embedding"], params["embed.embedding"])
    assert not np.array_equal(made["head.kernel"], params["embed.embedding"].T)
    base = {"lm_head.weight": floats(40, 32)}  # one tensor with the embedding
    made = applied(config, params, dataclasses.replace(head, base=base))
    np.testing.assert_array_equal(made["embed.embedding"], base["lm_head.weight"])


def whole(**more) -> Adapter:
    """An adapter with everything that a file can hold."""
    layers = {
        LAYER: factors(2, 6.0, magnitude=floats(32)),
        "model.layers.1.self_attn.q_proj": factors(4, 2.0, magnitude=floats(32)),
        "model.embed_tokens": factors(
            rows=40, scaling=2.0, magnitude=floats(32), embedding=True
        ),
    }
    adapter = Adapter(
        layers,
        {"lm_head.weight": floats(40, 32)},
        {"model.embed_tokens.weight": floats(40, 32)},
        r=4,
        alpha=8,
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 2},
        alpha_pattern={"0.self_attn.q_proj": 12},
        use_dora=True,
        target_modules=("q_proj", "embed_tokens"),
        modules_to_save=("lm_head",),
        base_model="me/base",
    )
    return dataclasses.replace(adapter, **more)


def same(a, b) -> None:
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            x, y = list(x.values()), [y[k] for k in x]
        for one, other in zip(
            *(v if isinstance(v, list) else [v] for v in (x, y)), strict=True
        ):
            if isinstance(one, Factors):
                same(one, other)
            else:
                np.testing.assert_array_equal(one, other)


def test_what_is_written_is_read(tmp_path):
    adapter = whole()
    write_adapter(tmp_path / "a", adapter)
    same(read_adapter(tmp_path / "a"), adapter)
    with pytest.raises(SpecError, match="exists and is not empty"):
        write_adapter(tmp_path / "a", adapter)
    text = (tmp_path / "a" / "adapter_config.json").read_text("utf-8")
    assert json.loads(text)["lora_alpha"] == 8 and '"lora_alpha": 8,' in text


def test_rslora_scales_by_the_root_of_the_rank():
    adapter = Adapter({}, r=16, alpha=8, use_rslora=True, rank_pattern={"up": 4})
    assert adapter.rank_and_scaling("layers.0.down") == (16, 2.0)
    assert adapter.rank_and_scaling("layers.0.up") == (4, 4.0)
    assert adapter.rank_and_scaling("layers.0.upper") == (16, 2.0)


@pytest.mark.parametrize(
    "adapter, message",
    [
        (Adapter({LAYER: factors(2, 2.0)}, r=4), "has rank 2 .* give 4 and 2"),
        (Adapter({LAYER: factors(4, 3.0)}, r=4), "scale 3; .* give 4 and 2"),
        (Adapter({LAYER: factors()}, r=4, use_dora=True), "magnitude"),
    ],
)
def test_layers_must_fit_the_settings_to_be_written(adapter, message, tmp_path):
    with pytest.raises(SpecError, match=message):
        write_adapter(tmp_path / "a", adapter)
    assert not (tmp_path / "a").exists()


def stored(root, settings: dict, tensors: dict | None = None):
    """A directory with these settings and tensors."""
    root.mkdir()
    usual = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (root / "adapter_config.json").write_text(json.dumps(usual | settings), "utf-8")
    if tensors is None:
        tensors = {"lora_A.weight": floats(4, 32), "lora_B.weight": floats(32, 4)}
    named = {
        f"{PREFIX}{LAYER}.{n}" if n[0] == "l" else n: t for n, t in tensors.items()
    }
    write_safetensors(root / "adapter_model.safetensors", named)
    return root


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"peft_type": "IA3"}, UnsupportedError, "peft_type 'IA3' is not read"),
        ({"lora_bias": True}, UnsupportedError, "lora_bias changes what"),
        ({"layer_replication": [[0, 2]]}, UnsupportedError, "layer_replication"),
        ({"megatron_config": {"a": 1}}, UnsupportedError, "megatron_config"),
        ({"target_parameters": ["x"]}, UnsupportedError, "target_parameters"),
        ({"trainable_token_indices": [1]}, UnsupportedError, "trainable_token"),
        ({"alora_invocation_tokens": [1]}, UnsupportedError, "alora_invocation"),
        ({"use_qalora": True, "use_dora": True}, UnsupportedError, "use_qalora with"),
        ({"use_qalora": True, "qalora_group_size": 1}, SpecError, "group_size' is 1"),
        ({"r": 0}, SpecError, "key 'r' is 0"),
        ({"r": "4"}, SpecError, "key 'r' is '4'"),
        ({"lora_alpha": None}, SpecError, "'lora_alpha' is None"),
        ({"use_dora": 1}, SpecError, "expected true or false"),
        ({"bias": "some"}, SpecError, "expected none, all or lora_only"),
        ({"rank_pattern": {"(a+)+": 3}}, FormatError, "not a simple pattern"),
        ({"rank_pattern": {"q_proj": -1}}, SpecError, "'q_proj' is -1"),
        ({"rank_pattern": {"q_proj": 3}}, FormatError, r"expected \[3, in\]"),
        ({"alpha_pattern": ["q"]}, SpecError, "expected an object"),
        ({"alpha_pattern": {"(": 1}}, FormatError, "pattern '\\('"),
        ({"target_modules": [1]}, SpecError, "expected a list of names"),
        ({"use_dora": True}, FormatError, r"\['a', 'b'\], expected \['a', 'b', 'm"),
    ],
)
def test_settings_that_are_refused(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        read_adapter(stored(tmp_path / "a", settings))


NAN = np.full((4, 32), np.nan, np.float32)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "holds no tensors"),
        ({"lora_A.weight": floats(4, 32)}, r"has \['a'\], expected \['a', 'b'\]"),
        ({"lora_A.weight": floats(4), "lora_B.weight": floats(32, 4)}, r"A \[4\]"),
        ({"lora_A.weight": floats(5, 3), "lora_B.weight": floats(3, 5)}, r"\[4, in\]"),
        ({"lora_A.weight": NAN, "lora_B.weight": floats(32, 4)}, "128 of 128 numbers"),
        ({"lora_A.weight": np.ones((4, 32), int)}, "is int64, expected floats"),
        ({"lora_B.bias": floats(4)}, "does not explain"),
        ({"lora_C.weight": floats(4)}, "does not explain"),
        ({"model.q_proj.lora_A.weight": floats(4, 32)}, "expected names like base_m"),
        ({PREFIX + "model.norm.weight": floats(32)}, "1 tensors .*model.norm.weight"),
        ({PREFIX + "x.q_proj.bias": floats(32)}, "does not explain"),
    ],
)
def test_tensors_that_are_refused(tensors, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        read_adapter(stored(tmp_path / "a", {}, tensors))


def test_directories_that_are_none(tmp_path):
    root = stored(tmp_path / "a", {})
    with pytest.raises(SpecError, match="revision 'x' is for the Hub"):
        read_adapter(root, "x")
    with pytest.raises(SpecError, match="no such directory, and not a Hub id"):
        read_adapter(tmp_path / "a b")
    (root / "adapter_model.safetensors").unlink()
    with pytest.raises(SpecError, match="holds neither adapter_model"):
        read_adapter(root)
    (root / "adapter_config.json").unlink()
    with pytest.raises(SpecError, match="expected a PEFT adapter"):
        read_adapter(root)


def test_only_the_files_of_an_adapter_are_fetched(tmp_path, monkeypatch):
    root, asked = stored(tmp_path / "a", {}), []

    def fetch(repo, revision, allow_patterns, ignore_patterns):
        asked.append((repo, revision, allow_patterns))
        assert ignore_patterns == ["*/*"]
        return str(root)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert set(read_adapter("me/adapter", "v1").layers) == {LAYER}
    assert asked == [("me/adapter", "v1", names)]
    shutil.move(root / names[1], tmp_path)
    with pytest.raises(SpecError, match="holds neither"):
        read_adapter("me/adapter")
    assert asked[2] == ("me/adapter", None, [names[0], "adapter_model.bin"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base model as well"),
        ({"new_option": 3}, "settings not known here: new_option"),
        ({"target_modules": ["v_proj"]}, "not among target_modules"),
    ],
)
def test_suspicious_settings_are_logged(settings, message, tmp_path, caplog):
    read_adapter(stored(tmp_path / "a", settings))
    assert message in caplog.text


def test_leftovers_without_effect_are_quiet(tmp_path, caplog):
    left = {"corda_config": {"a": 1}, "eva_config": {"rho": 2.0}, "lora_dropout": 0.1}
    left |= {"megatron_core": "megatron.core", "qalora_group_size": 16, "other": None}
    with caplog.at_level(logging.INFO):
        read_adapter(stored(tmp_path / "a", left))
    assert not caplog.records


@pytest.mark.parametrize(
    "layers, message",
    [
        ({"model.layers.9.self_attn.q_proj": factors()}, "1 of 1 tensors .*layers.9"),
        ({LAYER: factors(rows=31)}, r"for a weight \[31, 32\], the model has \[32, 32"),
        ({"model.norm": factors()}, "model.norm is for a weight"),
    ],
)
def test_adapters_of_other_models_are_refused(config, layers, message):
    with pytest.raises(FormatError, match=message):
        applied(config, params_of(config), Adapter(layers))


def test_a_resized_vocabulary_is_refused(config):
    adapter = Adapter({}, base={"lm_head.weight": floats(41, 32)})
    with pytest.raises(FormatError, match=r"lm_head.weight has shape \[41, 32\]"):
        applied(config, params_of(config), adapter)


@pytest.mark.parametrize("recipe", ["rotated-int4-g16", "awq-int4-g16", "int4-g16"])
def test_a_base_with_other_activations_is_refused(config, recipe):
    spec = preset(recipe).to_dict()
    if recipe.startswith("rotated"):
        spec["rotate"] = 1
    model = Decoder(config, params_of(config))
    model.assets = Assets("x", json.dumps(spec))
    if recipe == "int4-g16":
        assert attach(model, Adapter({LAYER: factors()})).assets is model.assets
        return
    with pytest.raises(UnsupportedError, match="rotated, or scales were folded"):
        attach(model, Adapter({LAYER: factors()}))


def test_a_model_is_loaded_under_an_adapter(model_path, tmp_path, capsys):
    base, _ = qjax.load(model_path)
    rows, cols = base.params()[KERNEL].shape
    layers = {LAYER: factors(rows=rows, cols=cols)}
    made = Adapter(layers, r=4, alpha=8, target_modules=("q_proj",))
    write_adapter(tmp_path / "adapter", made)
    loaded, _ = qjax.load(model_path, adapter=tmp_path / "adapter")
    tokens = np.arange(8)[None]
    expected = attach(base, read_adapter(tmp_path / "adapter"))(tokens)[0]
    np.testing.assert_array_equal(loaded(tokens)[0], expected)
    assert np.abs(expected - base(tokens)[0]).max() > 0.01
    asked = ["generate", str(model_path), "--prompt", "Once", "--max-tokens", "2"]
    main([*asked, "--adapter", str(tmp_path / "adapter")])
    assert capsys.readouterr().out

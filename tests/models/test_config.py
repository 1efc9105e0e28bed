"""Configurations: what is read, what is refused, and what the messages say."""

import dataclasses
import json
import logging
import math

import pytest

from qjax.errors import SpecError, UnsupportedError
from qjax.models import ModelConfig


@pytest.fixture
def llama(golden):
    return dict(golden.CASES["llama"])


def test_configs_are_hashable_and_equal_by_value(case, golden):
    one = ModelConfig.from_hf(golden.CASES[case])
    two = ModelConfig.from_hf(json.loads(json.dumps(golden.CASES[case])))
    assert one == two and hash(one) == hash(two)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.dim = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_printing_shows_what_differs_from_the_defaults(llama):
    text = repr(ModelConfig.from_hf(llama))
    assert text.startswith(
        "ModelConfig(family='llama', vocab_size=64, dim=32, layers=3"
    )
    assert "Rope(dim=8, context=64)" in text
    assert "softcap" not in text and "windows" not in text


def test_bundled_model(model_path):
    config = ModelConfig.from_hf(json.loads((model_path / "config.json").read_text()))
    assert (config.dim, config.layers, config.heads, config.kv_heads) == (256, 6, 8, 4)
    assert config.eos_ids == (0,)


def test_old_and_new_rope_spellings_agree(llama):
    scaling = {"rope_type": "linear", "factor": 2.0}
    old = {**llama, "rope_theta": 5e5, "rope_scaling": scaling}
    new = {**llama, "rope_parameters": {**scaling, "rope_theta": 5e5}}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)


def test_architecture_alone_is_enough(llama):
    del llama["model_type"]
    assert ModelConfig.from_hf(llama).family == "llama"


def test_window_patterns(golden):
    old = ModelConfig.from_hf(golden.CASES["gemma3-old"])
    assert old.windows == (4, None, 4) and old.rope_layers == (0, 1, 0)
    new = ModelConfig.from_hf(golden.CASES["gemma3-new"])
    assert new.windows == (None, 4, 4) and new.rope_layers == (1, 0, 0)
    qwen = ModelConfig.from_hf(golden.CASES["qwen2-window"])
    assert qwen.windows == (None, 4, 4)


def test_published_gemma_defaults():
    config = ModelConfig.from_hf(
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "sliding_window": 512,
        }
    )
    assert config.tied and config.head_dim == 256 and config.norm_offset == 1.0
    assert config.windows.count(None) == 4 and config.windows[5] is None
    assert [rope.theta for rope in config.ropes] == [1e4, 1e6]
    assert config.embed_scale == math.sqrt(1152)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"hidden_size": "32"},
            r"'hidden_size' is '32' \(str\); expected an integer fr",
        ),
        ({"hidden_size": True}, r"'hidden_size' is True \(bool\)"),
        ({"hidden_size": 0}, r"'hidden_size' is 0 \(int\); .* from 1 to 1048576"),
        ({"hidden_size": 2**21}, "2097152"),
        ({"num_attention_heads": 5}, "'hidden_size' is 32, not a multiple of 'num_att"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key/value heads"),
        ({"rms_norm_eps": -1.0}, "'rms_norm_eps' is -1.0 .* a number above 0"),
        ({"rms_norm_eps": math.nan}, "'rms_norm_eps' is nan"),
        ({"rope_theta": "x"}, "'rope_theta' is 'x'"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' is 1 .* true or false"),
        (
            {"rope_scaling": [2]},
            r"'rope_scaling' is \[2\] \(list\); expected an object",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: key 'factor' is missing"),
        ({"head_dim": 7}, "7 head dimensions would rotate; expected an even number"),
        ({"architectures": "Llama"}, "'architectures' is 'Llama' .* list of class nam"),
        ({"vocab_size": None}, "'vocab_size' is None"),
    ],
)
def test_bad_values_name_key_value_and_expectation(llama, change, message):
    with pytest.raises(SpecError, match=message):
        ModelConfig.from_hf({**llama, **change})


def test_missing_keys_are_named(llama):
    del llama["num_hidden_layers"]
    with pytest.raises(SpecError, match="'num_hidden_layers' or 'n_layer' is missing"):
        ModelConfig.from_hf(llama)
    with pytest.raises(SpecError, match="neither 'model_type' nor 'architectures'"):
        ModelConfig.from_hf({})
    with pytest.raises(SpecError, match=r"expected a JSON object, got \[\] \(list\)"):
        ModelConfig.from_hf([])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "base, change, message",
    [
        ("llama", {"model_type": "llama4"}, "'llama4' is not supported. Nearest: llam"),
        ("llama", {"model_type": "zzz"}, "'zzz' is not supported. Supported: llama, m"),
        (
            "llama",
            {"architectures": ["LlamaForSequenceClassification"]},
            "architecture 'LlamaForSequenceClassification' is not supported",
        ),
        ("llama", {"hidden_act": "mish"}, "activation 'mish' is not supported; suppor"),
        ("llama", {"rope_scaling": {"type": "mrope"}}, "rope type 'mrope' is not supp"),
        ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters: rotary settings per layer type are not supported",
        ),
        ("opt", {"word_embed_proj_dim": 16}, r"'word_embed_proj_dim' \(16\) differs"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is true"),
        ("gemma2", {"use_bidirectional_attention": True}, "causal decoders only"),
        ("gemma3-old", {"attn_logit_softcapping": 5.0}, "Gemma 3 has none"),
    ],
)
def test_unsupported_options_are_refused(golden, base, change, message):
    with pytest.raises(UnsupportedError, match=message):
        ModelConfig.from_hf({**golden.CASES[base], **change})


def test_remote_code_is_never_run(llama, caplog):
    llama["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    with caplog.at_level(logging.WARNING, logger="qjax"):
        assert ModelConfig.from_hf(llama).family == "llama"
    assert "'auto_map' names code to run; qjax ignores it" in caplog.text

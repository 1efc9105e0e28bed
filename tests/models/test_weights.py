"""Names, shapes and layouts of checkpoint tensors."""

import logging

import numpy as np
import pytest

from qjax.errors import FormatError, SpecError
from qjax.models import (
    ModelConfig,
    from_hf,
    match,
    param_shapes,
    plan,
    read_parts,
    to_hf,
)


def _shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def _config(golden, case):
    return ModelConfig.from_hf(golden.CASES[case])


def test_round_trip(case, golden, tensors_of):
    config, tensors = _config(golden, case), tensors_of(case)
    params = from_hf(config, tensors)
    assert {path: leaf.shape for path, leaf in params.items()} == param_shapes(config)
    back = dict(to_hf(config, params))
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
        assert back[name].flags.c_contiguous


def test_plan_goes_layer_by_layer(golden):
    layers = [entry.layer for entry in plan(_config(golden, "gpt2"))]
    numbers = [layer for layer in layers if layer is not None]
    assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2}
    assert layers[0] is None and layers[-1] is None


def test_parts_hold_one_layer_each(golden, tensors_of):
    config, tensors = _config(golden, "phi3"), tensors_of("phi3")
    fetched = []

    def fetch(name):
        fetched.append(name)
        return tensors[name]

    found = match(config, _shapes(tensors))
    parts = list(read_parts(config, found, fetch))
    assert [layer for layer, _ in parts] == [None, 0, 1, 2, None]
    assert all(p.startswith("layers.1.") for p in parts[2][1])
    assert sorted(fetched) == sorted(tensors)


def test_gpt_neox_heads_are_untangled(golden):
    config = _config(golden, "gpt_neox")
    entry = next(e for e in plan(config) if e.name.endswith("query_key_value.weight"))
    rows = np.arange(96, dtype=np.float32)[:, None] + np.zeros((96, 32), np.float32)
    read = entry.read(rows)
    first = {path.split(".")[3]: kernel[0] for path, kernel in read.items()}
    np.testing.assert_array_equal(first["q"][:9], [*range(8), 24])
    np.testing.assert_array_equal(first["k"][:9], [*range(8, 16), 32])
    np.testing.assert_array_equal(first["v"][:9], [*range(16, 24), 40])


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("llama", "model.", ""),
        ("gpt2", "transformer.", ""),
        ("gpt_neox", "gpt_neox.", ""),
        ("gpt_neox", "embed_out.", "lm_head."),
        ("opt", "model.decoder.", "decoder."),
    ],
)
def test_other_prefixes_are_accepted(name, old, new, golden, tensors_of):
    config = _config(golden, name)
    tensors = {
        new + key[len(old) :] if key.startswith(old) else key: tensor
        for key, tensor in tensors_of(name).items()
    }
    assert from_hf(config, tensors).keys() == param_shapes(config).keys()


@pytest.mark.parametrize(
    "name, buffer",
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
    ],
)
def test_constant_buffers_are_ignored(name, buffer, golden, tensors_of):
    tensors = {**tensors_of(name), buffer: np.ones(3)}
    found = match(_config(golden, name), _shapes(tensors))
    found.check()
    assert found.ignored == (buffer,)


def test_unknown_tensors_are_named_and_not_used(golden, tensors_of, caplog):
    config, tensors = _config(golden, "llama"), tensors_of("llama")
    expected = from_hf(config, tensors)
    tensors["model.layers.0.mlp.router.weight"] = tensors["speaker.x"] = np.ones(3)
    with caplog.at_level(logging.WARNING, logger="qjax"):
        assert from_hf(config, tensors).keys() == expected.keys()
    assert (
        "checkpoint: 2 tensors belong to no part of the model and are not used: "
        "model.layers.0.mlp.router.weight, speaker.x"
    ) in caplog.text
    tensors["model.layers.0.mlp.up_proj.bias"] = np.ones(48)
    with pytest.raises(FormatError, match=r"1 unexpected .*up_proj\.bias"):
        from_hf(config, tensors)


def test_everything_wrong_is_listed_at_once(golden, tensors_of):
    tensors = tensors_of("llama")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.ones((48, 32))
    tensors["model.norm.weight"] = np.ones(31)
    found = match(_config(golden, "llama"), _shapes(tensors))
    with pytest.raises(FormatError) as error:
        found.check("model.safetensors")
    assert str(error.value) == (
        "model.safetensors: tensors do not fit config.json: "
        "1 missing (model.layers.0.mlp.up_proj.weight); "
        "1 unexpected (model.layers.7.mlp.up_proj.weight); "
        "1 of the wrong shape (model.norm.weight: got (31,), expected (32,)). "
        "Check that weights and config.json belong to the same model"
    )


def test_tied_head_equal_to_the_embedding_is_dropped(golden, tensors_of, caplog):
    config, tensors = _config(golden, "qwen2"), tensors_of("qwen2")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert "head.kernel" not in from_hf(config, tensors)
    tensors["lm_head.weight"][0, 0] += 1
    with caplog.at_level(logging.WARNING, logger="qjax"):
        assert "head.kernel" in from_hf(config, tensors)
    assert "holds a different head; keeping it" in caplog.text


def test_tied_head_stands_in_for_an_absent_embedding(golden, tensors_of):
    config, tensors = _config(golden, "qwen2"), tensors_of("qwen2")
    expected = from_hf(config, tensors)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    got = from_hf(config, tensors)
    assert got.keys() == expected.keys()
    np.testing.assert_array_equal(got["embed.embedding"], expected["embed.embedding"])


def test_untied_head_is_required(golden, tensors_of):
    tensors = tensors_of("llama")
    del tensors["lm_head.weight"]
    with pytest.raises(FormatError, match=r"1 missing \(lm_head.weight\)"):
        from_hf(_config(golden, "llama"), tensors)


def test_writing_needs_every_parameter(golden, tensors_of):
    config = _config(golden, "phi3")
    params = from_hf(config, tensors_of("phi3"))
    del params["layers.2.attn.k.kernel"]
    with pytest.raises(
        SpecError, match=r"lack layers\.2\.attn\.k\.kernel, needed by m"
    ):
        dict(to_hf(config, params))

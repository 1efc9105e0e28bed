"""Models as GGUF files: what is written is read back as the same model."""

import dataclasses
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from qjax.converters.gguf import GGUFCheckpoint
from qjax.converters.gguf_model import write_model
from qjax.errors import SpecError, UnsupportedError
from qjax.models.rope import Rope, frequencies
from qjax.tensor import QuantizedTensor

from .gguf_models import (
    CASES,
    MORE,
    config_of,
    golden_module,
    logits,
    opened,
    packed_of,
    params_of,
    written,
)


def _rounded(value: Any) -> Any:
    """Settings with numbers of six digits: files have float32."""
    if dataclasses.is_dataclass(value):
        return {
            f.name: _rounded(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    return float(f"{value:.6g}") if isinstance(value, float) else value


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_a_model_that_was_written_is_read_back(case, tmp_path):
    config = config_of(case)
    params = params_of(config)
    found, read = opened(written(tmp_path / "m.gguf", config, params))
    expected = config
    if config.family == "mistral":
        expected = dataclasses.replace(expected, family="llama")
    if case == "llama-llama3":  # only the divisors of frequencies are in the file
        np.testing.assert_allclose(
            frequencies(found.ropes[0]), frequencies(config.ropes[0]), rtol=1e-6
        )
        expected = dataclasses.replace(expected, ropes=found.ropes)
    assert _rounded(found) == _rounded(expected)
    assert read.keys() == params.keys()
    for path, value in params.items():
        added = config.norm_offset and path.endswith(".scale")
        bound = np.spacing(np.float32(2)) if added else 0
        np.testing.assert_allclose(read[path], value, rtol=0, atol=bound, err_msg=path)


@pytest.mark.parametrize("case", ["llama-llama3", "phi3-long", "gpt_neox"])
def test_logits_are_those_of_the_original(case, tmp_path):
    config = config_of(case)
    found, read = opened(written(tmp_path / "m.gguf", config, params_of(config)))
    file = golden_module.HERE / f"{golden_module.family(case)}.npz"
    expected = np.load(file)[case]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(found, read), expected, atol=2e-4 * scale)


PACKED = {
    "llama-bias": {"intermediate_size": 64},
    "phi3": {"intermediate_size": 64},
    "gpt_neox": {"intermediate_size": 64},
    "gpt2-untied": {"n_inner": 64},
    "gemma3-new": {"intermediate_size": 64},
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_weights_keep_their_blocks(case, tmp_path):
    config = config_of(case, **PACKED[case])
    params = packed_of(config, params_of(config))
    found, read = opened(written(tmp_path / "m.gguf", config, params, "q8_0"))
    assert found.layers == config.layers
    packed = 0
    for path, value in params.items():
        assert isinstance(read[path], QuantizedTensor) == isinstance(
            value, QuantizedTensor
        )
        if isinstance(value, QuantizedTensor):
            packed += 1
            jax.tree.map(np.testing.assert_array_equal, read[path], value)
    assert packed >= 6 * config.layers + 1


def test_rows_of_packed_weights_are_moved_as_llama_cpp_moves_them(tmp_path):
    # conversion/llama.py of llama.cpp, `permute`; conversion/gptneox.py
    heads, keys, width = 4, 2, 8
    config = config_of("llama", num_key_value_heads=2, intermediate_size=64)
    params = packed_of(config, params_of(config))
    path = written(tmp_path / "m.gguf", config, params, "q8_0")
    with GGUFCheckpoint(path) as source:
        for name, count in (("q", heads), ("k", keys)):
            stored = source._file.read(f"blk.1.attn_{name}.weight")
            rows = np.asarray(params[f"layers.1.attn.{name}.kernel"].codes).T
            moved = rows.reshape(count, 2, width // 2, -1).swapaxes(1, 2)
            np.testing.assert_array_equal(stored, moved.reshape(rows.shape))
    config = config_of("gpt_neox", intermediate_size=64)
    params = packed_of(config, params_of(config))
    path = written(tmp_path / "n.gguf", config, params, "q8_0")
    with GGUFCheckpoint(path) as source:
        stored = source._file.read("blk.0.attn_qkv.weight")
    kernels = [params[f"layers.0.attn.{name}.kernel"] for name in "qkv"]
    joined = np.concatenate([np.asarray(kernel.codes).T for kernel in kernels])
    np.testing.assert_array_equal(stored, joined)


@pytest.mark.parametrize(
    "kind, dtype", [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)]
)
def test_matrices_of_16_bits_beside_vectors_of_32(kind, dtype, tmp_path):
    config = config_of("gemma2")
    params = {k: v.astype(dtype) for k, v in params_of(config).items()}
    _, read = opened(written(tmp_path / "m.gguf", config, params, kind))
    for path, value in params.items():
        matrix = value.ndim == 2
        assert read[path].dtype == (dtype if matrix else np.float32), path
        if matrix:
            np.testing.assert_array_equal(read[path], value)
        else:  # 1 was added in float32, not in 16 bits
            wide = value.astype(np.float32)
            np.testing.assert_allclose(read[path], wide, rtol=0, atol=2.4e-7)


def test_packed_weights_are_written_dense_where_a_float_is_asked_for(tmp_path):
    config = config_of("llama", intermediate_size=64, num_hidden_layers=1)
    params = packed_of(config, params_of(config))
    _, read = opened(written(tmp_path / "m.gguf", config, params, "f32"))
    for path, value in params.items():
        dense = value.dequantize() if isinstance(value, QuantizedTensor) else value
        np.testing.assert_array_equal(read[path], dense, err_msg=path)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "opt": ("opt", {}, "no architecture for 'opt'; it has gemma2, gemma3_text"),
    "dynamic": ("llama-dynamic", {}, "no rotations of type 'dynamic' in 'llama'"),
    "llama3": (
        "qwen2",
        {"rope_scaling": golden_module.CASES["llama-llama3"]["rope_scaling"]},
        "no rotations of type 'llama3' in 'qwen2'; it has default, linear, yarn",
    ),
    "yarn": ("llama-yarn-mscale", {}, "reads no other bounds of YaRN in 'llama'"),
    "local": (
        "gemma3-new",
        {
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e4},
                "sliding_attention": {"rope_type": "linear", "factor": 2.0},
            },
        },
        "does not scale rotations of layers with windows",
    ),
    "bases": (
        "gemma3-old",
        {"query_pre_attn_scalar": 16, "sliding_window": None},
        r"windows are \[\], its bases \[10000.0, 1000000.0, 10000.0\]",
    ),
    "bias": ("qwen3-bias", {}, "reads no qkv bias in 'qwen3', this model has one"),
    "no-bias": ("gpt_neox-sequential-golden", {}, "needs a qkv bias in 'gptneox'"),
    "scale": ("gemma2", {"query_pre_attn_scalar": 24}, "square root of 16 .* of 24"),
    "27b": (
        "gemma2",
        {"num_hidden_layers": 46},
        "square root of 8 in 'gemma2', this model by that of 16",
    ),
    "by-layer": ("gpt2-scaled", {}, "does not scale scores layer by layer"),
    "gelu": (
        "gemma2",
        {"hidden_activation": "gelu"},
        "computes gelu_tanh in 'gemma2', this model gelu",
    ),
    "relu": ("llama", {"hidden_act": "relu"}, "computes silu in 'llama', .* relu"),
    "width": (
        "qwen2",
        {"head_dim": 12},
        "heads of 32 numbers together in 'qwen2', this model's have 48",
    ),
    "tied": ("gpt_neox", {"tie_word_embeddings": True}, "needs a head of its own"),
    "untied": ("gemma2", {"tie_word_embeddings": False}, "reads no head of its own"),
    "unbounded": ("gemma2", {"attn_logit_softcapping": None}, "bounds scores and"),
    "windowless": ("gemma2", {"sliding_window": None}, "expects windows in 'gemma2'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(name, tmp_path):
    case, changes, message = REFUSED[name]
    if case == "gpt_neox-sequential-golden":
        case, changes = "gpt_neox", {"attention_bias": False}
    config = config_of(case, **changes)
    with pytest.raises(UnsupportedError, match=message):
        written(tmp_path / "m.gguf", config, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["mistral", "qwen2-window", "phi3"])
def test_windows_that_llama_cpp_does_not_slide_are_reported(case, tmp_path, caplog):
    config = config_of(case)
    found, _ = opened(written(tmp_path / "m.gguf", config, params_of(config)))
    assert found.windows == (config.windows if case == "phi3" else ())
    assert "slides no windows in" in caplog.text and "of 4 tokens" in caplog.text


def test_gemma_2_with_other_windows(tmp_path):
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    config = config_of("gemma2", layer_types=kinds)
    found, _ = opened(written(tmp_path / "m.gguf", config, params_of(config)))
    assert found.windows == config.windows == (None, 4, 4)


def test_parameters_that_are_missing_or_left_over_are_named(tmp_path):
    config = config_of("llama")
    params = params_of(config)
    with pytest.raises(SpecError, match=r"has no parameter 'layers.2.attn.o.kernel'"):
        without = {k: v for k, v in params.items() if k != "layers.2.attn.o.kernel"}
        written(tmp_path / "m.gguf", config, without)
    config = config_of("llama", tie_word_embeddings=True)
    with pytest.raises(
        SpecError, match=r"has head\.kernel, for which its architecture"
    ):
        written(tmp_path / "m.gguf", config, params)
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_their_type_are_refused(tmp_path):
    config = config_of("llama", intermediate_size=64)
    params = params_of(config)
    dense = r"token_embd.weight is \[\], expected blocks of q8_0"
    with pytest.raises(SpecError, match=dense):
        written(tmp_path / "m.gguf", config, params, "q8_0")
    packed = packed_of(config, params)
    with pytest.raises(SpecError, match=r"is .*q8_0.*, expected blocks of q4_0"):
        written(tmp_path / "m.gguf", config, packed, "q4_0")
    params["layers.0.attn.q.kernel"] = np.full((32, 32), 1e5, np.float32)
    with pytest.raises(
        SpecError, match=r"attn_q.weight has numbers beyond the largest"
    ):
        written(tmp_path / "m.gguf", config, params, "f16")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_where_asked_for(tmp_path):
    config = config_of("gpt2")
    params = params_of(config)
    path = written(tmp_path / "m.gguf", config, params)
    with pytest.raises(SpecError, match="exists"):
        written(path, config, params)
    written(path, config, params, overwrite=True, more={"general.name": "small"})
    with GGUFCheckpoint(path) as source:
        assert source.metadata["general.name"] == "small"
        assert source.metadata["general.quantization_version"] == 2
        assert source.metadata["tokenizer.ggml.model"] == "no_vocab"
        assert source.kind is None and source.tokenizer_files == {}
        assert source.found == ("40 tensors f32, as the file says",)


def test_parts_are_taken_as_they_come(tmp_path):
    config = config_of("llama")
    params = params_of(config)
    asked = []

    def parts():
        for path, value in params.items():
            asked.append(path)
            yield {path: value}

    write_model(tmp_path / "m.gguf", config, parts(), {}, lambda *_: "f32")
    assert asked == [*params]
    _, read = opened(tmp_path / "m.gguf")
    np.testing.assert_array_equal(
        read["layers.2.mlp.down.kernel"], params["layers.2.mlp.down.kernel"]
    )


def test_one_list_of_divisors_is_rope_freqs(tmp_path):
    rope = Rope(8, kind="longrope", context=64, short_factors=(1.0, 2.0, 3.0, 4.0))
    rope = dataclasses.replace(rope, long_factors=rope.short_factors)
    config = dataclasses.replace(config_of("llama"), ropes=(rope,))
    path = written(tmp_path / "m.gguf", config, params_of(config))
    with GGUFCheckpoint(path) as source:
        assert "rope_freqs.weight" in source._file.tensors
        assert "llama.rope.scaling.type" not in source.metadata
    assert opened(path)[0].ropes == (rope,)

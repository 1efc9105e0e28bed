"""Metadata of GGUF files and their tensors: what they say, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qjax.checkpoint import checkpoint_parts
from qjax.converters.gguf import GGUFCheckpoint
from qjax.converters.gguf_config import config_of
from qjax.converters.gguf_write import write_gguf
from qjax.converters.huggingface import open_checkpoint
from qjax.errors import FormatError, QjaxError, SpecError, UnsupportedError
from qjax.models import ModelConfig
from qjax.models.rope import Rope

from .gguf_models import config_of as model_of
from .gguf_models import opened, params_of, written

TENSORS: dict[str, Any] = {"token_embd.weight": (64, 32), "output.weight": (64, 32)}
OWN = {
    "gpt2": {"attention.layer_norm_epsilon": 1e-5},
    "gptneox": {"attention.layer_norm_epsilon": 1e-5, "use_parallel_residual": True},
}


def values(arch: str = "llama", **changes: Any) -> dict[str, Any]:
    """Metadata of a small model; `__` in a name is a dot, None removes a key."""
    own = {
        "embedding_length": 32,
        "block_count": 3,
        "feed_forward_length": 48,
        "context_length": 64,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-6,
        **OWN.get(arch, {}),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    own = {f"{arch}.{key}": value for key, value in own.items() if value is not None}
    return {"general.architecture": arch, **own}


def read(
    arch: str = "llama", tensors: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    found = TENSORS if tensors is None else TENSORS | tensors
    return ModelConfig.from_hf(config_of(values(arch, **changes), found, "x.gguf"))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "phi3", "gpt2", "gptneox"])
def test_missing_values_have_the_defaults_of_llama_cpp(arch):
    config = read(arch)
    assert (config.heads, config.kv_heads, config.head_dim) == (4, 4, 8)
    assert config.ropes == (() if arch == "gpt2" else (Rope(8, 10000.0, context=64),))
    assert config.windows == () and not config.tied
    tied = config_of(values(arch), {"token_embd.weight": (64, 32)}, "x")
    assert ModelConfig.from_hf(tied).tied
    gelu = {"gpt2": "gelu_tanh", "gptneox": "gelu"}
    assert config.activation == gelu.get(arch, "silu")


def test_defaults_of_gemma():
    config = read("gemma2")
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert config.windows == (4096, None, 4096)
    assert config.attention_scale == 8**-0.5 and config.activation == "gelu_tanh"
    config = read("gemma3", block_count=6, attention__sliding_window=4)
    assert config.windows == (4,) * 5 + (None,)
    assert config.rope_layers == (0,) * 5 + (1,)
    assert config.logit_softcap is None
    assert [rope.theta for rope in config.ropes] == [10000.0, 10000.0]
    config = read("gemma3", rope__freq_base=1e6)
    assert config.windows == () and config.rope_layers == (1, 1, 1)
    assert (
        read("gemma3", block_count=62, embedding_length=40).attention_scale == 0.1**0.5
    )
    config = read("gemma3", final_logit_softcapping=7.0, rope__freq_base_swa=5.0)
    assert (config.logit_softcap, config.ropes[0].theta) == (7.0, 5.0)


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (3, (True, True, False)),
        (1, (False, False, False)),
        (0, (True, True, True)),
        (np.array([False, True, True, False]), (False, True, True)),
    ],
)
def test_patterns_of_windows(pattern, expected):
    changes = {"attention.sliding_window_pattern": pattern}
    config = read("gemma2", attention__sliding_window=4, **changes)
    assert (config.windows or (None,) * 3) == tuple(4 if e else None for e in expected)


ROPES: dict[str, tuple[dict[str, Any], Rope]] = {
    "old": ({"rope__scale_linear": 2.0}, Rope(8, 1e4, "linear", 2.0, 64)),
    "untyped": ({"rope__scaling__factor": 2.0}, Rope(8, 1e4, "linear", 2.0, 64)),
    "none": (
        {"rope__scaling__factor": 2.0, "rope__scaling__type": "none"},
        Rope(8, 1e4, context=64),
    ),
    "one": (
        {"rope__scaling__factor": 1.0, "rope__scaling__type": "linear"},
        Rope(8, 1e4, context=64),
    ),
    "yarn": (
        {
            "rope__scaling__factor": 4.0,
            "rope__scaling__type": "yarn",
            "rope__scaling__original_context_length": 16,
            "rope__scaling__yarn_beta_fast": 16.0,
            "rope__scaling__yarn_beta_slow": 2.0,
            "rope__scaling__yarn_attn_factor": 1.25,
        },
        Rope(8, 1e4, "yarn", 4.0, 16, 1.25, low=2.0, high=16.0),
    ),
}


@pytest.mark.parametrize("case", ROPES)
def test_rotations(case):
    changes, rope = ROPES[case]
    assert read(**changes).ropes == (rope,)


@pytest.mark.parametrize("part, width", [(2, 98), (6, 22), (24, 32), (96, 128)])
def test_as_many_numbers_rotate_as_the_file_says(part, width):
    changes = {"attention.key_length": width, "attention.value_length": width}
    config = read("phi3", rope__dimension_count=part, **changes)
    assert config.ropes[0].dim == part and config.head_dim == width


def test_divisors_of_frequencies():
    short, long = np.float32([1, 2, 3, 4]), np.float32([2, 4, 6, 8])
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    scaling = {"rope__scaling__attn_factor": 1.5}
    scaling["rope__scaling__original_context_length"] = 16
    rope = read("phi3", tensors, **scaling).ropes[0]
    assert (rope.short_factors, rope.long_factors) == (tuple(short), tuple(long))
    assert (rope.context, rope.attention_factor) == (16, 1.5)
    rope = read(tensors={"rope_freqs.weight": short}).ropes[0]
    assert rope.short_factors == rope.long_factors == tuple(short)
    assert rope.attention_factor == 1.0


_FREQS = {"rope_freqs.weight": np.ones(4, np.float32)}
BAD: dict[str, tuple[str, dict[str, Any], type[QjaxError], str]] = {
    "missing": ("llama", {"block_count": None}, FormatError, "'llama.block_count'"),
    "type": ("llama", {"block_count": "3"}, FormatError, "is '3', expected int"),
    "bool": ("llama", {"block_count": True}, FormatError, "is True, expected int"),
    "float": ("llama", {"rope__freq_base": "x"}, FormatError, "expected float"),
    "arch": ("mamba", {}, UnsupportedError, "architecture 'mamba' is not supported"),
    "experts": ("llama", {"expert_count": 8}, UnsupportedError, "8 experts per layer"),
    "causal": ("llama", {"attention__causal": False}, UnsupportedError, "later ones"),
    "heads": ("llama", {"attention__head_count": 0}, FormatError, "0 heads, exp.* 32"),
    "layers": ("llama", {"block_count": 2**31}, FormatError, "layers, exp.* 1 to 8192"),
    "widths": (
        "llama",
        {"attention__value_length": 4},
        UnsupportedError,
        "keys have 8 numbers per head, values 4",
    ),
    "different": (
        "llama",
        {"attention__head_count_kv": np.array([4, 2, 4])},
        UnsupportedError,
        r"head_count_kv differs from layer to layer \(\[2, 4\]\)",
    ),
    "texts": ("llama", {"attention__head_count_kv": ["4"]}, FormatError, "is .'4'"),
    "rotate": ("phi3", {"rope__dimension_count": 10}, FormatError, "10 of 8 numbers"),
    "scaling": (
        "llama",
        {"rope__scaling__type": "ntk"},
        UnsupportedError,
        "rope.scaling.type 'ntk' is not supported; supported: none, linear",
    ),
    "both": (
        "llama",
        {"rope__scaling__factor": 2.0},
        UnsupportedError,
        "of type linear with factor 2 and a list of divisors",
    ),
    "no-list": (
        "qwen2",
        {"rope__scaling__type": "longrope"},
        UnsupportedError,
        "of type longrope with factor 1 and no list of divisors",
    ),
    "attention": (
        "qwen2",
        {"rope__scaling__attn_factor": 2.0},
        UnsupportedError,
        "attn_factor 2 for rotations of type linear",
    ),
    "extrapolation": (
        "qwen2",
        {"rope__scaling__type": "yarn", "rope__scaling__yarn_ext_factor": 0.5},
        UnsupportedError,
        "a factor of extrapolation",
    ),
    "gemma2": (
        "gemma2",
        {"rope__freq_base_swa": 5.0},
        UnsupportedError,
        "freq_base_swa is 5, rope.freq_base 10000",
    ),
    "pattern": (
        "gemma3",
        {"attention__sliding_window_pattern": np.array([True])},
        FormatError,
        "has 1 bool, expected a bool for each of 3 layers",
    ),
    "zero": ("llama", {"embedding_length": 0}, FormatError, "4 heads, expected 1 to 0"),
    "head-dim": ("llama", {"attention__key_length": 0}, QjaxError, "0"),
}


@pytest.mark.parametrize("case", BAD)
def test_metadata_that_do_not_fit_are_refused(case):
    arch, changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        read(arch, _FREQS if case == "both" else None, **changes)


@pytest.mark.parametrize(
    "tensors",
    [
        {"rope_freqs.weight": np.ones((2, 2), np.float32)},
        {"rope_freqs.weight": np.ones(4, np.float16)},
        {"rope_factors_long.weight": np.ones(4, np.float32)},
    ],
)
def test_divisors_that_do_not_fit_are_refused(tensors):
    with pytest.raises(FormatError, match="expected two float32 vectors"):
        read(tensors=tensors)
    wrong = {"rope_freqs.weight": np.ones(3, np.float32)}
    with pytest.raises(SpecError, match="a list of 4 positive numbers"):
        read(tensors=wrong)


def repacked(path: Path, changes: dict[str, Any]) -> Path:
    """Writes a file again with other tensors: name to (type, shape, data) or None."""
    with GGUFCheckpoint(path) as source:
        file = source._file
        tensors = {
            name: (tensor.type, tensor.shape, np.array(file.read(name)))
            for name, tensor in file.tensors.items()
        }
        made = [(n, *t) for n, t in (tensors | changes).items() if t is not None]
        write_gguf(path, file.fields, made, overwrite=True)
    return path


_Q8 = np.zeros((2, 34), np.uint8)
_LINE = np.zeros(32, np.float32)
FILES: dict[str, tuple[str, dict[str, Any], str]] = {
    "absent": (
        "llama",
        {"blk.1.attn_q.weight": None},
        r"1 missing \(model.layers.1.self_attn.q_proj.weight\)",
    ),
    "layer": (
        "llama",
        {"blk.3.attn_norm.weight": ("f32", (32,), _LINE)},
        "1 unexpected .model.layers.3.input_layernorm.weight",
    ),
    "shape": (
        "llama",
        {"output_norm.weight": ("f32", (16,), _LINE[:16])},
        r"model.norm.weight: got \(16,\), expected \(32,\)",
    ),
    "rows": (
        "llama",
        {"blk.0.attn_q.weight": ("f32", (28, 32), np.zeros((28, 32), np.float32))},
        r"got \(28, 32\), expected \(32, 32\)",
    ),
    "numbers": (
        "llama",
        {"output_norm.weight": ("i32", (32,), _LINE.astype(np.int32))},
        "dtype int32, expected a float",
    ),
    "packed-norm": (
        "llama",
        {"output_norm.weight": ("q8_0", (32,), _Q8[0])},
        r"output_norm.weight \[32\] is q8_0; only matrices are read packed",
    ),
    "packed-positions": (
        "gpt2",
        {"position_embd.weight": ("q8_0", (64, 32), np.zeros((64, 34), np.uint8))},
        r"position_embd.weight \[64, 32\] is q8_0; only matrices are read packed",
    ),
    "no-model": ("llama", {"token_embd.weight": None}, "no tensor 'token_embd.weight'"),
}


@pytest.mark.parametrize("case", FILES)
def test_tensors_that_do_not_fit_are_refused(case, tmp_path):
    base, changes, message = FILES[case]
    config = model_of(base)
    path = repacked(written(tmp_path / "m.gguf", config, params_of(config)), changes)
    with pytest.raises(QjaxError, match=message), GGUFCheckpoint(path) as source:
        [*checkpoint_parts(source)]


def test_tensors_of_no_part_are_named_in_a_warning(tmp_path, caplog):
    config = model_of("llama")
    params = params_of(config)
    more = {
        "blk.0.attn_rot_embd": ("f32", (32,), _LINE),
        "blk.00.attn_norm.weight": ("f32", (32,), _LINE),  # not layer 0 once more
    }
    path = repacked(written(tmp_path / "m.gguf", config, params), more)
    _, read = opened(path)
    np.testing.assert_array_equal(
        read["layers.0.attn_norm.scale"], params["layers.0.attn_norm.scale"]
    )
    assert "2 tensors belong to no part of the model" in caplog.text
    with GGUFCheckpoint(path) as source:
        assert {*more} <= {*source.names()} and "blk.0.attn_rot_embd" in source
        np.testing.assert_array_equal(source.read("blk.0.attn_rot_embd"), _LINE)
        with pytest.raises(SpecError, match="no tensor 'x' in the file"):
            source.read("x")


def test_opening(tmp_path):
    config = model_of("llama")
    path = written(tmp_path / "M.GGUF", config, params_of(config))
    with open_checkpoint(path) as source:
        assert isinstance(source, GGUFCheckpoint) and source.directory == path
        assert source.fingerprint() and len(source.source_digest()) == 64
        source.release()
        digest = source.source_digest()
    with GGUFCheckpoint(path) as again:
        assert again.source_digest() == digest
    with pytest.raises(SpecError, match="is a local file, revision 'main' is for"):
        open_checkpoint(path, "main")
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(FormatError, match=r"d\.gguf: is a directory"):
        open_checkpoint(tmp_path / "d.gguf")
    (tmp_path / "e.gguf").write_bytes(b"no")
    with pytest.raises(FormatError, match=r"e\.gguf"):
        open_checkpoint(tmp_path / "e.gguf")

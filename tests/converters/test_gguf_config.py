"""Metadata of GGUF files: what they say, and what is refused."""

from typing import Any

import numpy as np
import pytest

from qjax.converters.gguf_config import config_of
from qjax.converters.gguf_tokenizer import tokenizer_files
from qjax.errors import FormatError, QjaxError, SpecError, UnsupportedError
from qjax.models import ModelConfig
from qjax.models.rope import Rope

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


ODD: list[Any] = [
    *(0, -1, 3, 2**32 - 1, 2**63, True, "", "x", [], ["a"] * 300),
    *(0.0, -3.0, 1e30, float("nan"), float("inf")),
    *(np.int32([]), np.int32([1, 2]), np.ones(3, bool), np.full(300, np.nan)),
]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3", "phi3", "gptneox"])
def test_any_value_is_read_or_refused(arch):
    rope = dict.fromkeys(("type", "factor", "attn_factor", "yarn_beta_fast"), 1.0)
    more = {f"rope__scaling__{key}": value for key, value in rope.items()}
    more |= {"attention__sliding_window": 4, "attention__sliding_window_pattern": 2}
    more |= {"attention__key_length": 8, "rope__freq_base": 1e4, "expert_count": 0}
    more |= {"attention__causal": True, "attn_logit_softcapping": 2.0}
    more |= {"rope__dimension_count": 8, "rope__scale_linear": 1.0}
    more |= {"hidden_activation": "gelu", "rope__freq_base_swa": 1e4}
    metadata = values(arch, **more, **{"rope.scaling.type": "yarn"})
    metadata |= {f"tokenizer.ggml.{key}": v for key, v in _SPM.items()}
    refused = 0
    for key in metadata:
        for value in ODD:
            changed = metadata | {key: value}
            try:
                ModelConfig.from_hf(config_of(changed, TENSORS, "x.gguf"))
                tokenizer_files(changed, "x.gguf")
            except QjaxError as error:
                refused += "x.gguf" in str(error) or "config" in str(error)
    assert refused > 200


_SPM = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"],
    "token_type": np.int32([2, 3, 3, 1, 1, 1]),
    "scores": np.float32([0, 0, 0, -2, -3, -1]),
    "bos_token_id": 1,
    "add_bos_token": True,
    "add_space_prefix": True,
}

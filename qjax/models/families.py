"""How each supported architecture's `config.json` maps to a `ModelConfig`.

One small reader per family, with the defaults that transformers gives to absent keys.
Options that would change the computation and are not built raise `UnsupportedError`,
and so do architectures that are not listed; code that a file names is never run.
"""

import dataclasses
import difflib
import logging
import math
from collections.abc import Callable
from typing import Any

from qjax.errors import SpecError, UnsupportedError
from qjax.models.config import ModelConfig
from qjax.models.reader import ConfigReader
from qjax.models.rope import Rope, read_rope
from qjax.models.shared import (
    MAX_DIM,
    read_activation,
    read_single_rope,
    read_sizes,
    read_windows,
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: its class name in transformers and its configuration reader."""

    architecture: str
    read: Callable[[ConfigReader], ModelConfig]


def _llama(r: ConfigReader) -> ModelConfig:
    sizes = read_sizes(r, context=2048)
    bias = r.flag("attention_bias", default=False, null=False)
    return ModelConfig(
        family="llama",
        **sizes,
        norm_eps=r.number("rms_norm_eps", high=1.0, default=1e-6),
        ropes=(read_single_rope(r, sizes),),
        attention_scale=sizes["head_dim"] ** -0.5,
        activation=read_activation(r, "hidden_act", default="silu"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=r.flag("mlp_bias", default=False, null=False),
        tied=r.flag("tie_word_embeddings", default=False),
    )


def _mistral(r: ConfigReader) -> ModelConfig:
    sizes = read_sizes(r, kv_heads=8, context=131072)
    window = r.integer("sliding_window", default=4096, null=None)
    return ModelConfig(
        family="mistral",
        **sizes,
        norm_eps=r.number("rms_norm_eps", high=1.0, default=1e-6),
        ropes=(read_single_rope(r, sizes),),
        windows=() if window is None else (window,) * sizes["layers"],
        attention_scale=sizes["head_dim"] ** -0.5,
        activation=read_activation(r, "hidden_act", default="silu"),
        tied=r.flag("tie_word_embeddings", default=False),
    )


def _qwen(r: ConfigReader, family: str) -> ModelConfig:
    third = family == "qwen3"
    sizes = read_sizes(r, kv_heads=32, head_dim=128 if third else None, context=32768)
    window = None
    if r.flag("use_sliding_window", default=False, null=False):
        window = r.integer("sliding_window", default=4096, null=None)
    first = r.integer("max_window_layers", low=0, default=28)
    bias = r.flag("attention_bias", default=False) if third else False
    return ModelConfig(
        family=family,
        **sizes,
        norm_eps=r.number("rms_norm_eps", high=1.0, default=1e-6),
        qk_norm=third,
        ropes=(read_single_rope(r, sizes),),
        windows=read_windows(r, sizes["layers"], window, lambda i: i >= first),
        attention_scale=sizes["head_dim"] ** -0.5,
        activation=read_activation(r, "hidden_act", default="silu"),
        qkv_bias=bias if third else True,
        out_bias=bias,
        tied=r.flag("tie_word_embeddings", default=False),
    )


def _gemma(r: ConfigReader, family: str) -> ModelConfig:
    third = family == "gemma3_text"
    if r.flag("use_bidirectional_attention", default=False, null=False):
        raise UnsupportedError(
            f"{r.where}: 'use_bidirectional_attention' is true; qjax runs causal "
            "decoders only"
        )
    context = 131072 if third else 8192
    sizes = read_sizes(r, kv_heads=4, head_dim=256, context=context)
    every = r.integer("sliding_window_pattern", default=6) if third else 2
    window = r.integer("sliding_window", default=4096, null=None)
    windows = read_windows(r, sizes["layers"], window, lambda i: (i + 1) % every != 0)
    softcap = r.number(
        "attn_logit_softcapping", default=None if third else 50.0, null=None
    )
    if third and softcap is not None:
        raise UnsupportedError(
            f"{r.where}: 'attn_logit_softcapping' is {softcap}; Gemma 3 has none"
        )
    scalar = r.number("query_pre_attn_scalar", default=256.0)
    bias = r.flag("attention_bias", default=False, null=False)
    ropes = _gemma3_ropes(r, sizes) if third else (read_single_rope(r, sizes),)
    kinds = r.texts("layer_types", sizes["layers"], tuple(_LAYER_TYPES))
    kinds = kinds or tuple(
        _LAYER_TYPES[(i + 1) % every == 0] for i in range(sizes["layers"])
    )
    return ModelConfig(
        family=family,
        **sizes,
        norm_eps=r.number("rms_norm_eps", high=1.0, default=1e-6),
        norm_offset=1.0,
        post_norms=True,
        qk_norm=third,
        ropes=ropes,
        rope_layers=tuple(_LAYER_TYPES.index(k) for k in kinds) if third else (),
        windows=windows,
        attention_scale=scalar**-0.5,
        attention_softcap=softcap,
        logit_softcap=r.number(
            "final_logit_softcapping", default=None if third else 30.0, null=None
        ),
        activation=read_activation(
            r, "hidden_activation", "hidden_act", default="gelu_pytorch_tanh"
        ),
        qkv_bias=bias,
        out_bias=bias,
        tied=r.flag("tie_word_embeddings", default=True),
        embed_scale=math.sqrt(sizes["dim"]),
    )


_LAYER_TYPES = ("sliding_attention", "full_attention")


def _gemma3_ropes(r: ConfigReader, sizes: dict[str, Any]) -> tuple[Rope, Rope]:
    """Reads the local and the global rotary table, old or new spelling."""
    new = r.table("rope_parameters") or ConfigReader({})
    new.where = f"{r.where}: rope_parameters"
    common = {"dim": sizes["head_dim"], "context": sizes["max_context"]}
    local = read_rope(
        new.table("sliding_attention"),
        theta=r.number("rope_local_base_freq", default=1e4),
        **common,
    )
    everywhere = read_rope(
        r.table("rope_scaling") or new.table("full_attention"),
        theta=r.number("rope_theta", default=1e6),
        **common,
    )
    return local, everywhere


def _phi3(r: ConfigReader) -> ModelConfig:
    sizes = read_sizes(r, context=4096)
    window = r.integer("sliding_window", default=None)
    known = "original_max_position_embeddings"
    data = {**r.data, known: r.integer(known, default=4096)}
    for key in ("rope_scaling", "rope_parameters"):
        table = data.get(key)
        if isinstance(table, dict):
            kind = table.get("rope_type", table.get("type", "default"))
            kind = "longrope" if kind in ("su", "yarn") else kind
            data[key] = {**table, "rope_type": kind, known: data[known]}
    return ModelConfig(
        family="phi3",
        **sizes,
        norm_eps=r.number("rms_norm_eps", high=1.0, default=1e-5),
        ropes=(read_single_rope(ConfigReader(data, r.where), sizes, part=1.0),),
        windows=() if window is None else (window,) * sizes["layers"],
        attention_scale=sizes["head_dim"] ** -0.5,
        activation=read_activation(r, "hidden_act", default="silu"),
        tied=r.flag("tie_word_embeddings", default=False),
    )


def _gpt_neox(r: ConfigReader) -> ModelConfig:
    sizes = read_sizes(r, context=2048)
    sizes["kv_heads"] = sizes["heads"]
    bias = r.flag("attention_bias", default=True)
    return ModelConfig(
        family="gpt_neox",
        **sizes,
        norm="layer",
        norm_eps=r.number("layer_norm_eps", high=1.0, default=1e-5),
        parallel_residual=r.flag("use_parallel_residual", default=True),
        ropes=(read_single_rope(r, sizes, part=0.25),),
        attention_scale=sizes["head_dim"] ** -0.5,
        activation=read_activation(r, "hidden_act", default="gelu"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        tied=r.flag("tie_word_embeddings", default=False),
    )


def _gpt2(r: ConfigReader) -> ModelConfig:
    if r.flag("add_cross_attention", default=False, null=False):
        raise UnsupportedError(
            f"{r.where}: 'add_cross_attention' is true; qjax runs decoders without "
            "an encoder only"
        )
    width = r.integer("n_embd", "hidden_size", high=MAX_DIM)
    inner = r.integer("n_inner", high=2**24, default=4 * width, null=4 * width)
    filled = ConfigReader({**r.data, "n_inner": inner}, r.where)
    sizes = read_sizes(filled, mlp=("n_inner",), context=1024)
    scaled = r.flag("scale_attn_weights", default=True)
    return ModelConfig(
        family="gpt2",
        **sizes,
        norm="layer",
        norm_eps=r.number("layer_norm_epsilon", high=1.0, default=1e-5),
        attention_scale=sizes["head_dim"] ** -0.5 if scaled else 1.0,
        attention_scale_by_layer=r.flag(
            "scale_attn_by_inverse_layer_idx", default=False
        ),
        activation=read_activation(r, "activation_function", default="gelu_new"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=r.flag("tie_word_embeddings", default=True),
    )


def _opt(r: ConfigReader) -> ModelConfig:
    sizes = read_sizes(r, mlp=("ffn_dim",), context=2048)
    width = r.integer("word_embed_proj_dim", default=sizes["dim"], null=sizes["dim"])
    if width != sizes["dim"]:
        raise UnsupportedError(
            f"{r.where}: 'word_embed_proj_dim' ({width}) differs from 'hidden_size' "
            f"({sizes['dim']}); projected embeddings are not supported"
        )
    before = r.flag("do_layer_norm_before", default=True)
    bias = r.flag("enable_bias", default=True)
    return ModelConfig(
        family="opt",
        **sizes,
        norm="layer",
        norm_eps=1e-5,
        norm_affine=r.flag("layer_norm_elementwise_affine", default=True),
        norm_after=not before,
        final_norm=before and not r.flag("_remove_final_layer_norm", default=False),
        position_offset=2,
        attention_scale=sizes["head_dim"] ** -0.5,
        activation=read_activation(r, "activation_function", default="relu"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied=r.flag("tie_word_embeddings", default=True),
    )


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama),
    "mistral": Family("MistralForCausalLM", _mistral),
    "qwen2": Family("Qwen2ForCausalLM", lambda r: _qwen(r, "qwen2")),
    "qwen3": Family("Qwen3ForCausalLM", lambda r: _qwen(r, "qwen3")),
    "gemma2": Family("Gemma2ForCausalLM", lambda r: _gemma(r, "gemma2")),
    "gemma3_text": Family("Gemma3ForCausalLM", lambda r: _gemma(r, "gemma3_text")),
    "phi3": Family("Phi3ForCausalLM", _phi3),
    "gpt_neox": Family("GPTNeoXForCausalLM", _gpt_neox),
    "gpt2": Family("GPT2LMHeadModel", _gpt2),
    "opt": Family("OPTForCausalLM", _opt),
}
"""Supported architectures by `model_type`."""


def read_config(reader: ConfigReader) -> ModelConfig:
    """Reads a configuration of any supported family; see `ModelConfig.from_hf`."""
    for key in ("auto_map", "trust_remote_code"):
        if reader.data.get(key):
            _log.warning(
                "config.json: %r names code to run; qjax ignores it and uses its own "
                "implementation",
                key,
            )
    return FAMILIES[_family(reader)].read(reader)


def _family(reader: ConfigReader) -> str:
    """Returns the family of a configuration, or says what is supported."""
    names = reader.data.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise reader.bad("architectures", names, "a list of class names")
    kind = reader.text("model_type", default=None)
    by_class = {f.architecture.lower(): n for n, f in FAMILIES.items()}
    known = [by_class[n.lower()] for n in names if n.lower() in by_class]
    if names and not known:
        raise _unsupported("architecture", names[0], [*_classes()])
    if kind is None and not known:
        raise SpecError(
            "config.json: neither 'model_type' nor 'architectures' is present; "
            "expected at least one of them"
        )
    if kind is not None and kind not in FAMILIES:
        raise _unsupported("model_type", kind, [*FAMILIES])
    return kind if kind is not None else known[0]


def _classes() -> list[str]:
    return [family.architecture for family in FAMILIES.values()]


def _unsupported(what: str, name: str, supported: list[str]) -> UnsupportedError:
    lower = {s.lower(): s for s in supported}
    near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.6)
    hint = f" Nearest: {', '.join(lower[n] for n in near)}." if near else ""
    return UnsupportedError(
        f"config.json: {what} {name!r} is not supported.{hint} "
        f"Supported: {', '.join(supported)}"
    )

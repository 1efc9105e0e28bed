"""What the metadata of a GGUF file says, as the `config.json` of transformers.

Every architecture of GGUF has a table of keys `ARCH.key`; `config_of` writes what
`qjax.models.ModelConfig.from_hf` reads, so one reader decides what is supported. Keys
that are missing have the defaults of llama.cpp.

Not in metadata is what an MLP computes: that is what each architecture had first, with
the tanh form of GELU in all but GPT-NeoX, where llama.cpp computes that form of the
exact one, too.

Windows of Phi-3 are obeyed, as in transformers; llama.cpp leaves them out.

Reference: gguf.md of ggml, "Standardized key-value pairs"; llama.cpp `llama-model.cpp`,
`load_hparams`, and `src/models/` there.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.gguf_metadata import Metadata
from qjax.converters.gguf_rope import rotations
from qjax.errors import FormatError, UnsupportedError

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "gptneox": ("gpt_neox", "GPTNeoXForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
}
"""`general.architecture` to `model_type` and class in transformers."""
_ACTIVATIONS = {
    "gemma2": ("hidden_activation", "gelu_pytorch_tanh"),
    "gemma3_text": ("hidden_activation", "gelu_pytorch_tanh"),
    "gpt2": ("activation_function", "gelu_new"),
    "gpt_neox": ("hidden_act", "gelu"),
}
"""Key of what MLPs compute, and what that is where a file does not say it."""
_EPSILONS = {"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"}
MAX_LAYERS = 8192
GEMMA_27B = {("gemma2", 46), ("gemma3", 62)}
"""The size whose queries are scaled by the mean width of a head, not the real one."""


def config_of(
    values: Mapping[str, Any], tensors: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The `config.json` of a GGUF model.

    Args:
      values: metadata by key.
      tensors: shapes of all tensors by name, and whole those that belong to the
        configuration (`SMALL`); a missing `output.weight` means a tied head.
      where: what errors call the file.

    Raises:
      UnsupportedError: the architecture, or an option of it, is not supported.
      FormatError: a value is missing or of another type.
    """
    meta = Metadata(values, where)
    arch = meta.architecture
    if arch not in ARCHITECTURES:
        raise UnsupportedError(
            f"{where}: architecture {arch!r:.100} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    family, name = ARCHITECTURES[arch]
    _check(meta)
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [name],
        "vocab_size": int(tensors["token_embd.weight"][0]),
        **_sizes(meta),
        "rope_theta": meta.get("ARCH.rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    kind = "layer_norm" if family in _EPSILONS else "layer_norm_rms"
    epsilon = meta.get(f"ARCH.attention.{kind}_epsilon", float)
    config[_EPSILONS.get(family, "rms_norm_eps")] = epsilon
    key, usual = _ACTIVATIONS.get(family, ("hidden_act", "silu"))
    config[key] = meta.get("ARCH.hidden_activation", str, usual)
    config |= rotations(meta, tensors, config)
    for key, own in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        found = f"tokenizer.ggml.{own}_token_id"
        if found in values:
            config[key] = meta.get(found, int)
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    if family == "gpt_neox":
        biases = {"attention_bias": "blk.0.attn_qkv.bias"}
    if family in ("llama", "qwen3", "gpt_neox"):
        config |= {key: tensor in tensors for key, tensor in biases.items()}
    return config | _own(meta, family, config)


def _check(meta: Metadata) -> None:
    """Refuses options that no family here has."""
    experts = meta.number("ARCH.expert_count", 0)
    if experts:
        raise UnsupportedError(
            f"{meta.where}: has {experts} experts per layer; mixtures of experts are "
            "not supported"
        )
    if not meta.get("ARCH.attention.causal", bool, True):
        raise UnsupportedError(
            f"{meta.where}: its tokens attend to later ones, too; only decoders are "
            "supported"
        )


def _sizes(meta: Metadata) -> dict[str, int]:
    """Widths and counts."""
    dim, heads = (
        meta.number("ARCH.embedding_length"),
        meta.number("ARCH.attention.head_count"),
    )
    layers = meta.number("ARCH.block_count")
    for what, value, most in (("heads", heads, dim), ("layers", layers, MAX_LAYERS)):
        if not 1 <= value <= most:
            raise FormatError(f"{meta.where}: has {value} {what}, expected 1 to {most}")
    width = meta.number("ARCH.attention.key_length", dim // heads)
    other = meta.number("ARCH.attention.value_length", width)
    if other != width:
        raise UnsupportedError(
            f"{meta.where}: keys have {width} numbers per head, values {other}; they "
            "need to be alike"
        )
    return {
        "hidden_size": dim,
        "intermediate_size": meta.number("ARCH.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.number("ARCH.attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": meta.number("ARCH.context_length"),
    }


def _own(meta: Metadata, family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of one family, beside those that all share."""
    if family == "phi3":
        window = meta.number("ARCH.attention.sliding_window", 0)
        return {"sliding_window": window or None}
    if family.startswith("gemma"):
        return _gemma(meta, family, config)
    if family == "gpt_neox":
        return {
            "use_parallel_residual": meta.get("ARCH.use_parallel_residual", bool),
            "rotary_pct": config.get("partial_rotary_factor", 1.0),
            "rotary_emb_base": config["rope_theta"],
        }
    if family == "gpt2":
        return {
            "n_embd": config["hidden_size"],
            "n_layer": config["num_hidden_layers"],
            "n_head": config["num_attention_heads"],
            "n_positions": config["max_position_embeddings"],
            "n_inner": config["intermediate_size"],
        }
    return {}


def _gemma(meta: Metadata, family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Scale, windows and bounds of Gemma 2 and 3."""
    third = family == "gemma3_text"
    layers, base = config["num_hidden_layers"], config["rope_theta"]
    mean = config["hidden_size"] // config["num_attention_heads"]
    wide = (meta.architecture, layers) in GEMMA_27B
    window = meta.number("ARCH.attention.sliding_window", 0 if third else 4096)
    slides = _slides(meta, layers, 6 if third else 2, window)
    local = meta.get("ARCH.rope.freq_base_swa", float, 10000.0 if third else base)
    if not third and local != base:
        raise UnsupportedError(
            f"{meta.where}: rope.freq_base_swa is {local:g}, rope.freq_base {base:g}; "
            "layers of Gemma 2 rotate alike"
        )
    own: dict[str, Any] = {
        "query_pre_attn_scalar": mean if wide else config["head_dim"],
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in slides],
    }
    if third:
        own["rope_local_base_freq"] = local
    for key, usual in (("attn", 50.0), ("final", 30.0)):
        key = f"{key}_logit_softcapping"
        own[key] = meta.get(f"ARCH.{key}", float, 0.0 if third else usual) or None
    return own


def _slides(meta: Metadata, layers: int, usual: int, window: int) -> list[bool]:
    """Which layers have a window: all but every n-th, or as a list says."""
    key = meta.key("ARCH.attention.sliding_window_pattern")
    value = meta.values.get(key)
    if isinstance(value, np.ndarray):
        if value.dtype != bool or len(value) < layers:
            raise FormatError(
                f"{meta.where}: {key} has {len(value)} {value.dtype}, expected a bool "
                f"for each of {layers} layers"
            )
        slides = [bool(v) for v in value[:layers]]
    else:
        every = meta.number(key, usual)
        slides = [every <= 0 or (i + 1) % every != 0 for i in range(layers)]
    return [slide and window > 0 for slide in slides]

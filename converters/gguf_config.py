"""What the metadata of a GGUF file says, as the `config.json` of transformers.

Every architecture of GGUF has a table of keys `ARCH.key`; `config_of` writes what
`qjax.models.ModelConfig.from_hf` reads, so one reader decides what is supported.

Not in metadata: the scaling of Llama 3.1's rotations, whose divisors are the tensor
`rope_freqs.weight`, and Phi-3's two lists of divisors. They become `longrope` with
these numbers, an attention factor of 1 unless the file states one.

Reference: gguf.md of ggml, "Standardized key-value pairs"; llama.cpp `llama-model.cpp`,
`load_hparams`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

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
SMALL = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are part of the configuration."""
_GEMMA_27B = {("gemma2", 46), ("gemma3", 62)}
"""The size whose queries are scaled by the mean width of a head, not the real one."""


class Metadata:
    """Typed look-ups in the metadata of one file.

    Args:
      values: metadata by key.
      where: what errors call the file.

    Attributes:
      architecture: `general.architecture`.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self.architecture: str = self.get("general.architecture", str)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value; `ARCH.` in front of a key stands for the architecture.

        Raises:
          FormatError: it is missing without a default, or of another type.
        """
        key = key.replace("ARCH", getattr(self, "architecture", ""), 1)
        value = self.values.get(key, default)
        if value is None:
            raise FormatError(f"{self.where}: has no metadata {key!r}")
        whole = kind is float and type(value) is int
        if type(value) is not kind and not whole:
            raise FormatError(
                f"{self.where}: metadata {key!r} is {value!r:.100}, expected "
                f"{kind.__name__}"
            )
        return kind(value)

    def number(self, key: str, default: Any = None) -> int:
        """An integer that may be a list with one entry per layer, all alike.

        Raises:
          FormatError: see `get`.
          UnsupportedError: layers differ.
        """
        full = key.replace("ARCH", self.architecture, 1)
        value = self.values.get(full)
        if isinstance(value, np.ndarray | list):
            different = sorted({int(v) for v in value})
            if len(different) != 1:
                raise UnsupportedError(
                    f"{self.where}: {full} differs from layer to layer "
                    f"({different[:8]}); models here have equal layers"
                )
            return different[0]
        return self.get(key, int, default)

    def has(self, key: str) -> bool:
        """Whether there is such a value."""
        return key.replace("ARCH", self.architecture, 1) in self.values


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
    if meta.has("ARCH.expert_count") and meta.number("ARCH.expert_count"):
        raise UnsupportedError(
            f"{where}: has {meta.number('ARCH.expert_count')} experts per layer; "
            "mixtures of experts are not supported"
        )
    dim, heads = meta.number("ARCH.embedding_length"), _heads(meta)
    width = meta.number("ARCH.attention.key_length", dim // heads)
    if meta.number("ARCH.attention.value_length", width) != width:
        raise UnsupportedError(f"{where}: keys and values differ in width")
    rope = meta.number("ARCH.rope.dimension_count", width)
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [name],
        "vocab_size": int(tensors["token_embd.weight"][0]),
        "hidden_size": dim,
        "intermediate_size": meta.number("ARCH.feed_forward_length"),
        "num_hidden_layers": meta.number("ARCH.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.number("ARCH.attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": meta.number("ARCH.context_length"),
        "rope_theta": meta.get("ARCH.rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    epsilon = "layer_norm" if family in ("gpt2", "gpt_neox") else "layer_norm_rms"
    eps = meta.get(f"ARCH.attention.{epsilon}_epsilon", float)
    keys = {"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"}
    config[keys.get(family, "rms_norm_eps")] = eps
    if rope != width:
        config["partial_rotary_factor"] = rope / width
    scaling = _scaling(meta, tensors)
    if scaling:
        config["rope_scaling"] = scaling
    for key, own in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        found = f"tokenizer.ggml.{own}_token_id"
        if found in values:
            config[key] = meta.get(found, int)
    biases = {
        "attention_bias": "blk.0.attn_q.bias",
        "mlp_bias": "blk.0.ffn_up.bias",
    }
    if family in ("llama", "qwen3", "gpt_neox"):
        if family == "gpt_neox":
            biases = {"attention_bias": "blk.0.attn_qkv.bias"}
        config |= {key: tensor in tensors for key, tensor in biases.items()}
    return config | _own(meta, family, config)


def _heads(meta: Metadata) -> int:
    heads = meta.number("ARCH.attention.head_count")
    if heads < 1:
        raise FormatError(f"{meta.where}: {heads} attention heads, expected 1 or more")
    return heads


def _scaling(meta: Metadata, tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling`, from tensors of divisors or from metadata."""
    context = meta.number("ARCH.context_length")
    original = meta.number("ARCH.rope.scaling.original_context_length", context)
    short, long = (tensors.get(f"rope_factors_{n}.weight") for n in ("short", "long"))
    if short is None or long is None:
        short = long = tensors.get("rope_freqs.weight")
    kind = meta.get("ARCH.rope.scaling.type", str, "none")
    if short is not None and long is not None:
        return {
            "rope_type": "longrope",
            "short_factor": [float(v) for v in short],
            "long_factor": [float(v) for v in long],
            "attention_factor": meta.get("ARCH.rope.scaling.attn_factor", float, 1.0),
            "original_max_position_embeddings": original,
        }
    if kind == "none":
        return None
    factor = meta.get("ARCH.rope.scaling.factor", float)
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(
            f"{meta.where}: rope.scaling.type {kind!r:.100} is not supported; "
            "supported: none, linear, yarn"
        )
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = original
    return scaling


def _own(meta: Metadata, family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of one family, beside those that all share."""
    own: dict[str, Any] = {}
    window = meta.number("ARCH.attention.sliding_window", 0)
    if family == "phi3" and window:
        own["sliding_window"] = window
    if family.startswith("gemma"):
        layers, dim = config["num_hidden_layers"], config["hidden_size"]
        mean = dim // config["num_attention_heads"]
        wide = (meta.architecture, layers) in _GEMMA_27B
        own["query_pre_attn_scalar"] = mean if wide else config["head_dim"]
        own["sliding_window"] = window or None
    if family == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            own[key] = meta.get(f"ARCH.{key}", float)
    if family == "gemma3_text":
        own["sliding_window_pattern"] = meta.number(
            "ARCH.attention.sliding_window_pattern", 6
        )
        own["final_logit_softcapping"] = None
        base = meta.get("ARCH.rope.freq_base_swa", float, 10000.0)
        own["rope_local_base_freq"] = base
    if family == "gpt_neox":
        part = config.get("partial_rotary_factor", 1.0)
        own["use_parallel_residual"] = meta.get("ARCH.use_parallel_residual", bool)
        own["rotary_pct"] = part
        own["rotary_emb_base"] = config["rope_theta"]
    if family == "gpt2":
        own |= {
            "n_embd": config["hidden_size"],
            "n_layer": config["num_hidden_layers"],
            "n_head": config["num_attention_heads"],
            "n_positions": config["max_position_embeddings"],
            "n_inner": config["intermediate_size"],
        }
    return own

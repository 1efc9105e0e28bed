"""Writing a model as a GGUF file that llama.cpp loads: metadata, names, order of rows.

`metadata_of` is the inverse of `gguf_config.config_of`, `gguf_names.places` says where
rows go, `gguf_vocab` writes the tokenizer. What llama.cpp's graph of an architecture
does not compute is refused: biases it does not read, windows it does not slide (these
are reported, as its own conversion leaves them out too), other scales of attention.
"""

import logging
import math
from typing import Any

import numpy as np

from qjax.converters.gguf_config import ARCHITECTURES, GEMMA_27B
from qjax.converters.gguf_metadata import f32, u32
from qjax.converters.gguf_rope import rope_metadata
from qjax.errors import UnsupportedError
from qjax.models import ModelConfig

_log = logging.getLogger(__name__)
_NAMES = {family: arch for arch, (family, _) in ARCHITECTURES.items()}
_NAMES["mistral"] = "llama"
_BIASES = {
    "llama": {"qkv_bias", "out_bias", "mlp_bias"},
    "qwen2": {"qkv_bias"},
    "gptneox": {"qkv_bias", "out_bias", "mlp_bias"},
    "gpt2": {"qkv_bias", "out_bias", "mlp_bias"},
}
"""Biases that llama.cpp reads; but for those of llama, it needs them."""
_ACTIVATIONS = {
    **dict.fromkeys(("gemma2", "gemma3", "gpt2"), ("gelu_tanh",)),
    "gptneox": ("gelu", "gelu_tanh"),
}
_SQUARE = ("qwen2", "phi3", "gptneox", "gpt2")
"""Architectures whose heads are as wide together as the model."""


def family_of(config: ModelConfig) -> str:
    """`model_type` under which a model is read back: `mistral` becomes `llama`.

    Raises:
      UnsupportedError: llama.cpp has no such architecture.
    """
    if config.family not in _NAMES:
        raise UnsupportedError(
            f"GGUF: llama.cpp has no architecture for {config.family!r}; it has "
            f"{', '.join(sorted(_NAMES))}"
        )
    return ARCHITECTURES[_NAMES[config.family]][0]


def metadata_of(config: ModelConfig, name: str) -> dict[str, Any]:
    """Metadata that describe the architecture, in the order of the file.

    Args:
      config: the model.
      name: of the model.

    Raises:
      UnsupportedError: llama.cpp computes something else, or has no such architecture.
    """
    family_of(config)
    arch = _NAMES[config.family]
    _check(config, arch)
    own: dict[str, Any] = {
        "context_length": u32(config.max_context),
        "embedding_length": u32(config.dim),
        "block_count": u32(config.layers),
        "feed_forward_length": u32(config.mlp_dim),
        "attention.head_count": u32(config.heads),
        "attention.head_count_kv": u32(config.kv_heads),
        "vocab_size": u32(config.vocab_size),
    }
    kind = "layer_norm" if config.norm == "layer" else "layer_norm_rms"
    own[f"attention.{kind}_epsilon"] = f32(config.norm_eps)
    if config.ropes:
        own["attention.key_length"] = u32(config.head_dim)
        own["attention.value_length"] = u32(config.head_dim)
        own |= rope_metadata(config, arch)
    for key, value in (
        ("attn_logit_softcapping", config.attention_softcap),
        ("final_logit_softcapping", config.logit_softcap),
    ):
        if value is not None:
            own[key] = f32(value)
    if arch == "gptneox":
        own["use_parallel_residual"] = config.parallel_residual
        if config.activation == "gelu_tanh":  # which llama.cpp computes anyway
            own["hidden_activation"] = "gelu_pytorch_tanh"
    own |= _windows(config, arch)
    first = {"general.architecture": arch, "general.type": "model"}
    first |= {"general.name": name} if name else {}
    return {**first, **{f"{arch}.{key}": value for key, value in own.items()}}


def _check(config: ModelConfig, arch: str) -> None:
    """Refuses what the architecture of llama.cpp does not compute."""
    for name in ("qkv_bias", "out_bias", "mlp_bias"):
        has, known = getattr(config, name), name in _BIASES.get(arch, set())
        if has != known and not (known and arch == "llama"):
            raise UnsupportedError(
                f"GGUF: llama.cpp {'needs a' if known else 'reads no'} "
                f"{name.replace('_', ' ')} in {arch!r}, this model has "
                f"{'one' if has else 'none'}"
            )
    known = _ACTIVATIONS.get(arch, ("silu",))
    if config.activation not in known:
        raise UnsupportedError(
            f"GGUF: llama.cpp computes {known[0]} in {arch!r}, this model "
            f"{config.activation}"
        )
    if arch in _SQUARE and config.q_dim != config.dim:
        raise UnsupportedError(
            f"GGUF: llama.cpp expects heads of {config.dim} numbers together in "
            f"{arch!r}, this model's have {config.q_dim}"
        )
    if config.tied != (arch == "gemma2") and arch in ("gptneox", "gemma2"):
        raise UnsupportedError(
            f"GGUF: llama.cpp {'needs a' if config.tied else 'reads no'} head of its "
            f"own in {arch!r}"
        )
    if arch == "gemma2" and None in (config.attention_softcap, config.logit_softcap):
        raise UnsupportedError(
            "GGUF: llama.cpp bounds scores and logits in 'gemma2', this model does not"
        )
    _check_scale(config, arch)


def _check_scale(config: ModelConfig, arch: str) -> None:
    """Refuses scores that are scaled otherwise than a reader will assume."""
    if config.attention_scale_by_layer:
        raise UnsupportedError(
            "GGUF: llama.cpp does not scale scores layer by layer; this model does"
        )
    wide = (arch, config.layers) in GEMMA_27B
    known = config.dim // config.heads if wide else config.head_dim
    scale = config.attention_scale**-2
    if not math.isclose(scale, known, rel_tol=1e-6):
        raise UnsupportedError(
            f"GGUF: llama.cpp divides scores by the square root of {known} in "
            f"{arch!r}, this model by that of {scale:g}"
        )


def _windows(config: ModelConfig, arch: str) -> dict[str, Any]:
    """Keys of sliding windows."""
    slides = [window is not None for window in config.windows]
    sizes = {window for window in config.windows if window is not None}
    local = [index == 0 for index in config.rope_layers]
    if arch == "gemma3" and local != (slides or [False] * config.layers):
        raise UnsupportedError(
            "GGUF: llama.cpp rotates layers with windows by the local base and others "
            f"by the global one; this model's windows are {list(config.windows)}, its "
            f"bases {[config.ropes[i].theta for i in config.rope_layers]}"
        )
    if not sizes:
        if arch == "gemma2":
            raise UnsupportedError("GGUF: llama.cpp expects windows in 'gemma2'")
        return {}
    if not arch.startswith("gemma"):
        _log.warning(
            "GGUF: llama.cpp slides no windows in %r; the window of %d tokens changes "
            "what this model computes for longer texts",
            arch,
            max(sizes),
        )
    if arch not in ("phi3", "gemma2", "gemma3"):
        return {}
    own: dict[str, Any] = {"attention.sliding_window": u32(max(sizes))}
    every = next((i for i, slide in enumerate(slides, 1) if not slide), len(slides) + 1)
    if arch != "phi3" and slides == [i % every != 0 for i in range(1, len(slides) + 1)]:
        own["attention.sliding_window_pattern"] = u32(every)
    elif arch != "phi3":
        own["attention.sliding_window_pattern"] = np.array(slides)
    return own

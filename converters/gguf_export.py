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

from qjax.converters.gguf_config import ARCHITECTURES
from qjax.converters.gguf_layout import Value
from qjax.errors import UnsupportedError
from qjax.models import ModelConfig
from qjax.models.rope import Rope, frequencies

_log = logging.getLogger(__name__)
_NAMES = {family: arch for arch, (family, _) in ARCHITECTURES.items()}
_NAMES["mistral"] = "llama"
_BIASES = {"llama": "qkv_bias out_bias mlp_bias", "qwen2": "qkv_bias"}


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
    number, real = (lambda v: Value("u32", int(v))), (lambda v: Value("f32", float(v)))
    own: dict[str, Any] = {
        "context_length": number(config.max_context),
        "embedding_length": number(config.dim),
        "block_count": number(config.layers),
        "feed_forward_length": number(config.mlp_dim),
        "attention.head_count": number(config.heads),
        "attention.head_count_kv": number(config.kv_heads),
        "vocab_size": number(config.vocab_size),
    }
    kind = "layer_norm" if config.norm == "layer" else "layer_norm_rms"
    own[f"attention.{kind}_epsilon"] = real(config.norm_eps)
    if config.ropes:
        own["attention.key_length"] = number(config.head_dim)
        own["attention.value_length"] = number(config.head_dim)
        own |= _rope(config, number, real)
    for key, value in (
        ("attn_logit_softcapping", config.attention_softcap),
        ("final_logit_softcapping", config.logit_softcap),
    ):
        if value is not None:
            own[key] = real(value)
    if arch == "gptneox":
        own["use_parallel_residual"] = config.parallel_residual
    own |= _windows(config, arch, number)
    first = {"general.architecture": arch, "general.type": "model"}
    first |= {"general.name": name} if name else {}
    return {**first, **{f"{arch}.{key}": value for key, value in own.items()}}


def _check(config: ModelConfig, arch: str) -> None:
    """Refuses what the architecture of llama.cpp does not compute."""
    allowed = _BIASES.get(arch, "").split()
    own = arch in ("gpt2", "gptneox")
    for name in ("qkv_bias", "out_bias", "mlp_bias"):
        if getattr(config, name) and not own and name not in allowed:
            raise UnsupportedError(
                f"GGUF: llama.cpp reads no {name.replace('_', ' ')} in {arch!r}; this "
                "model has one"
            )
        if own and not getattr(config, name):
            raise UnsupportedError(f"GGUF: llama.cpp expects a {name} in {arch!r}")
    if config.attention_scale_by_layer:
        raise UnsupportedError("GGUF: attention scaled layer by layer is not in GGUF")
    scale = config.attention_scale**-2
    known = {config.head_dim}
    if arch.startswith("gemma"):
        known = {_gemma_scalar(config, arch)}
    if not any(math.isclose(scale, wanted, rel_tol=1e-6) for wanted in known):
        raise UnsupportedError(
            f"GGUF: llama.cpp divides scores by the square root of {max(known)} in "
            f"{arch!r}, this model by that of {scale:g}"
        )


def _gemma_scalar(config: ModelConfig, arch: str) -> int:
    """`query_pre_attn_scalar` that a reader will assume."""
    size = {"gemma2": 46, "gemma3": 62}[arch]
    return config.dim // config.heads if config.layers == size else config.head_dim


def _rope(config: ModelConfig, number: Any, real: Any) -> dict[str, Any]:
    """Keys of rotations."""
    rope = config.ropes[-1]
    own = {
        "rope.dimension_count": number(rope.dim),
        "rope.freq_base": real(rope.theta),
    }
    if len(config.ropes) > 1:
        if config.ropes[0].kind != "default":
            raise UnsupportedError("GGUF: scaled rotations of local layers")
        own["rope.freq_base_swa"] = real(config.ropes[0].theta)
    if rope.kind in ("linear", "yarn"):
        own["rope.scaling.type"] = rope.kind
        own["rope.scaling.factor"] = real(rope.factor)
    elif rope.kind == "dynamic":
        raise UnsupportedError("GGUF: rotations that scale with the text's length")
    if rope.kind == "yarn":
        usual = Rope(rope.dim, rope.theta, low=1.0, high=32.0)
        mscale = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
        same = (rope.low, rope.high, rope.truncate) == (usual.low, usual.high, True)
        if not same or not math.isclose(rope.attention_factor, mscale, rel_tol=1e-6):
            raise UnsupportedError(f"GGUF: YaRN with other settings than usual: {rope}")
    if rope.kind in ("yarn", "longrope"):
        own["rope.scaling.original_context_length"] = number(rope.context)
    if rope.kind == "longrope" and rope.attention_factor != 1.0:
        own["rope.scaling.attn_factor"] = real(rope.attention_factor)
    return own


def _windows(config: ModelConfig, arch: str, number: Any) -> dict[str, Any]:
    """Keys of sliding windows."""
    sizes = sorted({w for w in config.windows if w is not None})
    if not sizes:
        return {}
    if arch in ("llama", "qwen2", "qwen3"):
        _log.warning(
            "GGUF: llama.cpp has no sliding windows in %r; the window of %d tokens is "
            "left out, which changes what the model computes for longer texts",
            arch,
            sizes[0],
        )
        return {}
    own = {"attention.sliding_window": number(sizes[0])}
    pattern = 2 if arch == "gemma2" else 6
    if arch == "gemma3":
        full = [i + 1 for i, window in enumerate(config.windows) if window is None]
        pattern = full[0] if full else config.layers + 1
        own["attention.sliding_window_pattern"] = number(pattern)
    sliding = [arch == "phi3" or (i + 1) % pattern != 0 for i in range(config.layers)]
    if sliding != [window is not None for window in config.windows]:
        raise UnsupportedError(
            f"GGUF: llama.cpp slides windows in every {arch} layer but each "
            f"{pattern}th; this model's are {list(config.windows)}"
        )
    return own


def rope_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Divisors of the rotations' frequencies, float32 tensors by name."""
    if not config.ropes:
        return {}
    rope = config.ropes[-1]
    if rope.kind == "llama3":
        plain = frequencies(Rope(rope.dim, rope.theta))
        return {"rope_freqs.weight": (plain / frequencies(rope)).astype(np.float32)}
    if rope.kind != "longrope":
        return {}
    short, long = (
        np.asarray(v, np.float32) for v in (rope.short_factors, rope.long_factors)
    )
    if config.family == "phi3":
        return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    if not np.array_equal(short, long) or rope.attention_factor != 1.0:
        raise UnsupportedError(
            f"GGUF: llama.cpp has two lists of divisors for Phi-3 only, not for "
            f"{config.family!r}"
        )
    return {"rope_freqs.weight": short}

"""Rotations in GGUF: metadata and tensors, read and written.

Metadata know linear scaling and YaRN. The scaling of Llama 3.1 is a tensor of divisors,
`rope_freqs.weight`, and LongRoPE two, `rope_factors_long.weight` for texts longer than
the trained length and `rope_factors_short.weight`. Both are read as `longrope` with
these numbers, an attention factor of 1 unless the file states one.

YaRN's attention factor is the usual `0.1 ln(factor) + 1` times `attn_factor`, as
llama.cpp computes it, or `yarn_attn_factor` where a file has that.

Reference: llama.cpp, `src/llama-model.cpp`, `src/llama-context.cpp`, `conversion/`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.gguf_layout import Value
from qjax.converters.gguf_metadata import Metadata, f32, u32
from qjax.errors import FormatError, UnsupportedError
from qjax.models import ModelConfig
from qjax.models.rope import Rope, frequencies

SMALL = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are part of the configuration."""
_KINDS = {
    "llama": ("default", "linear", "yarn", "llama3", "longrope"),
    **dict.fromkeys(("qwen2", "qwen3", "gptneox"), ("default", "linear", "yarn")),
    **dict.fromkeys(("gemma2", "gemma3"), ("default", "linear")),
    "phi3": ("default", "linear", "longrope"),
}
"""Rotations that llama.cpp has in each architecture."""


def rotations(
    meta: Metadata, tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The keys of `config.json` about rotations, but for their base.

    Args:
      meta: of the file.
      tensors: those of `SMALL` by name, whole; others do not count.
      config: width of heads and length of context.

    Raises:
      UnsupportedError: a combination that `config.json` has no words for.
      FormatError: a value of another type, or out of range.
    """
    width, own = config["head_dim"], {}
    turned = meta.number("ARCH.rope.dimension_count", width)
    if not 0 < turned <= width:
        raise FormatError(f"{meta.where}: {turned} of {width} numbers per head rotate")
    if turned < width:
        share = turned / width
        while int(width * share) < turned:  # which is how it will be read
            share = math.nextafter(share, 1.0)
        own["partial_rotary_factor"] = share
    scaling = _scaling(meta, _divisors(meta, tensors))
    if scaling:
        own["rope_scaling"] = scaling
        own["original_max_position_embeddings"] = meta.number(
            "ARCH.rope.scaling.original_context_length",
            config["max_position_embeddings"],
        )
    return own


def _divisors(meta: Metadata, tensors: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Divisors of frequencies for short and for long texts."""
    pair = [tensors.get(f"rope_factors_{name}.weight") for name in ("short", "long")]
    if all(factors is None for factors in pair):
        pair = [tensors.get("rope_freqs.weight")] * 2
    if all(factors is None for factors in pair):
        return None
    for factors in pair:
        if factors is None or factors.ndim != 1 or factors.dtype != np.float32:
            raise FormatError(
                f"{meta.where}: expected two float32 vectors rope_factors_long.weight "
                "and rope_factors_short.weight, or one rope_freqs.weight"
            )
    return pair[0], pair[1]


def _scaling(meta: Metadata, divisors: Any) -> dict[str, Any] | None:
    """`rope_scaling`, from divisors or from metadata."""
    kind = meta.get("ARCH.rope.scaling.type", str, "linear")
    factor = meta.get("ARCH.rope.scale_linear", float, 0.0)
    factor = meta.get("ARCH.rope.scaling.factor", float, factor) or 1.0
    attention = meta.get("ARCH.rope.scaling.attn_factor", float, 1.0)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedError(
            f"{meta.where}: rope.scaling.type {kind!r:.100} is not supported; "
            "supported: none, linear, yarn, longrope"
        )
    scaled = kind == "yarn" or (factor != 1.0 and kind != "none")
    if divisors is not None and not scaled:
        return {
            "rope_type": "longrope",
            "short_factor": [float(v) for v in divisors[0]],
            "long_factor": [float(v) for v in divisors[1]],
            "attention_factor": attention,
        }
    if divisors is not None or kind == "longrope":
        raise UnsupportedError(
            f"{meta.where}: rotations of type {kind} with factor {factor:g} and "
            f"{'a list' if divisors is not None else 'no list'} of divisors"
        )
    if kind == "yarn":
        return _yarn(meta, factor, attention)
    if attention != 1.0:
        raise UnsupportedError(
            f"{meta.where}: rope.scaling.attn_factor {attention:g} for rotations of "
            f"type {kind}"
        )
    return {"rope_type": "linear", "factor": factor} if scaled else None


def _yarn(meta: Metadata, factor: float, attention: float) -> dict[str, Any]:
    """`rope_scaling` of YaRN."""
    start = "ARCH.rope.scaling.yarn_"
    outside = meta.get(f"{start}ext_factor", float, 1.0)
    if outside not in (1.0, -1.0) or meta.get(f"{start}log_multiplier", float, 0.0):
        raise UnsupportedError(
            f"{meta.where}: YaRN with a factor of extrapolation or a multiplier of the "
            "logarithm"
        )
    usual = _mscale(factor)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "beta_fast": meta.get(f"{start}beta_fast", float, 32.0),
        "beta_slow": meta.get(f"{start}beta_slow", float, 1.0),
        "attention_factor": meta.get(f"{start}attn_factor", float, usual * attention),
    }


def rope_metadata(config: ModelConfig, arch: str) -> dict[str, Value]:
    """Metadata of a model's rotations, without the architecture in front of the keys.

    Raises:
      UnsupportedError: llama.cpp has no such rotations in the architecture.
    """
    rope = config.ropes[-1]
    if rope.kind not in _KINDS[arch]:
        raise UnsupportedError(
            f"GGUF: llama.cpp has no rotations of type {rope.kind!r} in {arch!r}; it "
            f"has {', '.join(_KINDS[arch])}"
        )
    own = {"rope.dimension_count": u32(rope.dim), "rope.freq_base": f32(rope.theta)}
    if len(config.ropes) > 1:
        local = config.ropes[0]
        if local.kind != "default":
            raise UnsupportedError(
                f"GGUF: llama.cpp does not scale rotations of layers with windows; "
                f"this model's are {local}"
            )
        own["rope.freq_base_swa"] = f32(local.theta)
    if rope.kind in ("linear", "yarn"):
        own["rope.scaling.type"] = Value("string", rope.kind)
        own["rope.scaling.factor"] = f32(rope.factor)
    attention = rope.attention_factor
    if rope.kind == "yarn":
        if (rope.low, rope.high, rope.truncate) != (1.0, 32.0, True):
            raise UnsupportedError(
                f"GGUF: llama.cpp reads no other bounds of YaRN in {arch!r} than "
                f"beta_fast 32, beta_slow 1, whole numbers; this model has {rope}"
            )
        attention /= _mscale(rope.factor)
    if rope.kind == "longrope" and not _one_list(config):
        own["rope.scaling.type"] = Value("string", "longrope")
    if rope.kind in ("yarn", "longrope"):
        own["rope.scaling.original_context_length"] = u32(rope.context)
    if not math.isclose(attention, 1.0, rel_tol=1e-7):
        own["rope.scaling.attn_factor"] = f32(attention)
    return own


def _mscale(factor: float) -> float:
    """The usual attention factor of YaRN."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _one_list(config: ModelConfig) -> bool:
    """Whether one list of divisors says all."""
    rope = config.ropes[-1]
    return config.family != "phi3" and rope.short_factors == rope.long_factors


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
    if _one_list(config):
        return {"rope_freqs.weight": short}
    return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}

"""Rotary position embedding and its scaling variants.

Decides the frequencies of the variants default, linear, dynamic NTK, llama3, yarn and
longrope as Hugging Face configurations define them; refuses others. Frequencies that
do not depend on the sequence are computed once in NumPy float32; angles in float32.

Dynamic NTK and longrope depend on the current length, taken per row as the largest
position of the call plus one. Keys already in a cache keep the rotation of the call
that wrote them, as in transformers, so with these two variants decoding step by step
past the trained length differs from one full pass.

Reference: Su et al. 2021 (arXiv:2104.09864); Peng et al. 2023, YaRN (arXiv:2309.00071);
Ding et al. 2024, LongRoPE (arXiv:2402.13753).
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.errors import SpecError, UnsupportedError
from qjax.models.reader import ConfigReader

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def brief(settings: Any) -> str:
    """Returns the repr of a dataclass without the fields that have their defaults."""
    shown = [
        f"{field.name}={getattr(settings, field.name)!r}"
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default
    ]
    return f"{type(settings).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Rope:
    """One table of rotary frequencies.

    Attributes:
        dim: Number of leading head dimensions that rotate; even.
        theta: Base of the frequencies `theta ** (-2 i / dim)`.
        kind: One of `KINDS`.
        factor: Context extension factor.
        context: Trained length: where dynamic scaling and longrope switch, and what
            llama3 and yarn compare wavelengths with.
        attention_factor: Multiplies cos and sin (yarn, longrope).
        low: llama3: low_freq_factor; yarn: beta_slow.
        high: llama3: high_freq_factor; yarn: beta_fast.
        truncate: yarn: round the ramp's ends to whole dimensions.
        short_factors: longrope: divisors per frequency up to `context`.
        long_factors: longrope: divisors per frequency beyond it.
    """

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    context: int = 2048
    attention_factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __repr__(self) -> str:
        return brief(self)

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise SpecError(
                f"rope: {self.dim} head dimensions would rotate; expected an even "
                "number of at least 2 (check head_dim and partial_rotary_factor)"
            )
        if self.kind not in KINDS:
            raise UnsupportedError(
                f"rope type {self.kind!r} is not supported; supported: "
                + ", ".join(KINDS)
            )


def read_rope(
    reader: ConfigReader | None,
    *,
    dim: int,
    theta: float,
    context: int,
    pretrained: int | None = None,
) -> Rope:
    """Builds a `Rope` from a `rope_scaling` or `rope_parameters` object.

    Args:
        reader: The object; None means no scaling.
        dim: Rotating dimensions.
        theta: Base used when the object has no `rope_theta`.
        context: `max_position_embeddings`.
        pretrained: The top-level `original_max_position_embeddings`, which counts
            when the object has none.

    Raises:
        SpecError: A value is missing, of the wrong type or out of range.
        UnsupportedError: The scaling type is unknown.
    """
    if reader is None:
        return Rope(dim, theta, context=context)
    theta = reader.number("rope_theta", default=theta, null=theta)
    kind = reader.text("rope_type", "type", default="default", null="default")
    if kind == "default" or kind not in KINDS:
        return Rope(dim, theta, kind, context=context)
    known = pretrained or context
    original = reader.integer(
        "original_max_position_embeddings", default=known, null=known
    )
    if kind in ("linear", "dynamic"):
        factor = reader.number("factor", high=1e6)
        return Rope(dim, theta, kind, factor, context)
    if kind == "llama3":
        factor = reader.number("factor", high=1e6)
        low = reader.number("low_freq_factor", high=1e6)
        high = reader.number("high_freq_factor", high=1e6)
        if high <= low:
            raise reader.bad("high_freq_factor", high, f"a number above {low:g}")
        return Rope(dim, theta, kind, factor, original, low=low, high=high)
    ratio = context / original
    factor = reader.number("factor", high=1e6, default=ratio, null=ratio)
    if kind == "yarn":
        return _read_yarn(reader, dim, theta, factor, original)
    attention = 1.0
    if factor > 1 and original > 1:
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    return Rope(
        dim,
        theta,
        kind,
        factor,
        original,
        reader.number("attention_factor", default=attention, null=attention),
        short_factors=reader.numbers("short_factor", dim // 2),
        long_factors=reader.numbers("long_factor", dim // 2),
    )


def _read_yarn(
    reader: ConfigReader, dim: int, theta: float, factor: float, original: int
) -> Rope:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    top = reader.number("mscale", low=-1, default=0.0, null=0.0)
    bottom = reader.number("mscale_all_dim", low=-1, default=0.0, null=0.0)
    attention = mscale(top) / mscale(bottom) if top and bottom else mscale(1.0)
    return Rope(
        dim,
        theta,
        "yarn",
        factor,
        original,
        reader.number("attention_factor", default=attention, null=attention),
        low=reader.number("beta_slow", default=1.0, null=1.0),
        high=reader.number("beta_fast", default=32.0, null=32.0),
        truncate=reader.flag("truncate", default=True, null=True),
    )


def _base_frequencies(dim: int, theta: float) -> np.ndarray:
    powers = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / np.float32(theta) ** powers


def frequencies(rope: Rope) -> np.ndarray:
    """Returns the float32 `[dim/2]` frequencies for lengths up to the trained one.

    default: f_i = theta^(-2i/dim); linear: f_i / factor; llama3 and yarn: f_i for
    short wavelengths, f_i / factor for long ones, a blend between.
    """
    base = _base_frequencies(rope.dim, rope.theta)
    if rope.kind == "linear":
        return base / np.float32(rope.factor)
    if rope.kind == "llama3":
        turns = np.float32(rope.context) * base / np.float32(2 * math.pi)
        blend = (turns - np.float32(rope.low)) / np.float32(rope.high - rope.low)
        blend = np.clip(blend, np.float32(0), np.float32(1))
        return blend * base + (1 - blend) * base / np.float32(rope.factor)
    if rope.kind == "yarn":
        keep = 1 - _yarn_ramp(rope)
        return keep * base + (1 - keep) * base / np.float32(rope.factor)
    if rope.kind == "longrope":
        return base / np.asarray(rope.short_factors, np.float32)
    return base


def _yarn_ramp(rope: Rope) -> np.ndarray:
    """Returns 0 for dimensions to keep, 1 for those to interpolate, a ramp between."""

    def dimension(rotations: float) -> float:
        ratio = rope.context / (rotations * 2 * math.pi)
        return rope.dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.high), dimension(rope.low)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    steps = np.arange(rope.dim // 2, dtype=np.float32)
    return np.clip((steps - np.float32(low)) / np.float32(high - low), 0, 1)


def rope_angles(
    rope: Rope, positions: Int[Array, "batch time"]
) -> tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]]:
    """Returns cos and sin of every position, times the attention factor.

    angle[b, t, i] = positions[b, t] * f_i.

    Args:
        rope: The frequencies.
        positions: Token positions; negative ones (padding) give finite values.

    Returns:
        Two float32 arrays.
    """
    inverse = jnp.asarray(frequencies(rope))[None]
    length = jnp.max(positions, axis=1, keepdims=True) + 1
    if rope.kind == "dynamic":
        longest = jnp.maximum(length, rope.context).astype(jnp.float32)
        stretch = rope.factor * longest / rope.context - (rope.factor - 1)
        powers = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
        theta = rope.theta * stretch ** (rope.dim / max(rope.dim - 2, 1))
        inverse = theta ** jnp.asarray(-powers)
    if rope.kind == "longrope":
        base = _base_frequencies(rope.dim, rope.theta)
        far = jnp.asarray(base / np.asarray(rope.long_factors, np.float32))
        inverse = jnp.where(length > rope.context, far, inverse)
    angles = positions[..., None].astype(jnp.float32) * inverse[:, None]
    return (
        jnp.cos(angles) * rope.attention_factor,
        jnp.sin(angles) * rope.attention_factor,
    )


def apply_rope(
    x: Float[Array, "batch time heads head_dim"],
    cos: Float[Array, "batch time half"],
    sin: Float[Array, "batch time half"],
) -> Float[Array, "batch time heads head_dim"]:
    """Rotates the leading dimensions of every head, halves paired (GPT-NeoX order).

    (a, b) -> (a cos - b sin, b cos + a sin) for dimension i and i + half; dimensions
    past `2 * half` pass unchanged. Computed in float32.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    wide = x.astype(jnp.float32)
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = [a * cos - b * sin, b * cos + a * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)

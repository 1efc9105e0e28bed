"""Rotations of a decoder that cost nothing at run time: folded into its weights.

For an orthogonal `R` the residual stream `x` is replaced by `x R`: embeddings and
everything that writes the stream are multiplied by `R` on the output side, everything
that reads it by `R^T` on the input side (R1). An RMS norm without a scale commutes with
`R`, so norm scales are folded into the readers first. Values are rotated per head by an
orthogonal matrix that the output projection undoes (R2). The model computes the same
function; its weights and activations lose their outliers, which uniform grids reward.

Rotations that run on activations are separate: `qjax.methods.Rotate` around the method
of down projections (R4), and `rotate="keys"` of the cache (R3).

Each part of a model is rotated on its own, so a model can be rotated while it streams.

Reference: Ashkboos et al., QuaRot, arXiv 2404.00456, section 4; Liu et al., SpinQuant,
arXiv 2405.16406, section 3 (names R1 to R4).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError, UnsupportedError
from qjax.models.config import ModelConfig
from qjax.models.weights import EMBEDDING, HEAD
from qjax.tensor import QuantizedTensor
from qjax.wrappers import hadamard

_READERS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
_WRITERS = ("attn.o", "mlp.down")


def check_rotatable(config: ModelConfig) -> None:
    """Raises UnsupportedError, naming the reason, if R1 would change the model."""
    reasons = {
        "its layer norms subtract the mean, which a rotation moves": config.norm
        != "rms",
        "its norms follow the residual sum, so their scale stays in the stream": (
            config.norm_after
        ),
        "norms with scales of their own follow attention and MLP before the residual "
        "sum, where no weight can absorb the scale": config.post_norms,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedError(
                f"rotate_params: the residual stream of a {config.family} model cannot "
                f"be rotated: {reason}; rotate inputs instead, with method "
                "Rotate(...), or pass residual=False to rotate heads only"
            )


def random_rotation(dim: int, seed: int) -> Float[Array, "dim dim"]:
    """A random orthogonal matrix, as incoherent as the size allows.

    `diag(signs) (Q kron H)` with `H` the Hadamard matrix of the largest power of two
    that divides `dim` and `Q` a random orthogonal matrix of the remaining factor.

    Args:
      dim: size.
      seed: equal seeds give equal matrices.
    """
    key = jax.random.fold_in(jax.random.key(seed), dim)
    block = dim & -dim
    signs = jax.random.rademacher(key, (dim,), jnp.float32)
    h = hadamard(jnp.eye(block)) if block > 1 else jnp.ones((1, 1))
    shape = (dim // block, dim // block)
    noise = jax.random.normal(jax.random.fold_in(key, 1), shape)
    q, r = jnp.linalg.qr(noise)
    q = q * jnp.sign(jnp.diagonal(r))
    return signs[:, None] * jnp.kron(q, h)


def head_rotation(config: ModelConfig, seed: int, layer: int) -> Float[Array, "d d"]:
    """The rotation of one layer's value heads (R2), shared by its heads."""
    return random_rotation(config.head_dim, seed * 8191 + layer + 1)


def rotate_params(
    config: ModelConfig,
    params: Mapping[str, Any],
    seed: int = 0,
    *,
    residual: bool = True,
    heads: bool = True,
    rotation: Float[Array, "dim dim"] | None = None,
) -> dict[str, Any]:
    """Dense parameters of the rotated model: another basis, the same function.

    Args:
      config: the architecture.
      params: all parameters by path, dense.
      seed: of the random rotations.
      residual: rotate the residual stream (R1).
      heads: rotate value heads (R2).
      rotation: R1 itself, such as a learned one, instead of a random one.

    Returns:
      Parameters for the same configuration, changed ones in float32. A tied head gets a
      matrix of its own, because the final norm's scale is folded into it.

    Raises:
      UnsupportedError: the rotation would change what the model computes, or a
        parameter is quantized already.
      SpecError: `rotation` has another size.
    """
    matrix = None
    if residual:
        check_rotatable(config)
        drawn = random_rotation(config.dim, seed) if rotation is None else rotation
        matrix = jnp.asarray(drawn, jnp.float32)
    out: dict[str, Any] = {}
    layers: dict[int, dict[str, Any]] = {}
    ends: dict[str, Any] = {}
    for path, leaf in params.items():
        if path.startswith("layers."):
            layers.setdefault(int(path.split(".")[1]), {})[path] = leaf
        else:
            ends[path] = leaf
    first = {p: v for p, v in ends.items() if p.startswith("embed.")}
    last = {p: v for p, v in ends.items() if p not in first}
    out |= first if matrix is None else rotate_embeddings(config, first, matrix)
    for index, layer in sorted(layers.items()):
        turn = head_rotation(config, seed, index) if heads else None
        out |= rotate_layer(config, layer, matrix, turn)
    if matrix is not None:
        last = rotate_final(config, last, matrix, first.get(EMBEDDING))
    return out | last


def rotate_parts(
    config: ModelConfig,
    parts: Iterable[tuple[int | None, Mapping[str, Any]]],
    seed: int | None,
) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Rotates a model part by part, as it streams; see `rotate_params`.

    Args:
      config: the architecture.
      parts: layer index and dense parameters by path: embeddings, layers, the end.
      seed: of the random rotations; None leaves every part as it is.

    Yields:
      The same parts, rotated.
    """
    if seed is None:
        yield from ((layer, dict(part)) for layer, part in parts)
        return
    check_rotatable(config)
    matrix = random_rotation(config.dim, seed)
    embedding = None
    for index, (layer, part) in enumerate(parts):
        if layer is not None:
            turn = head_rotation(config, seed, layer)
            yield layer, rotate_layer(config, part, matrix, turn)
        elif index == 0:
            tied = config.tied and EMBEDDING in part
            embedding = jnp.asarray(part[EMBEDDING]) if tied else None
            yield layer, rotate_embeddings(config, part, matrix)
        else:
            yield layer, rotate_final(config, part, matrix, embedding)


def rotate_embeddings(
    config: ModelConfig, part: Mapping[str, Any], rotation: Float[Array, "dim dim"]
) -> dict[str, Any]:
    """Embedding tables whose rows are rotated: `E R`.

    Args:
      config: the architecture.
      part: `embed.*` parameters by path.
      rotation: R1.
    """
    _check(config, part, rotation)
    return {path: _times(leaf, rotation) for path, leaf in part.items()}


def rotate_layer(
    config: ModelConfig,
    part: Mapping[str, Any],
    rotation: Float[Array, "dim dim"] | None,
    heads: Float[Array, "head_dim head_dim"] | None = None,
) -> dict[str, Any]:
    """One layer, its norm scales folded into its readers, in the rotated basis.

    Args:
      config: the architecture.
      part: all parameters of the layer by full path.
      rotation: R1, or None to leave the stream.
      heads: R2, or None to leave the heads.
    """
    _check(config, part, rotation)
    out, prefix = dict(part), next(iter(part)).split(".")[:2]
    prefix = ".".join(prefix) + "."
    if rotation is not None:
        for norm, names in (("attn_norm", _READERS[:3]), ("mlp_norm", _READERS[3:])):
            gain = _take_scale(config, out, f"{prefix}{norm}.scale")
            for path in (f"{prefix}{name}.kernel" for name in names):
                if path in out:
                    kernel = jnp.asarray(out[path], jnp.float32) * gain
                    out[path] = _times(rotation.T, kernel)
        for name in _WRITERS:
            for path in (f"{prefix}{name}.kernel", f"{prefix}{name}.bias"):
                if path in out:
                    out[path] = _times(out[path], rotation)
    if heads is not None:
        _rotate_heads(config, out, prefix, heads)
    return out


def rotate_final(
    config: ModelConfig,
    part: Mapping[str, Any],
    rotation: Float[Array, "dim dim"],
    embedding: Any = None,
) -> dict[str, Any]:
    """The last norm and the head in the rotated basis.

    Args:
      config: the architecture.
      part: `norm.*` and `head.*` parameters by path.
      rotation: R1.
      embedding: the original embedding table, of which a tied head is made.

    Raises:
      SpecError: the head is tied and no table is given.
    """
    _check(config, part, rotation)
    out = dict(part)
    head = out.get(HEAD)
    if head is None:
        if embedding is None:
            raise SpecError(
                "rotate_final: the head is tied to the embedding; pass embedding=, the "
                "table before its rotation"
            )
        _check(config, {EMBEDDING: embedding}, rotation)
        head = jnp.asarray(embedding).T
    gain = _take_scale(config, out, "norm.scale") if config.final_norm else 1.0
    out[HEAD] = _times(rotation.T, jnp.asarray(head, jnp.float32) * gain)
    return out


def _take_scale(config: ModelConfig, out: dict[str, Any], path: str) -> Any:
    """The norm's effective scale as a column; leaves an effective scale of 1."""
    if path not in out:
        return 1.0
    gain = jnp.asarray(out[path], jnp.float32) + config.norm_offset
    out[path] = jnp.full_like(gain, 1.0 - config.norm_offset)
    return gain[:, None]


def _rotate_heads(config, out, prefix, heads) -> None:
    """`v <- v R2` and `o <- R2^T o`, head by head, in place."""
    d = config.head_dim
    for path in (f"{prefix}attn.v.kernel", f"{prefix}attn.v.bias"):
        if path in out:
            v = jnp.asarray(out[path], jnp.float32)
            turned = _times(v.reshape(*v.shape[:-1], -1, d), heads)
            out[path] = turned.reshape(v.shape)
    path = f"{prefix}attn.o.kernel"
    o = jnp.asarray(out[path], jnp.float32)
    out[path] = _times(heads.T, o.reshape(-1, d, o.shape[-1])).reshape(o.shape)


def _times(a: Any, b: Any) -> Array:
    a, b = (jnp.asarray(m).astype(jnp.float32) for m in (a, b))
    return jnp.matmul(a, b, precision="highest")


def _check(config: ModelConfig, part: Mapping[str, Any], rotation: Any) -> None:
    for path, leaf in part.items():
        if isinstance(leaf, QuantizedTensor):
            raise UnsupportedError(
                f"rotate_params: {path} is quantized already ({leaf!r}); rotate the "
                "dense model, then quantize it"
            )
    if rotation is None:
        return
    check_rotatable(config)
    if rotation.shape != (config.dim, config.dim):
        raise SpecError(
            f"rotate_params: the rotation has shape {list(rotation.shape)}, expected "
            f"[{config.dim}, {config.dim}], the width of the residual stream"
        )

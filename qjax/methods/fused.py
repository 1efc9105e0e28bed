"""Steps over whole weights that run without temporaries of their size.

`group_absmax` and `fused_codes` are `Grouping.split` + max and `Format.encode` +
`pack` in one expression each, from `qjax.pallas_kernels.quantize`; the bytes are the
same. They apply where a packing unit never crosses a group and nothing is padded; for
all else they return None and the caller takes the general way.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

import qjax.pallas_kernels.device as device
from qjax.formats import Cast, Format, Int
from qjax.formats.codebook import Dynamic8, TableFormat
from qjax.formats.minifloat import Minifloat
from qjax.methods import encoders
from qjax.pallas_kernels.quantize import xla
from qjax.pallas_kernels.weights import WeightSpec


def fused_spec(fmt: Format, matrix: tuple[int, int]) -> WeightSpec | None:
    """What kernels call a format on a matrix; None where they cannot encode it."""
    group = fmt.grouping(matrix)
    if group.kind in ("out", "flat") or isinstance(fmt, Cast | Dynamic8):
        return None
    k, n = matrix
    size = group.size if group.kind in ("in", "block") else k
    if isinstance(fmt, Int) and fmt.symmetric:
        spec = WeightSpec(k, n, "int", fmt.bits, size, fmt.offset)
    elif isinstance(fmt, TableFormat):
        spec = WeightSpec(k, n, "table", fmt.code_bits, size)
    elif isinstance(fmt, Minifloat):
        spec = WeightSpec(k, n, fmt.kind, fmt.code_bits, size)
    else:
        return None
    return spec if xla.obstacle(spec) is None else None


def group_absmax(
    w: Float[Array, "*lead in out"], fmt: Format
) -> Float[Array, "*lead s t"] | None:
    """Largest magnitude of each group, in the shape scales are stored in.

    Args:
      w: finite float weight.
      fmt: the format.

    Returns:
      float32, or None where the fused step does not apply.
    """
    matrix = (w.shape[-2], w.shape[-1])
    spec = fused_spec(fmt, matrix)
    if spec is None:
        return None
    group = fmt.grouping(matrix)
    top = xla.absmax(w, spec)
    if group.kind == "tensor":
        return jnp.max(top, axis=-1, keepdims=True)
    if group.kind != "block":
        return top
    pad = [(0, 0)] * (top.ndim - 1) + [(0, -matrix[1] % group.size)]
    top = jnp.pad(top, pad)
    return jnp.max(top.reshape(*top.shape[:-1], -1, group.size), axis=-1)


def fused_codes(
    w: Float[Array, "*lead in out"],
    fmt: Format,
    scale: Float[Array, "*lead s t"] | None,
) -> Shaped[Array, "*lead p out"] | None:
    """Packed nearest codes of a weight.

    Args:
      w: finite float weight.
      fmt: the format.
      scale: effective scales as stored; None for a table format under its own absolute
        maxima, whose reciprocals multiply.

    Returns:
      The codes leaf, or None where the fused step does not apply.
    """
    matrix = (w.shape[-2], w.shape[-1])
    spec = fused_spec(fmt, matrix)
    if spec is None:
        return None
    group = fmt.grouping(matrix)
    if scale is not None and group.kind in ("tensor", "block"):
        across = group.size if group.kind == "block" else matrix[1]
        scale = jnp.repeat(scale, across, axis=-1)[..., : matrix[1]]
    table = fmt.table if isinstance(fmt, TableFormat) else None
    return encoders.encode(w, spec, table=table, scale=scale)


def explain(shape: tuple[int, ...], fmt: Format, dtype: Any = jnp.float32) -> str:
    """Says what would encode a weight with round-to-nearest, and why nothing else.

    Args:
      shape: of the weight, `[..., in, out]`.
      fmt: the number format.
      dtype: of the weight.

    Returns:
      One line, for example `xla: one fused loop (int4-g128, cpu)`.

    Raises:
      SpecError: a group is larger than its axis.
    """
    matrix, platform = (shape[-2], shape[-1]), device.platform()
    spec = fused_spec(fmt, matrix)
    if spec is None:
        return f"xla: codes, then their packing ({fmt.name}, {platform})"
    name, refused = encoders.choose(platform, spec, jnp.dtype(dtype))
    because = "".join(f"; not {other}: {why}" for other, why in refused)
    return f"{name}: {encoders.ENCODERS[name]} ({fmt.name}, {platform}{because})"

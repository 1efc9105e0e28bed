"""Array-level quantization: one weight in, one quantized tensor out.

Checks what cannot be checked under `jit` (shape, dtype, finiteness), then calls the
method, compiled once per shape, format and method. Peak memory: the float32 weight, the
packed result, and the temporaries of the method.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

import qjax.pallas_kernels.device as device
from qjax.additive import AdditiveTensor
from qjax.errors import NonFiniteError, SpecError
from qjax.formats import Additive, Format, Ggml, Int, KMeans, Trellis
from qjax.formats.base import check_choice
from qjax.formats.trellis import TILE
from qjax.ggml import GgmlTensor
from qjax.methods.base import Method
from qjax.methods.rtn import RTN
from qjax.methods.statistics import Statistics
from qjax.methods.trellis import TrellisLDLQ
from qjax.scales import nvfp4_divisor, store_scale
from qjax.tensor import (
    LayoutTensor,
    QuantizedTensor,
    assemble,
    with_dtype,
)
from qjax.trellis import TrellisTensor
from qjax.wrappers import Transposed

NONFINITE = ("raise", "zero", "clip")


def quantize(
    w: Any,
    fmt: Format,
    method: Method | None = None,
    *,
    axis: int = -2,
    importance: Any = None,
    key: Array | None = None,
    statistics: Statistics | None = None,
    shared: Any = None,
    nonfinite: str = "raise",
    name: str = "weight",
) -> QuantizedTensor:
    """Quantizes a weight `[..., in, out]` along its contraction axis.

    Args:
      w: float array, NumPy or JAX, rank >= 2. Leading axes are batched.
      fmt: the number format.
      method: how codes are chosen; default `RTN()`, for a trellis `TrellisLDLQ()`, for
        llama.cpp's blocks `GGML()`.
      axis: the contraction axis, -2 (kernels) or -1. With -1 (embedding tables
        `[vocab, dim]`, torch weights `[out, in]`) the result is `Transposed`.
      importance: non-negative error weights broadcastable to `w`.
      key: random key for stochastic rounding.
      statistics: of the inputs, for methods that are calibrated; see `Method.needs`.
      shared: what the method's `prepare` returned for the same inputs.
      nonfinite: `raise`, `zero` (NaN and infinities become 0) or `clip` (NaN becomes 0,
        infinities the largest finite magnitude in `w`). Under `jit` nothing can be
        raised and `raise` acts as `clip`.
      name: what errors call the weight.

    Returns:
      A `QuantizedTensor` with the shape and float dtype of `w`.

    Raises:
      SpecError: rank below 2, a dtype that is not float, a group larger than its axis.
      NonFiniteError: `nonfinite="raise"` and `w` holds NaN or infinity; names the
        tensor, the count and the first index.

    Example:
      >>> q = quantize(np.ones((128, 8), np.float32), Int(4, 64))
      >>> q.shape, q.bits_per_weight
      ((128, 8), 4.5)
    """
    check_choice(name, "nonfinite", nonfinite, NONFINITE)
    check_choice(name, "axis", axis, (-2, -1))
    if np.ndim(w) < 2:
        raise SpecError(
            f"{name}: rank {np.ndim(w)} (shape {np.shape(w)}) cannot be quantized; "
            "expected [..., in, out]"
        )
    if not isinstance(w, jax.Array):
        w = np.asarray(w)
        w = w.astype(w.dtype.newbyteorder("="), copy=False)
    dtype = jnp.dtype(w.dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise SpecError(
            f"{name}: dtype {dtype} is not a float that can be quantized; expected "
            "float16, bfloat16, float32 or float64"
        )
    if axis == -1:
        if importance is not None:
            importance = jnp.swapaxes(jnp.asarray(importance), -1, -2)
        w = jnp.swapaxes(jnp.asarray(w, _compute_dtype(dtype)), -1, -2)
    matrix = (w.shape[-2], w.shape[-1])
    if 0 in w.shape:
        q = _empty(w.shape, fmt)
    else:
        fmt.grouping(matrix)  # a group that does not fit is reported before any work
        w = jnp.asarray(w, _compute_dtype(dtype))
        treatment = "clip" if nonfinite == "raise" else nonfinite
        if nonfinite == "raise" and not isinstance(w, Tracer):
            check_finite(w, name, transposed=axis == -1)
            treatment = "none"
        q = _quantize(
            w,
            fmt,
            method or _usual(fmt),
            treatment,
            device.device_kind(),
            importance=importance,
            key=key,
            statistics=statistics,
            shared=shared,
        )
    q = with_dtype(q, "float32" if dtype == jnp.float64 else dtype.name)
    return Transposed(q) if axis == -1 else q


def _usual(fmt: Format) -> Method:
    """The method for a format where none is asked for."""
    if isinstance(fmt, Ggml):
        from qjax.methods.ggml import GGML

        return GGML()
    return TrellisLDLQ() if isinstance(fmt, Trellis) else RTN()


def _compute_dtype(dtype):
    return jnp.float32 if dtype == jnp.float64 else dtype


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(w, fmt, method, nonfinite, kind, **arrays):
    """Quantizes for a `kind` of device, which the choice of an encoder depends on."""
    del kind
    if nonfinite == "none":
        return method(w, fmt, **arrays)
    finite = jnp.where(jnp.isfinite(w), w, jnp.zeros_like(w))
    if nonfinite == "clip":
        top = jnp.max(jnp.abs(finite))
        w = jnp.where(jnp.isinf(w), jnp.sign(w) * top, finite)
    else:
        w = finite
    return method(w, fmt, **arrays)


def check_finite(w: Any, name: str, *, transposed: bool = False) -> None:
    """Raises NonFiniteError, with count and first index, if `w` is not all finite.

    Args:
      w: float array.
      name: what the error calls it.
      transposed: report the index of the swapped matrix axes.
    """
    bad = count_nonfinite(w)
    if not bad:
        return
    host = np.asarray(w).astype(np.float32)
    host = np.swapaxes(host, -1, -2) if transposed else host
    first = tuple(int(i) for i in np.argwhere(~np.isfinite(host))[0])
    raise NonFiniteError(
        f"{name}: {bad} of {w.size} weights are NaN or infinite, the first at index "
        f"{first} ({host[first]}); expected finite weights. Repair the source, or pass "
        "nonfinite='zero' or nonfinite='clip' to replace them"
    )


def count_nonfinite(w: Any) -> int:
    """Number of NaN and infinite elements."""
    return int(_count_nonfinite(jnp.asarray(w)))


@jax.jit
def _count_nonfinite(w):
    return jnp.sum(~jnp.isfinite(w), dtype=jnp.int32)


def _empty(shape, fmt: Format) -> LayoutTensor:
    """A tensor with a zero-sized axis: no weights, unit scales, nothing to choose."""
    matrix = (shape[-2], shape[-1])
    lead = shape[:-2]
    if isinstance(fmt, Trellis):
        words = (*lead, matrix[0] // TILE, matrix[1] * fmt.bits)
        one = jnp.ones((*lead, 1, 1), jnp.float32)
        return TrellisTensor(jnp.zeros(words, jnp.uint16), one, fmt, matrix)
    if isinstance(fmt, Additive) or (isinstance(fmt, KMeans) and fmt.columnwise):
        return _empty_tables(shape, fmt)
    if isinstance(fmt, Ggml):
        blocks = fmt.grouping(matrix).scale_shape[0]
        codes = (*lead, blocks * fmt.block.bytes, matrix[1])
        return GgmlTensor(jnp.zeros(codes, jnp.uint8), fmt, matrix)
    codes = fmt.encode(jnp.zeros(shape, jnp.float32))
    if not hasattr(fmt, "scale_dtype"):
        return assemble(fmt, codes, None, matrix)
    group = fmt.grouping(matrix)
    ones = jnp.ones((*lead, *group.scale_shape), jnp.float32)
    divisor = zero = None
    if fmt.name == "nvfp4":
        divisor = nvfp4_divisor(jnp.zeros((*lead, 1, 1), jnp.float32))
    if isinstance(fmt, Int) and not fmt.symmetric:
        zero = jnp.zeros_like(ones).astype(fmt.zero_dtype)
    stored = store_scale(fmt, ones, divisor)[0]
    return assemble(fmt, codes, stored, matrix, zero=zero, global_scale=divisor)


def _empty_tables(shape, fmt: Additive | KMeans) -> LayoutTensor:
    """`_empty` for formats that have no codes without learned tables."""
    *lead, rows, cols = shape
    matrix = (rows, cols)
    if isinstance(fmt, KMeans):
        tables = jnp.zeros((*lead, fmt.levels, cols), fmt.table_dtype)
        codes = jnp.zeros(shape, jnp.uint8)
        return assemble(fmt, codes, None, matrix, codebook=tables)
    fmt.grouping(matrix)
    codes = (*lead, rows // fmt.group * fmt.codebooks, cols)
    books = (*lead, fmt.codebooks, fmt.levels, fmt.group)
    return AdditiveTensor(
        jnp.zeros(codes, f"uint{fmt.code_bits}"),
        jnp.ones((*lead, 1, cols), fmt.scale_dtype),
        jnp.zeros(books, fmt.table_dtype),
        fmt,
        matrix,
    )

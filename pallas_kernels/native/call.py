"""The call into the extension: which products it takes, and its operands."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import native
from ..matmul import cpu_layout
from ..weights import STORED_SCALES, KernelError, Weight, WeightSpec, check

KIND = {"int": 0, "table": 1, "e2m1": 1, "e4m3": 2, "e5m2": 3}
FLOATS = ("float32", "bfloat16", "float16")
ZEROS = (*FLOATS, "uint8", "int8")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def obstacle(spec: WeightSpec, transpose: bool = False) -> str | None:
    """Why the extension cannot multiply by a weight (or its transpose), or None."""
    state = native.status()
    if not state.loaded:
        return f"native CPU kernels are absent: {state.reason}"
    if spec.layout not in ("canonical", cpu_layout.TAG):
        return f"its layout is {spec.layout!r}"
    if spec.kind not in KIND:
        return f"its codes are {spec.kind!r}"
    wide = {"e2m1": 4, "e4m3": 8, "e5m2": 8}.get(spec.kind, spec.bits)
    if spec.bits != wide:
        return f"{spec.kind} codes of {spec.bits} bits are not {wide} bits wide"
    if not spec.k or not spec.n:
        return "the weight is empty"
    if spec.layout == cpu_layout.TAG:
        if transpose and spec.kind == "int":
            return f"the transpose of integers in layout {spec.layout!r}"
        return cpu_layout.obstacle(spec)
    unit = 1 if spec.bits == 8 else 8 // spec.bits if spec.bits in (1, 2, 4) else 8
    if spec.groups > 1 and spec.group % unit:
        return f"groups of {spec.group} rows cut packing units of {unit}"
    return None


def run(
    x,
    w: Weight,
    spec: WeightSpec,
    *,
    name: str,
    layer,
    bias,
    out_dtype,
    transpose: bool = False,
    x_bits: int = 16,
    x_scale=None,
):
    """Checks the operands and calls the handler.

    Args:
      x: `[m, k]`, or `[m, n]` for the transpose.
      w: the weight, canonical or of `matmul.cpu_layout`.
      spec: its static half.
      name: the operation, for messages.
      layer: int32 scalar when `w` is stacked.
      bias: one number per column of the result, or None.
      out_dtype: of the result.
      transpose: multiply by `W^T`.
      x_bits: 16 for weight-only products, 8 for int8 activations.
      x_scale: float `[m]` when `x` holds int8 codes.

    Returns:
      The product.

    Raises:
      KernelError: an operand does not fit, or the product has an obstacle.
    """
    reason = obstacle(spec, transpose)
    if reason:
        raise KernelError(f"{name}: no native CPU kernel; {reason}")
    columns, width = (spec.n, spec.k) if transpose else (spec.k, spec.n)
    if x.ndim != 2 or x.shape[1] != columns:
        raise KernelError(
            f"{name}: x has shape {list(x.shape)}, expected [m, {columns}]; "
            f"W is [{spec.k}, {spec.n}]{' and transposed' if transpose else ''}"
        )
    strips = spec.layout == cpu_layout.TAG
    fits = cpu_layout.check if strips else check
    fits(w, spec, (x.shape[0], spec.k), name=name)
    stacked = w.codes.ndim == 3
    if stacked != (layer is not None):
        raise KernelError(
            f"{name}: layer is {layer}, codes have shape {list(w.codes.shape)}; "
            "pass a layer for a stack and only for a stack"
        )
    _dtypes(name, w, bias, out_dtype)
    if bias is not None and bias.shape != (width,):
        raise KernelError(
            f"{name}: bias has shape {list(bias.shape)}, expected [{width}]; "
            "one number per column of the result"
        )
    none = jnp.zeros((0,), jnp.float32)
    table = w.table
    if spec.kind == "e2m1":
        table = jnp.asarray(np.array([*E2M1, *(-v for v in E2M1)], np.float32))
    call = jax.ffi.ffi_call(
        "qjax_matmul",
        jax.ShapeDtypeStruct((x.shape[0], width), out_dtype),
        vmap_method="sequential",
    )
    return call(
        x,
        w.codes,
        w.scale,
        none if w.zero is None else w.zero,
        none if table is None else table,
        none if bias is None else bias,
        none if x_scale is None else x_scale,
        jnp.asarray(0 if layer is None else layer, jnp.int32),
        k=np.int64(spec.k),
        n=np.int64(spec.n),
        kind=np.int64(KIND[spec.kind]),
        bits=np.int64(spec.bits),
        group=np.int64(min(spec.group, spec.k)),
        offset=np.float32(spec.offset),
        transpose=bool(transpose),
        strips=strips,
        x_bits=np.int64(x_bits),
    )


def _dtypes(name, w, bias, out_dtype):
    """Storage types that the handler reads and writes."""
    wanted = {
        "scale": (w.scale, STORED_SCALES),
        "zero": (w.zero, ZEROS),
        "table": (w.table, ("float32",)),
        "bias": (bias, FLOATS),
    }
    found = {key: (a.dtype, ok) for key, (a, ok) in wanted.items() if a is not None}
    for key, (dtype, allowed) in (found | {"out": (out_dtype, FLOATS)}).items():
        if jnp.dtype(dtype).name not in allowed:
            raise KernelError(
                f"{name}: {key} has dtype {jnp.dtype(dtype).name}, expected one of "
                f"{allowed}; cast it"
            )

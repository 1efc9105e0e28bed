"""Encoding a weight: floats in, packed codes and scales out.

`encode` finds the absolute maximum of every group and the nearest code of every weight;
with `scale` given it only encodes. No backend writes anything the size of the weight
but the codes. Non-finite weights count as 0; who must not lose them checks first.

Backends are imported when they are asked for; one that cannot do what is asked raises.
"xla" runs everywhere and is bit-identical to `qjax.quantize` with round-to-nearest.
"""

import functools
import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..weights import FLOAT_SCALES, KINDS, KernelError, Weight, WeightSpec
from . import reference, xla

BACKENDS = ("xla", "tpu", "gpu", "reference")
_NAME = "encode"
_WIDTHS = {"e2m1": (4,), "e4m3": (8,), "e5m2": (8,)}


def encode(
    w: Any,
    spec: WeightSpec,
    *,
    table: Any = None,
    scale: Any = None,
    across: int = 1,
    backend: str = "xla",
    config: Any = None,
    interpret: Any = False,
) -> Weight:
    """Packs a float weight, one scale per group of rows and column.

        scale[g, j] = max_i |w[i, j]| / peak  over rows i of group g and the `across`
                      columns around j
        code[i, j]  = the code whose value is nearest to w[i, j] / scale[i // group, j]

    `peak` is half the number of integer steps, `(2**bits - 1) / 2`, or the largest
    value of the other kinds. Groups of zeros get scale 1 (tables: 0). Under its own
    scale a table format multiplies by the rounded reciprocal, as bitsandbytes does;
    everything else divides.

    Args:
      w: float32, bfloat16 or float16 `[*layers, k, n]`.
      spec: what the codes will be, canonical layout; integers symmetric: `offset` is
        `2**(bits - 1)` (0.5 for 1 bit; 0 for signed 8-bit codes).
      table: the values of "table" codes, a concrete array `[2**bits]`.
      scale: float `[*layers, groups, n]`, positive; default the rule above.
      across: columns that share a scale, for tiles of `group` x `across`.
      backend: "xla", "tpu", "gpu" or "reference".
      config: the backend's tiles; default its tuned table.
      interpret: run the kernel's interpreter: True or the backend's parameters.

    Returns:
      The codes, the float32 scale `[*layers, groups, n]` and the table.

    Raises:
      KernelError: an argument does not fit, or the backend cannot do this; the message
        names the argument or gives the reason.

    Reference: Dettmers et al., QLoRA, arXiv 2305.14314, section 3.
    """
    if backend not in BACKENDS:
        _refuse("backend is", repr(backend), f"one of {BACKENDS}")
    table = _check(w, spec, table, scale, across)
    if scale is not None:
        scale = scale.astype(jnp.float32)
    options = {"table": table, "scale": scale, "across": across}
    if backend == "reference" or 0 in w.shape:
        return reference.encode(w, spec, **options)
    if backend == "xla":
        return xla.encode(w, spec, **options)
    module = importlib.import_module(f"{__package__}.{backend}")
    reason = module.obstacle(spec, w.dtype)
    if reason is not None:
        raise KernelError(
            f"{_NAME}: backend {backend!r} cannot encode {w.dtype} {list(w.shape)} as "
            f"{spec}: {reason}"
        )
    multiply = scale is None and spec.kind == "table"
    if scale is None and (across > 1 or not module.finds_scales(spec)):
        scale = scale_of(w, spec, across)
    run = functools.partial(module.encode, config=config, interpret=interpret)
    return run(w, spec, table=table, scale=scale, multiply=multiply)


def scale_of(w: Any, spec: WeightSpec, across: int = 1) -> Any:
    """The scales that `encode` would choose, `[*layers, groups, n]`.

    Args:
      w: float `[*layers, k, n]`.
      spec: the groups.
      across: columns that share a scale.

    Returns:
      float32 scales.
    """
    return xla.scales(w, spec, across)


def _refuse(argument, got, expected):
    raise KernelError(f"{_NAME}: {argument} {got}, expected {expected}")


def _check(w, spec, table, scale, across):
    shape = tuple(getattr(w, "shape", ()))
    if len(shape) < 2 or shape[-2:] != (spec.k, spec.n):
        _refuse("w has shape", list(shape), f"[*layers, {spec.k}, {spec.n}]")
    if jnp.dtype(w.dtype).name not in FLOAT_SCALES:
        _refuse("w has dtype", w.dtype, FLOAT_SCALES)
    if spec.kind not in KINDS:
        _refuse("spec.kind is", repr(spec.kind), f"one of {KINDS}")
    widths = _WIDTHS.get(spec.kind, tuple(range(1, 9)))
    if spec.bits not in widths:
        _refuse("spec.bits is", spec.bits, f"one of {widths} for {spec.kind!r}")
    if spec.group < 1 or type(spec.group) is not int:
        _refuse("spec.group is", spec.group, "a positive integer (k for one scale)")
    if spec.layout != "canonical":
        _refuse("spec.layout is", repr(spec.layout), "'canonical'; prepack afterwards")
    if type(across) is not int or across < 1:
        _refuse("across is", across, "a positive integer")
    half = 0.5 if spec.bits == 1 else float(2 ** (spec.bits - 1))
    offsets = (half, 0.0) if spec.bits == 8 else (half,)
    if spec.kind == "int" and spec.offset not in offsets:
        _refuse("spec.offset is", spec.offset, f"one of {offsets}: symmetric integers")
    groups = (*shape[:-2], spec.groups, spec.n)
    if scale is not None and tuple(scale.shape) != groups:
        _refuse("scale has shape", list(scale.shape), list(groups))
    if scale is not None and jnp.dtype(scale.dtype).name not in FLOAT_SCALES:
        _refuse("scale has dtype", scale.dtype, FLOAT_SCALES)
    return _check_table(table, spec) if spec.kind == "table" else None


def _check_table(table, spec):
    """The table as NumPy: its midpoints are constants of the program."""
    if table is None:
        _refuse("table is", None, f"the {2**spec.bits} values of the codes")
    table = np.asarray(table, np.float32)
    if table.shape != (2**spec.bits,) or not np.isfinite(table).all():
        _refuse("table is", list(table.shape), f"{2**spec.bits} finite values")
    return table

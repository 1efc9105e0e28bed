"""What is static about a TPU product, and what XLA prepares around its kernel.

Shared by the dense and the grouped product.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..weights import Weight, WeightSpec
from . import decode, specs
from .specs import Config


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call.

    Attributes:
      spec: the weight.
      tiles: tiles.
      dec: how codes are decoded.
      region: rows of the weight that are decoded and multiplied at a time.
      parts: bfloat16 terms of `x`.
      transpose: whether `W^T` is multiplied.
      has_zero: whether zero-points are arrays.
      stages: whether scale and zero are decoded into float32 scratch first.
      ragged: whether the last block of contracted columns is not whole.
      out: dtype that the kernel writes.
    """

    spec: WeightSpec
    tiles: Config
    dec: decode.Decoder
    region: int
    parts: int
    transpose: bool
    has_zero: bool
    stages: tuple[bool, bool]
    ragged: bool
    out: Any

    @property
    def regions(self):
        """Regions of a block."""
        return -(-self.spec.k // self.region)

    @property
    def rows(self):
        """`k`, padded to whole regions."""
        return self.regions * self.region

    @property
    def terms(self):
        """Operands whose sum is exact: entries of tables have more bits than codes."""
        return self.parts if self.spec.kind == "table" else 1

    @property
    def per(self):
        """Groups that share a product."""
        grouped = self.spec.groups > 1 and self.region > self.spec.group
        return self.region // self.spec.group if grouped else 1

    @property
    def after(self):
        """Whether scales are applied after the product."""
        return not self.tiles.prefill or self.parts > 1

    @property
    def corrects(self):
        """Whether there is anything to subtract: `zero - delta`."""
        return self.has_zero or self.dec.delta != 0

    @property
    def byte_rows(self):
        """Byte rows of a region."""
        return self.region * self.spec.bits // 8


def make_plan(
    spec: WeightSpec, tiles: Config, x: Any, w: Weight, transpose: bool, out_dtype: Any
) -> Plan:
    """The plan of a product.

    Args:
      spec: the weight.
      tiles: tiles.
      x: activations `[m, k]`.
      w: arrays of the weight.
      transpose: multiply by the transpose.
      out_dtype: dtype of the result.

    Returns:
      The plan.
    """
    many = tiles.prefill and not transpose
    dec = decode.decoder(
        spec,
        tiles.chip,
        natural=tiles.prefill or transpose,
        mixed=not tiles.prefill and not transpose,
    )
    ragged = transpose and spec.n % tiles.columns != 0

    def staged(a):
        return ragged or a.dtype not in (jnp.float32, jnp.bfloat16)

    half = jnp.dtype(out_dtype) == jnp.float16  # no such type in the kernels
    return Plan(
        spec=spec,
        tiles=tiles,
        dec=dec,
        region=decode.region(spec, dec, 1 if many else specs.TUNED[tiles.chip].depth),
        parts=specs.PARTS[x.dtype.name],
        transpose=transpose,
        has_zero=w.zero is not None,
        stages=(staged(w.scale), w.zero is not None and staged(w.zero)),
        ragged=ragged,
        out=jnp.dtype(jnp.float32 if half else out_dtype),
    )


def split(x: Any, parts: int) -> Any:
    """`parts` bfloat16 arrays, stacked in front, that sum to `x`."""
    if parts == 1:
        return x.astype(jnp.bfloat16)[None]
    found, rest = [], x.astype(jnp.float32)
    for _ in range(parts):
        # Rounding by bits: compilers may drop a pair of conversions.
        head = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        found.append(head.astype(jnp.bfloat16))
        rest = rest - head
    return jnp.stack(found)


def code_bytes(plan: Plan, codes: Any) -> Any:
    """Codes in the dtype that the decoder reads; a view of bytes costs XLA a copy."""
    if plan.spec.kind in decode.FLOAT8 and codes.dtype == jnp.uint8:
        return lax.bitcast_convert_type(codes, decode.FLOAT8[plan.spec.kind])
    return codes


def stored(a: Any) -> Any:
    """Scales or zeros as the kernel reads them: float16 and float8 as their bits."""
    if a is None or a.dtype in (jnp.float32, jnp.bfloat16, jnp.uint8):
        return a
    bits = jnp.int16 if a.dtype == jnp.float16 else jnp.int8
    return lax.bitcast_convert_type(a, bits)


def arranged(plan: Plan, x: Any) -> tuple[Any, Any]:
    """`x` as the left side of the kernel's products.

    Terms and copies for the groups of a region lie beside each other within a tile;
    copy `a` is zero outside the `a`-th group of each region.

    Args:
      plan: the product.
      x: `[m, k]`.

    Returns:
      bfloat16 `[m tiles * per * parts * rows, k]`, padded, and the float32 sums of
      groups `[m, groups]`, or None where nothing is to be subtracted.
    """
    spec, rows = plan.spec, plan.tiles.rows
    m = x.shape[0]
    x = jnp.pad(x, ((0, -m % rows), (0, plan.rows - spec.k)))
    tiles = x.shape[0] // rows
    sums = None
    if plan.after and plan.corrects:
        width = spec.group if spec.groups > 1 else plan.rows
        short = max(0, spec.groups * width - plan.rows)
        groups = jnp.pad(x, ((0, 0), (0, short)))
        groups = groups[:, : spec.groups * width].astype(jnp.float32)
        sums = jnp.sum(groups.reshape(-1, spec.groups, width), axis=-1)
    terms = split(x, plan.parts if plan.after else 1)
    per = plan.per if plan.after else 1
    if per > 1 or not plan.dec.natural:
        order = plan.dec.order(plan.region)
        matrix = decode.permutation(order, per, spec.group)
        terms = terms.reshape(*terms.shape[:2], plan.regions, plan.region)
        terms = lax.dot_general(
            terms,
            jnp.asarray(matrix, jnp.bfloat16),
            (((3,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        ).astype(jnp.bfloat16)  # [parts, m, regions, per, region]
        terms = jnp.moveaxis(terms, 3, 0).reshape(per, -1, *x.shape)
    else:
        terms = terms[None]
    terms = terms.reshape(-1, tiles, rows, plan.rows)
    terms = jnp.moveaxis(terms, 1, 0).reshape(-1, plan.rows)
    return terms, sums


def blocks(
    plan: Plan, w: Weight, column: Callable[[Any, Any], Any]
) -> dict[str, tuple[Any, pl.BlockSpec]]:
    """Operands of the weight.

    Args:
      plan: the product.
      w: arrays with a leading axis of layers.
      column: the block of columns at two grid indices.

    Returns:
      Arrays and their blocks, by name.
    """
    columns = plan.tiles.columns

    def block(rows):
        return pl.BlockSpec(
            (None, rows, columns), lambda i, j, layer: (layer[0], 0, column(i, j))
        )

    found = {"codes": (w.codes, block(w.codes.shape[1]))}
    found["scale"] = (w.scale, block(w.scale.shape[1]))
    if w.zero is not None:
        found["zero"] = (w.zero, block(w.zero.shape[1]))
    if w.table is not None:
        shape = (None, *w.table.shape[1:])
        table = pl.BlockSpec(shape, lambda i, j, layer: (layer[0], 0, 0, 0))
        found["table"] = (w.table, table)
    order = plan.dec.order(plan.region)
    if plan.per > 1 and not plan.dec.natural and not plan.after:
        groups = np.broadcast_to((order // plan.spec.group)[:, None], (len(order), 128))
        groups = jnp.asarray(groups, jnp.int32)
        whole = pl.BlockSpec(groups.shape, lambda i, j, layer: (0, 0))
        found["groups"] = (groups, whole)
    return found


def staging(plan: Plan) -> dict[str, Any]:
    """Scratch for scales and zeros that are decoded first."""
    shape = (plan.spec.groups, plan.tiles.columns)
    return {
        "staged_" + name: pltpu.VMEM(shape, jnp.float32)
        for name, staged in zip(("scale", "zero"), plan.stages, strict=True)
        if staged
    }

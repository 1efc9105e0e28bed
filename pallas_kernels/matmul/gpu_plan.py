"""The static numbers of a Hopper product."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .. import hopper
from ..weights import KernelError, Weight, WeightSpec
from . import gpu_layout
from .gpu_specs import Config

NAME = "matmul_hopper"


@dataclasses.dataclass(frozen=True)
class Plan(hopper.Schedule):
    """A product with all its static numbers.

    Attributes:
      spec: the weight.
      transpose: whether `W^T` is multiplied.
      dtype: of `x`.
      out_dtype: of the result.
      scale_dtype: of the scales, as stored.
      zero: dtype of the zero-points, "" without.
      stacked: arrays have a leading axis, the layers.
      biased: the kernel adds the bias.
    """

    spec: WeightSpec
    transpose: bool
    dtype: str
    out_dtype: str
    scale_dtype: str
    zero: str
    stacked: bool
    biased: bool

    @property
    def deep(self) -> int:
        """Rows of the weight (axis k) that a step touches."""
        return self.width if self.transpose else self.config.rows

    @property
    def lanes(self) -> int:
        """Columns of the weight (axis n) that a step touches."""
        return 64 if self.transpose else self.width

    @property
    def pieces(self) -> int:
        """Rows of scales per step."""
        group = self.spec.group
        return 1 if group >= self.spec.k else max(1, self.deep // group)

    @property
    def single(self) -> bool:
        """One scale per column."""
        return self.spec.group >= self.spec.k

    @property
    def mode(self) -> str:
        """Where scales multiply: "end", "post" or "pre"."""
        # Four warpgroups have no registers for the sums that zero-points need.
        crowded = self.zero and self.config.tokens > 8 and self.config.warpgroups > 2
        if self.transpose or crowded:
            return "pre"
        if self.single:
            return "end"
        exact = self.config.post and self.spec.group % 64 == 0
        return "post" if exact else "pre"

    @property
    def decode(self) -> hopper.Decode:
        """How a block is decoded."""
        spec, pre = self.spec, self.mode == "pre"
        scales = max(1, 64 // spec.group) if pre and not self.single else int(pre)
        integer = spec.kind == "int"
        return hopper.Decode(
            gpu_layout.codec(spec),
            self.dtype,
            self.offset if integer else 0.0,
            scales,
            shifted=pre and bool(self.zero),
            centered=pre and bool(self.zero) and integer,
        )

    @property
    def offset(self) -> float:
        """Subtracted from stored integer codes."""
        unsigned = self.spec.bits == 8 and self.spec.layout == gpu_layout.TAGS[0]
        return self.spec.offset - (128 if unsigned else 0)

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        """What the kernel writes."""
        if self.config.split:
            tokens = self.m_tiles * self.config.tokens
            shape = (self.shares, self.outer, tokens)
            return jax.ShapeDtypeStruct(shape, jnp.float32)
        shape = (self.tokens, self.outer)  # copies leave rows beyond the last out
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.out_dtype))


def make_plan(
    spec: WeightSpec,
    x: Any,
    w: Weight,
    config: Config,
    out_dtype: Any,
    transpose: bool,
    biased: bool = False,
    single: bool = False,
) -> Plan:
    """The plan of a product.

    Args:
      spec: the weight.
      x: activations as the kernel reads them.
      w: arrays of the weight.
      config: tiles.
      out_dtype: dtype of the result.
      transpose: multiply by the transpose.
      biased: there is a bias.
      single: `x` holds the three parts of float32 activations.

    Returns:
      The plan.

    Raises:
      KernelError: `config` does not fit the product.
    """
    rows, columns = gpu_layout.padded(spec)
    outer, inner = (rows, columns) if transpose else (columns, rows)
    made = Plan(
        config=config,
        outer=outer,
        inner=inner,
        tokens=x.shape[0],
        spec=spec,
        transpose=transpose,
        dtype=jnp.dtype(x.dtype).name,
        out_dtype=jnp.dtype(out_dtype).name,
        scale_dtype=jnp.dtype(w.scale.dtype).name,
        zero="" if w.zero is None else jnp.dtype(w.zero.dtype).name,
        stacked=w.codes.ndim == 3,
        biased=biased and not config.split,
    )

    narrow = jnp.dtype(out_dtype).itemsize == 2 and x.dtype.itemsize == 2
    if config.rows != 64 and (config.rows != 128 or transpose):
        reason = "rows"
    elif single and made.mode == "pre":
        reason = "float32 x needs `post`"
    else:
        reason = made.obstacle(narrow)
    if reason is not None:
        raise KernelError(f"{NAME}: config {config}: {reason}")
    return made

"""The static numbers of a product with 8-bit activations on Hopper."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .. import hopper
from ..weights import KernelError, Weight, WeightSpec
from . import layout, specs
from .gpu_operand import DEEP

NAME = "matmul_a8_hopper"


@dataclasses.dataclass(frozen=True)
class Plan(hopper.Schedule):
    """A product with all its static numbers.

    Attributes:
      spec: the weight.
      dtype: 8-bit type of the activations.
      out_dtype: of the result.
      scale_dtype: in which scales are read.
      zero_dtype: in which zero-points are read, "" without.
      stacked: arrays have a leading axis, the layers.
    """

    spec: WeightSpec
    dtype: str
    out_dtype: str
    scale_dtype: str
    zero_dtype: str
    stacked: bool

    @property
    def zero(self) -> bool:
        """Whether zero-points are arrays."""
        return bool(self.zero_dtype)

    @property
    def integer(self) -> bool:
        """Whether sums are int32."""
        return self.dtype == "int8"

    @property
    def single(self) -> bool:
        """One scale per column."""
        return self.spec.group >= self.spec.k

    @property
    def parts(self) -> int:
        """Groups in 128 rows."""
        return 1 if self.single else max(1, DEEP // self.spec.group)

    @property
    def pieces(self) -> int:
        """Rows of scales per step."""
        return 1 if self.single else max(1, self.config.rows // self.spec.group)

    @property
    def factor(self) -> float:
        """Sums times this are sums of codes."""
        if self.spec.bits == 8:
            return 1.0
        return 2.0**-4 if self.integer else 2.0**9

    @property
    def offset(self) -> float:
        """Subtracted from stored codes beside `zero`."""
        return _offset(self.spec, self.dtype)

    @property
    def rest(self) -> bool:
        """Whether sums of the activations are needed."""
        return self.zero or self.offset != 0

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        """What the kernel writes."""
        tokens = self.m_tiles * self.config.tokens
        if self.config.split:
            return jax.ShapeDtypeStruct((self.shares, self.outer, tokens), jnp.float32)
        return jax.ShapeDtypeStruct((tokens, self.outer), jnp.dtype(self.out_dtype))


def _offset(spec, activation):
    """What is still to subtract from stored codes, beside zero-points."""
    if spec.kind != "int":
        return 0.0
    shift = 0.0 if spec.layout == layout.TAGS[1] else 128.0
    if spec.bits == 4:
        shift = 8.0 if activation == "int8" else 0.0
    return spec.offset - shift


def needs_sums(spec: WeightSpec, w: Weight, activation: str) -> bool:
    """Whether sums of the activations are needed: `Plan.rest` before there is one."""
    return w.zero is not None or _offset(spec, activation) != 0


def read_type(stat: Any) -> Any:
    """The type in which the kernel reads scales or zero-points."""
    kept = (jnp.float32, jnp.bfloat16, jnp.float16)
    return stat.dtype if stat.dtype in kept else jnp.float32


def make_plan(
    spec: WeightSpec, w: Weight, x: Any, config: specs.GpuConfig, out: Any
) -> Plan:
    """The plan of a product.

    Args:
      spec: the weight.
      w: its arrays.
      x: codes of the activations.
      config: tiles.
      out: dtype of the result.

    Returns:
      The plan.

    Raises:
      KernelError: `config` does not fit the product.
    """
    rows, columns = layout.padded(spec)
    made = Plan(
        config=config,
        outer=columns,
        inner=rows,
        tokens=x.shape[0],
        spec=spec,
        dtype=jnp.dtype(x.dtype).name,
        out_dtype=jnp.dtype(out).name,
        scale_dtype=jnp.dtype(read_type(w.scale)).name,
        zero_dtype="" if w.zero is None else jnp.dtype(read_type(w.zero)).name,
        stacked=w.codes.ndim == (4 if spec.bits == 4 else 3),
    )
    group = spec.group
    if config.rows % DEEP:
        reason = f"rows are not a multiple of {DEEP}"
    elif rows % config.rows:
        reason = "rows do not divide k"
    elif not made.single and group % config.rows and config.rows % group:
        reason = f"rows do not hold whole groups of {group}"
    else:
        reason = made.obstacle(jnp.dtype(out).itemsize == 2)
    if reason is not None:
        raise KernelError(f"{NAME}: config {config}: {reason}")
    return made

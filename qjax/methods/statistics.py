"""What calibration tells a method about the inputs of one weight.

A `Statistics` is a pytree of running sums over tokens, so that batches, devices and
interrupted runs add up: `a + b` is the statistics of both. Methods that need one name
the fields in `Method.needs`; `qjax.calibration` collects exactly those.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over the tokens a weight `[in, out]` has seen; all leaves float32.

    With `x` the inputs of the layer in the model quantized so far and `r` those in the
    original model. Statistics of a batched kernel `[*batch, in, out]` have leading axes
    `[*batch]` on every leaf, one set of sums per matrix; `part` gives one of them.

    Attributes:
      count: number of tokens, scalar.
      total: sum of `x`, `[in]`.
      size: sum of `|x|`, `[in]`.
      square: sum of `x^2`, `[in]`.
      peak: maximum of `|x|`, `[in]`.
      hessian: sum of `x x^T`, `[in, in]`, or None when it was not asked for.
      cross: sum of `r x^T`, `[in, in]`, or None.
      gradient: sum over tokens of the squared loss gradient of each weight,
        `[in, out]`, the diagonal Fisher information, or None.
    """

    count: Float[Array, ""]
    total: Float[Array, " in"]
    size: Float[Array, " in"]
    square: Float[Array, " in"]
    peak: Float[Array, " in"]
    hessian: Float[Array, "in in"] | None = None
    cross: Float[Array, "in in"] | None = None
    gradient: Float[Array, "in out"] | None = None

    @classmethod
    def zeros(
        cls,
        features: int,
        *,
        hessian: bool = False,
        cross: bool = False,
        gradient: tuple[int, int] | None = None,
    ) -> "Statistics":
        """Statistics of no tokens.

        Args:
          features: the `in` axis.
          hessian: collect second moments.
          cross: collect products with the original inputs.
          gradient: shape of the weight whose squared gradients are collected.
        """

        def zeros(*shape: int) -> Array:  # arrays of their own, so they can be donated
            return jnp.zeros(shape, jnp.float32)

        return cls(
            count=zeros(),
            total=zeros(features),
            size=zeros(features),
            square=zeros(features),
            peak=zeros(features),
            hessian=zeros(features, features) if hessian else None,
            cross=zeros(features, features) if cross else None,
            gradient=zeros(*gradient) if gradient else None,
        )

    def add(
        self,
        x: Float[Array, "*tokens in"],
        reference: Float[Array, "*tokens in"] | None = None,
        weight: Float[Array, "*tokens"] | None = None,
    ) -> "Statistics":
        """Statistics with a batch of inputs added.

        Args:
          x: inputs of the layer.
          reference: inputs of the same tokens in the original model, for `cross`.
          weight: 1 for tokens that count and 0 for padding; default all count.
        """
        x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        count = jnp.asarray(x.shape[0], jnp.float32)
        if weight is not None:
            keep = (weight.reshape(-1, 1) > 0).astype(jnp.float32)
            x, count = x * keep, jnp.sum(keep)
        hessian, cross = self.hessian, self.cross
        if hessian is not None:
            hessian = hessian + jnp.matmul(x.T, x, precision="highest")
        if cross is not None:
            if reference is None:
                raise SpecError("Statistics.add: cross moments need reference inputs")
            r = reference.reshape(x.shape).astype(jnp.float32)
            cross = cross + jnp.matmul(r.T, x, precision="highest")
        return Statistics(
            self.count + count,
            self.total + jnp.sum(x, axis=0),
            self.size + jnp.sum(jnp.abs(x), axis=0),
            self.square + jnp.sum(jnp.square(x), axis=0),
            jnp.maximum(self.peak, jnp.max(jnp.abs(x), axis=0, initial=0.0)),
            hessian,
            cross,
            self.gradient,
        )

    def __add__(self, other: "Statistics") -> "Statistics":
        """Statistics of the tokens of both."""
        added = jax.tree.map(jnp.add, self, other)
        peak = jnp.maximum(self.peak, other.peak)
        return dataclasses.replace(added, peak=peak)

    def part(self, index: tuple[int, ...]) -> "Statistics":
        """Statistics of one matrix of a batched kernel."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def mean_hessian(self) -> Float[Array, "in in"]:
        """`2 / n sum x x^T`, the Hessian of the mean squared error of the output.

        Raises:
          SpecError: second moments were not collected.
        """
        if self.hessian is None:
            raise SpecError(
                "this method needs the Hessian of the layer's inputs; quantize the "
                "model with calibration=..., or collect Statistics with hessian=True"
            )
        return self.hessian * (2.0 / jnp.maximum(self.count, 1.0))

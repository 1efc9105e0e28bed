"""Half-quadratic quantization: fit zero-points (and scales) to a sparse error norm.

Minimizes `sum |w - (c - z) s|^p` with `p < 1` by half-quadratic splitting: an auxiliary
error `e = shrink(w - w_r; beta, p)` absorbs outliers, then `z` (and, with
`joint_scale`, `s`) is the least-squares solution for `w - e`:

    e = sign(r) relu(|r| - |r|^(p - 1) / beta),  z = mean(c - (w - e) / s),
    beta <- kappa beta  at every iteration.

Differences from the reference package, all towards lower error: the beta schedule runs,
the best iterate is kept per group (by mean absolute error, as stored) instead of the
last one for the whole tensor, and scales can be fitted too.

Reference: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning
Models, 2023; hqq 0.2.8 `core/optimize.py`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format, Int
from qjax.methods.base import Method
from qjax.methods.problem import Problem, keep_better
from qjax.methods.statistics import Statistics
from qjax.tensor import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class HQQ(Method):
    """Half-quadratic quantization for `Int` formats of 1 to 8 bits, either axis.

    Attributes:
      lp_norm: the `p` of the error norm, in (0, 1].
      beta: first penalty weight.
      kappa: growth of `beta` per iteration, at least 1.
      iterations: iterations; more change the error by less than one part in a thousand
        (`benchmarks/quantize.py`).
      joint_scale: also refit scales (always done for symmetric formats, which have
        nothing else to fit).

    Raises:
      SpecError: a field is out of range.
    """

    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 12
    joint_scale: bool = True

    def __post_init__(self) -> None:
        if not (0 < self.lp_norm <= 1 and self.beta > 0 and self.kappa >= 1):
            raise SpecError(
                "HQQ: needs 0 < lp_norm <= 1, beta > 0 and kappa >= 1; "
                f"got lp_norm={self.lp_norm}, beta={self.beta}, kappa={self.kappa}"
            )
        if type(self.iterations) is not int or self.iterations < 1:
            raise SpecError(
                f"HQQ: iterations is {self.iterations!r}, expected a positive integer"
            )

    @property
    def name(self) -> str:
        """`hqq`."""
        return "hqq"

    def __call__(
        self,
        w: Float[Array, "*lead in out"],
        fmt: Format,
        *,
        importance: Float[Array, "..."] | None = None,
        key: Array | None = None,
        statistics: Statistics | None = None,
        shared: Any = None,
    ) -> QuantizedTensor:
        """See `Method.__call__`. `importance` weighs the least-squares solutions."""
        del key, statistics, shared
        if not isinstance(fmt, Int):
            raise SpecError(f"HQQ fits integer formats (Int), got {fmt.name}")
        p = Problem.build(w, fmt, importance)
        scale, zero = p.from_range(*p.full_range())
        start = (jnp.full_like(scale, jnp.inf), scale, zero)
        state = (start, scale, zero)
        state = jax.lax.fori_loop(
            0, self.iterations, lambda i, s: self._step(p, i, s), state
        )
        best, scale, zero = state
        miss = _mean(jnp.abs(p.w - p.levels(scale, zero) * scale), p.weight)
        _, scale, zero = keep_better(best, miss, scale, zero)
        return p.finish(scale, zero)

    def _step(self, p: Problem, i, state):
        """Scores the current iterate, then moves to the next."""
        best, scale, zero = state
        levels = p.levels(scale, zero)
        residual = p.w - levels * scale
        size = jnp.abs(residual)
        beta = self.beta * jnp.power(self.kappa, i.astype(jnp.float32))
        # |r|^(p - 1) / beta; at r = 0 the exponential is finite and relu gives 0.
        power = jnp.log(jnp.maximum(size, 1e-30)) * (self.lp_norm - 1.0)
        kept = jax.nn.relu(size - jnp.exp(power) / beta)
        target = p.w - jnp.sign(residual) * kept
        # Written out once: XLA would compute both again inside each of five sums.
        levels, target = jax.lax.optimization_barrier((levels, target))
        size = jnp.abs(p.w - levels * scale)
        best = keep_better(best, _mean(size, p.weight), scale, zero)
        square, product = levels * levels, levels * target
        if zero is None:
            fitted = _ratio(_mean(product, p.weight), _mean(square, p.weight), scale)
            return best, p.stored(fitted), None
        c, t = _mean(levels, p.weight), _mean(target, p.weight)
        if self.joint_scale:
            spread = _mean(square, p.weight) - c * c
            scale = p.stored(_ratio(_mean(product, p.weight) - c * t, spread, scale))
        return best, scale, p.stored_zero(zero + c - t / scale)


def _mean(x, weight):
    if weight is None:
        return jnp.mean(x, axis=-2, keepdims=True)
    total = jnp.sum(jnp.broadcast_to(weight, x.shape), axis=-2, keepdims=True)
    mass = jnp.sum(x * weight, axis=-2, keepdims=True)
    return mass / jnp.where(total > 0, total, 1.0)


def _ratio(top, bottom, scale):
    """The least-squares scale `top / bottom`, the old one where undefined."""
    fitted = top / jnp.where(bottom > 0, bottom, 1.0)
    return jnp.where((bottom > 0) & (fitted > 0), fitted, scale)

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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format, Int
from qjax.methods.base import Method
from qjax.methods.rtn import Problem
from qjax.tensor import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class HQQ(Method):
    """Half-quadratic quantization for `Int` formats of 1 to 8 bits, either axis.

    Attributes:
      lp_norm: the `p` of the error norm, in (0, 1].
      beta: first penalty weight.
      kappa: growth of `beta` per iteration, at least 1.
      iterations: iterations.
      joint_scale: also refit scales (always done for symmetric formats, which have
        nothing else to fit).

    Raises:
      SpecError: a field is out of range.
    """

    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
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
    ) -> QuantizedTensor:
        """See `Method.__call__`. `importance` weighs the least-squares solutions."""
        if not isinstance(fmt, Int):
            raise SpecError(f"HQQ fits integer formats (Int), got {fmt.name}")
        p = Problem.build(w, fmt, importance)
        scale, zero = p.from_range(*p.full_range())
        start = (self._miss(p, scale, zero), scale, zero, scale, zero)
        step = lambda i, state: self._step(p, i, state)  # noqa: E731
        best = jax.lax.fori_loop(0, self.iterations, step, start)
        return p.finish(best[1], best[2])

    def _miss(self, p: Problem, scale, zero):
        """Mean absolute error of each group (padding excluded)."""
        miss = jnp.abs(p.w - p.levels(scale, zero) * scale)
        return _mean(miss, p.weight)

    def _step(self, p: Problem, i, state):
        best, best_scale, best_zero, scale, zero = state
        levels = p.levels(scale, zero)
        residual = p.w - levels * scale
        beta = self.beta * jnp.power(self.kappa, i.astype(jnp.float32))
        size = jnp.abs(residual)
        safe = jnp.where(size > 0, size, 1.0)
        cut = jnp.where(size > 0, safe ** (self.lp_norm - 1.0) / beta, 0.0)
        target = p.w - jnp.sign(residual) * jax.nn.relu(size - cut)
        if zero is None:
            scale = p.stored(_fit_scale(levels, target, p.weight, scale))
        else:
            codes = levels + zero
            if self.joint_scale:
                centred = codes - _mean(codes, p.weight)
                aimed = target - _mean(target, p.weight)
                scale = p.stored(_fit_scale(centred, aimed, p.weight, scale))
            zero = p.stored_zero(_mean(codes - target / scale, p.weight))
        miss = self._miss(p, scale, zero)
        better = miss < best
        if zero is not None:
            best_zero = jnp.where(better, zero, best_zero)
        best_scale = jnp.where(better, scale, best_scale)
        return jnp.minimum(miss, best), best_scale, best_zero, scale, zero


def _mean(x, weight):
    if weight is None:
        return jnp.mean(x, axis=-2, keepdims=True)
    total = jnp.sum(jnp.broadcast_to(weight, x.shape), axis=-2, keepdims=True)
    mass = jnp.sum(x * weight, axis=-2, keepdims=True)
    return mass / jnp.where(total > 0, total, 1.0)


def _fit_scale(levels, target, weight, scale):
    """Least-squares scale of `target ~ levels * s`, the old one where undefined."""
    top, bottom = _mean(levels * target, weight), _mean(levels * levels, weight)
    fitted = top / jnp.where(bottom > 0, bottom, 1.0)
    return jnp.where((bottom > 0) & (fitted > 0), fitted, scale)

"""Low-rank repair of the rounding error: `w ~ base + a b`.

With `E = w - base` the product of rank `r` that minimizes the output error
`tr((E - ab)^T H (E - ab))` is `E V V^T`, `V` the leading `r` right singular vectors of
`L^T E` for any `L L^T = H`: `a = E V`, `b = V^T`. No inverse of `H` is needed, so a
singular one is as good. With `H = I` this is the truncated SVD.

`iterations` beyond the first alternate: the base is quantized again for `w - a b`, and
the better pair is kept.

Cost: an eigendecomposition of the smaller side, and where `in < out` one of `H`; the
factors take `16 r (in + out)` bits.

Reference: Li et al., LoftQ, arXiv 2310.08659, algorithm 1 (alternation); Liu et al.,
EoRA, arXiv 2410.21271, section 3 (the SVD in the space of activations).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.formats.base import FLOAT_SCALES, check_choice
from qjax.methods.base import Method
from qjax.methods.blockwise import check_steps
from qjax.methods.statistics import Statistics
from qjax.tensor import QuantizedTensor
from qjax.wrappers import LowRank


@dataclasses.dataclass(frozen=True)
class LowRankRepair(Method):
    """Another method, and a product of two thin matrices for what it gets wrong.

    Attributes:
      inner: the method that quantizes the base.
      rank: columns of `a`, at most the smaller side of the weight.
      hessian: measure the error at the layer's output; needs the Hessian.
      iterations: times the base is quantized; beyond one, LoftQ's alternation.
      dtype: of the factors.

    Raises:
      SpecError: a field is out of range.
    """

    inner: Method
    rank: int = 16
    hessian: bool = True
    iterations: int = 1
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_steps("LowRankRepair", rank=self.rank, iterations=self.iterations)
        check_choice("LowRankRepair", "dtype", self.dtype, FLOAT_SCALES)
        if not isinstance(self.inner, Method) or isinstance(self.inner, LowRankRepair):
            raise SpecError(
                f"LowRankRepair: inner is {self.inner!r}, expected a method other than "
                "LowRankRepair, for example RTN()"
            )

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner method's, and the Hessian where it is used."""
        own = frozenset({"hessian"}) if self.hessian else frozenset()
        return self.inner.needs | own

    @property
    def name(self) -> str:
        """For example `rtn-lowrank16`."""
        return f"{self.inner.name}-lowrank{self.rank}"

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Any:
        """What the inner method shares."""
        return self.inner.prepare(weights, fmt, statistics)

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
        """See `Method.__call__`. Without `hessian`, `importance` is for `inner` only.

        Raises:
          SpecError: also when the rank exceeds a side of the weight.
        """
        moments = None
        if self.needs:
            statistics = self.check_statistics(statistics)
            moments = statistics.mean_hessian() if self.hessian else None
        if self.rank > min(w.shape[-2:]):
            raise SpecError(
                f"{self.name}: rank {self.rank} of a weight {list(w.shape)}; expected "
                f"at most {min(w.shape[-2:])}"
            )
        exact = w.astype(jnp.float32)

        def quantized(target):
            return self.inner(
                target,
                fmt,
                importance=importance,
                key=key,
                statistics=statistics,
                shared=shared,
            )

        best, target = None, exact
        for _ in range(self.iterations):
            base = quantized(target)
            rest = exact - base.dequantize(jnp.float32)
            a, b = low_rank_factors(rest, self.rank, moments)
            a, b = a.astype(self.dtype), b.astype(self.dtype)
            new = LowRank(base, a, b)
            product = new.compose(jnp.zeros_like(exact))
            error = _error(rest - product, moments)
            best = (error, new) if best is None else _better(best, (error, new))
            target = exact - product
        assert best is not None  # iterations >= 1
        return best[1]


def low_rank_factors(
    e: Float[Array, "*lead in out"],
    rank: int,
    hessian: Float[Array, "in in"] | None = None,
) -> tuple[Float[Array, "*lead in rank"], Float[Array, "*lead rank out"]]:
    """The product `a b` of a rank that is nearest to `e` in the norm of a Hessian.

    Minimizes `tr((e - ab)^T H (e - ab))`. The two factors have columns and rows of
    equal length, so that both suit 16 bits.

    Args:
      e: the matrix.
      rank: at most the smaller side.
      hessian: symmetric positive semidefinite; None for the identity.

    Returns:
      `a` and `b`, float32.
    """
    rows, cols = e.shape[-2:]
    if cols <= rows:
        right = e if hessian is None else _product(hessian, e)
        v = _leading(_product(_turned(e), right), rank)
    else:
        m = e if hessian is None else _product(_turned(_root(hessian)), e)
        u = _leading(_product(m, _turned(m)), rank)
        # Orthonormal also where singular values are lost in rounding; a direction
        # too many does no harm.
        v = jnp.linalg.qr(_product(_turned(m), u))[0]
    a = _product(e, v)
    size = jnp.sqrt(jnp.linalg.norm(a, axis=-2, keepdims=True))
    safe = jnp.where(size > 0, size, 1.0)
    return a / safe, _turned(v * size)


def _leading(m, rank):
    """Eigenvectors of the largest eigenvalues of a symmetric matrix, as columns."""
    return jnp.linalg.eigh(m)[1][..., ::-1][..., :rank]


def _root(h):
    """`L` with `L L^T = h`, negative eigenvalues of rounding taken as zero."""
    values, vectors = jnp.linalg.eigh(h)
    return vectors * jnp.sqrt(jnp.maximum(values, 0.0))


def _product(a, b):
    return jnp.matmul(a, b, precision="highest")


def _turned(x):
    return jnp.swapaxes(x, -1, -2)


def _error(e, hessian):
    """Error of each matrix of a stack."""
    weighted = e if hessian is None else _product(hessian, e)
    return jnp.sum(e * weighted, axis=(-2, -1))


def _better(old, new):
    """Per matrix of a stack, the pair of lesser error."""
    improved = new[0] < old[0]

    def pick(a, b):
        lead = improved.reshape(*improved.shape, *[1] * (a.ndim - improved.ndim))
        return jnp.where(lead, a, b)

    return pick(new[0], old[0]), jax.tree.map(pick, new[1], old[1])

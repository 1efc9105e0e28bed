"""K-means tables: values fitted to a weight, one table per column or per matrix.

Errors are weighted: by the diagonal Fisher information where statistics hold it, else
by the diagonal of the Hessian of the inputs, else not at all. The weights with the
largest influence on the scale of things may be kept apart, sparse (`outliers`), as in
SqueezeLLM. With `feedback` codes and tables are then fitted to the whole Hessian: error
feedback for the first codes, and least squares for the tables and coordinate descent
for the codes in turns.

Cost: a sort of every column and a dynamic program over 128 bins; `feedback` adds about
`in^2 out` multiplications per sweep and per step of least squares.

Reference: Kim et al., SqueezeLLM, arXiv 2306.07629; Kim et al., GuidedQuant, arXiv
2505.07004, section 4.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format, KMeans
from qjax.formats.base import check_choice
from qjax.methods.base import Method
from qjax.methods.hessian import damped, factor
from qjax.methods.sparse import beyond_quartiles, largest, with_outliers
from qjax.methods.statistics import Statistics
from qjax.methods.tables import fit, fit_hessian
from qjax.tensor import QuantizedTensor, assemble

WEIGHTINGS = ("auto", "none", "square", "gradient")


@dataclasses.dataclass(frozen=True)
class Lloyd(Method):
    """Weighted k-means tables for `KMeans` formats.

    Attributes:
      iterations: Lloyd iterations.
      weighting: of squared errors: `gradient` (the diagonal Fisher information, as in
        SqueezeLLM), `square` (mean squares of inputs), `none`, or `auto`: the first of
        these that the statistics hold.
      outliers: share of weights farthest outside the quartiles that is kept in float16
        (SqueezeLLM: 0.004).
      sensitive: share with the largest weighted error that is kept besides
        (SqueezeLLM: 0.0005, by weight alone).
      feedback: fit codes and tables to the Hessian, which is then needed.
      damp: share of the mean diagonal added to the Hessian.
      rounds: with `feedback`, times that tables and codes are fitted in turns.

    Raises:
      SpecError: a field is out of range.
    """

    iterations: int = 50
    weighting: str = "auto"
    outliers: float = 0.0
    sensitive: float = 0.0
    feedback: bool = False
    damp: float = 0.01
    rounds: int = 3

    def __post_init__(self) -> None:
        check_choice("Lloyd", "weighting", self.weighting, WEIGHTINGS)
        for field in ("iterations", "rounds"):
            value = getattr(self, field)
            if type(value) is not int or value < 0:
                raise SpecError(
                    f"Lloyd: {field} is {value!r}, expected an integer >= 0"
                )
        for field in ("outliers", "sensitive", "damp"):
            value = getattr(self, field)
            if not 0 <= value < 0.5:
                raise SpecError(f"Lloyd: {field} is {value!r}, expected 0 <= x < 0.5")

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The Hessian for `feedback`, and what `weighting` names."""
        named = () if self.weighting in ("auto", "none") else (self.weighting,)
        return frozenset((*named, "hessian") if self.feedback else named)

    @property
    def uses(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Mean squares of inputs, for `auto`."""
        return frozenset({"square"} if self.weighting == "auto" else ())

    @property
    def name(self) -> str:
        """`lloyd`, with `-feedback` and `-sparse`."""
        parts = ["lloyd"]
        parts += ["feedback"] if self.feedback else []
        parts += ["sparse"] if self.outliers or self.sensitive else []
        return "-".join(parts)

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Any:
        """The factor of the damped Hessian, with `feedback`."""
        del weights, fmt
        if not self.feedback:
            return None
        return factor(self.check_statistics(statistics).mean_hessian(), self.damp)[0]

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
        """See `Method.__call__`; `importance` replaces the weights of statistics."""
        del key
        if not isinstance(fmt, KMeans):
            raise SpecError(
                f"{self.name}: fits learned tables (KMeans), got {fmt.name}; "
                "use fmt=KMeans(bits)"
            )
        if self.needs:
            statistics = self.check_statistics(statistics)
        w = w.astype(jnp.float32)
        weight = importance
        if weight is None:
            weight = self._weights(statistics)
        weight = jnp.broadcast_to(weight.astype(jnp.float32), w.shape)
        hessian = factored = None
        if self.feedback:
            assert statistics is not None  # checked with `needs`
            mean = statistics.mean_hessian()
            factored = factor(mean, self.damp)[0] if shared is None else shared
            hessian = damped(mean, self.damp)

        def one(w, weight):
            return self._matrix(w, weight, fmt, hessian, factored)

        for _ in w.shape[:-2]:
            one = jax.vmap(one)
        return one(w, weight)

    def _weights(self, statistics: Statistics | None):
        """Weights of squared errors, broadcastable to a matrix."""
        kind = self.weighting
        if statistics is None or kind == "none":
            return jnp.ones((1, 1), jnp.float32)
        if kind == "gradient" or (kind == "auto" and statistics.gradient is not None):
            assert statistics.gradient is not None  # `auto`, or checked with `needs`
            return statistics.gradient
        return statistics.square[:, None]

    def _matrix(self, w, weight, fmt: KMeans, hessian, factored) -> QuantizedTensor:
        """Quantizes one matrix, apart from its outliers."""
        matrix = (w.shape[0], w.shape[1])
        fixed = self._outliers(w, weight, fmt)
        if fixed is not None:
            weight = jnp.where(fixed, 0.0, weight)
        grid = fit(w, weight, fmt, self.iterations)
        if hessian is None:
            codes = grid.codes(w, fmt.group)
        else:
            grid, codes = fit_hessian(
                w, fmt, grid, hessian, factored, self.rounds, fixed
            )
        if fmt.group is None:
            tables = grid.table.astype(fmt.table_dtype)
            base = assemble(fmt, codes, None, matrix, codebook=tables)
        else:
            scale = grid.scale.astype(fmt.scale_dtype)
            base = assemble(fmt, codes, scale, matrix, codebook=grid.table)
        if fixed is None:
            return base
        count = self._count(w.size, self.outliers) + self._count(w.size, self.sensitive)
        miss = w - grid.values(codes, fmt.group)
        return with_outliers(base, miss, fixed, count)

    def _count(self, size: int, share: float) -> int:
        return round(size * share)

    def _outliers(self, w, weight, fmt: KMeans):
        """Which weights are kept apart: an exact number of them, or None for none."""
        far = self._count(w.size, self.outliers)
        rest = self._count(w.size, self.sensitive)
        if not far + rest:
            return None
        fixed = largest(beyond_quartiles(w), far)
        if rest:
            kept = jnp.where(fixed, 0.0, weight)
            grid = fit(w, kept, fmt, self.iterations)
            miss = w - grid.values(grid.codes(w, fmt.group), fmt.group)
            gain = weight * jnp.square(miss)
            fixed = fixed | largest(jnp.where(fixed, -1.0, gain), rest)
        return fixed

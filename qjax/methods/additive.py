"""Additive vector codes fitted to the output error of a layer, after AQLM.

Codebooks start from residual k-means of the groups of weights. Codes are then chosen
group by group, first with error feedback, later by coordinate descent: for the error
that all other groups leave, a beam search finds the sum of vectors nearest in the
metric of the group's diagonal block of the Hessian. Between passes codebooks and scales
are solved for by least squares. The best iterate, with tables as stored, is kept.

AQLM searches the same codes by beams over whole rows and fits codebooks by Adam; the
objective is the same.

Cost of a pass: `in / group * out * beam * codebooks * 2**bits * group` multiplications,
which for 16 bits is slow on large layers, and `2 in^2 out` for the Hessian.

Reference: Egiazarian et al., AQLM, arXiv 2401.06118, section 3.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.additive import AdditiveTensor, decode_additive
from qjax.errors import SpecError
from qjax.formats import Additive, Format
from qjax.methods.base import Method
from qjax.methods.hessian import damped, factor, output_error
from qjax.methods.statistics import Statistics
from qjax.methods.sweeps import (
    descent,
    diagonal_blocks,
    refit,
    sweep,
)
from qjax.methods.vectors import DISTANCES, kmeans, nearest_vector
from qjax.tensor import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class AQLM(Method):
    """Codebooks, codes and scales for `Additive` formats.

    Attributes:
      iterations: of the k-means that codebooks start from.
      rounds: times that codebooks and codes are fitted in turns.
      beam: partial sums that a search keeps.
      steps: conjugate gradient steps per fit of the codebooks.
      damp: share of the mean diagonal added to the Hessian.

    Raises:
      SpecError: a field is out of range.
    """

    iterations: int = 20
    rounds: int = 8
    beam: int = 8
    steps: int = 12
    damp: float = 0.01
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        for field in ("iterations", "rounds", "beam", "steps"):
            value = getattr(self, field)
            if type(value) is not int or value < (field == "beam"):
                least = int(field == "beam")
                raise SpecError(
                    f"AQLM: {field} is {value!r}, expected an integer >= {least}"
                )
        if not 0 <= self.damp < 1:
            raise SpecError(f"AQLM: damp is {self.damp!r}, expected 0 <= damp < 1")

    @property
    def name(self) -> str:
        """`aqlm`."""
        return "aqlm"

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Any:
        """The factor of the damped Hessian in blocks of a group."""
        del weights
        h = self.check_statistics(statistics).mean_hessian()
        return factor(h, self.damp, _checked(self, fmt).group)[0]

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
        """See `Method.__call__`; `importance` and `key` have no effect."""
        del importance, key
        fmt = _checked(self, fmt)
        matrix = (w.shape[-2], w.shape[-1])
        fmt.grouping(matrix)
        statistics = self.check_statistics(statistics)
        mean = statistics.mean_hessian()
        m = factor(mean, self.damp, fmt.group)[0] if shared is None else shared
        h = damped(mean, self.damp)

        def one(w):
            return _Fit(w, fmt, h, self).run(m)

        for _ in w.shape[:-2]:
            one = jax.vmap(one)
        codes, books, scale = one(w.astype(jnp.float32))
        return AdditiveTensor(
            codes.astype(f"uint{fmt.code_bits}"),
            scale.astype(fmt.scale_dtype),
            books.astype(fmt.table_dtype),
            fmt,
            matrix,
        )


def _checked(method: Method, fmt: Format) -> Additive:
    if not isinstance(fmt, Additive):
        raise SpecError(
            f"{method.name}: fits vector codebooks (Additive), got {fmt.name}; "
            "use fmt=Additive(codebooks, bits, group)"
        )
    return fmt


class _Fit:
    """One matrix being fitted: what stays the same."""

    def __init__(self, w, fmt: Additive, h, method: AQLM):
        self.w, self.fmt, self.h, self.method = w, fmt, h, method

    def run(self, m):
        """Codes `[in / group * codebooks, out]`, codebooks and scales."""
        w, fmt = self.w, self.fmt
        size = jnp.sqrt(jnp.mean(w * w, axis=0, keepdims=True))
        scale = _stored(jnp.where(size > 0, size, 1.0), fmt.scale_dtype)
        books, codes = self._start(scale)
        first = (self._error(codes, books, scale), (codes, books, scale))
        eye = jnp.eye(w.shape[0], dtype=w.dtype)
        own = diagonal_blocks(self.h, fmt.group)
        codes = self._codes(
            w, m - eye, self._feedback_metric(m, own), *(codes, books, scale)
        )
        state = (codes, books, scale)
        best = _less((self._error(*state), state), first)
        back, metric = descent(self.h, fmt.group), jnp.linalg.cholesky(own)

        def turn(_, carry):
            best, (codes, books, scale) = carry
            books, scale = self._refit(codes, books, scale)
            v = decode_additive(codes, books, scale)
            codes = self._codes(v, back, metric, codes, books, scale)
            new = (self._error(codes, books, scale), (codes, books, scale))
            return _less(new, best), new[1]

        rounds = self.method.rounds
        return jax.lax.fori_loop(0, rounds, turn, (best, state))[0][1]

    def _error(self, codes, books, scale):
        e = self.w - decode_additive(codes, books, scale)
        return jnp.sum(output_error(e, self.h))

    def _feedback_metric(self, m, own):
        """Cholesky factors of `D` in `H = M D M^T`: blocks of `M^-1 H = D M^T`."""
        solved = jax.lax.linalg.triangular_solve(
            m, self.h, left_side=True, lower=False, unit_diagonal=True
        )
        blocks = diagonal_blocks(solved, self.fmt.group)
        blocks = jnp.linalg.cholesky(0.5 * (blocks + jnp.swapaxes(blocks, -1, -2)))
        sound = jnp.all(jnp.isfinite(blocks), axis=(-2, -1), keepdims=True)
        return jnp.where(sound, blocks, jnp.linalg.cholesky(own))

    def _start(self, scale):
        """Residual k-means of the normalized groups, weighted by their influence."""
        fmt = self.fmt
        rows, cols = self.w.shape
        vectors = (self.w / scale).reshape(rows // fmt.group, fmt.group, cols)
        rest = jnp.swapaxes(vectors, -1, -2).reshape(-1, fmt.group)
        size = jnp.mean(jnp.diagonal(self.h).reshape(-1, fmt.group), axis=1)
        weight = (size[:, None] * jnp.square(scale)).reshape(-1)
        books, codes = [], []
        for _ in range(fmt.codebooks):
            book = kmeans(rest, weight, fmt.levels, self.method.iterations)
            book = _stored(book, fmt.table_dtype)
            code = nearest_vector(rest, book)
            rest = rest - book[code]
            books.append(book)
            codes.append(code.reshape(rows // fmt.group, cols))
        found = jnp.stack(codes, axis=1).reshape(-1, cols)
        return jnp.stack(books), found.astype(jnp.int32)

    def _codes(self, v, coupling, metric, codes, books, scale):
        """One pass over all groups."""
        fmt = self.fmt
        per = codes.reshape(-1, fmt.codebooks, codes.shape[-1])

        def choose(j, goal):
            # (t - b)^T D (t - b) = |L^T t - L^T b|^2 with D = L L^T.
            turn = metric[j].T
            turned = jnp.einsum("ab,clb->cla", turn, books, precision="highest")
            goal = jnp.matmul(turn, goal / scale, precision="highest")
            found = _search(goal, turned, per[j], self.method.beam)
            total = sum(books[c][found[c]] for c in range(fmt.codebooks))
            return found, total.T * scale  # pyright: ignore[reportAttributeAccessIssue]

        found, _ = sweep(self.w, v, coupling, choose, fmt.group)
        return found.reshape(codes.shape)

    def _refit(self, codes, books, scale):
        """Least squares for the codebooks, then for every scale."""
        fmt = self.fmt

        def of_books(books):
            return decode_additive(codes, books, scale)

        books = refit(of_books, books, self.w, self.h, self.method.steps)
        books = _stored(books, fmt.table_dtype)
        v = decode_additive(codes, books, jnp.ones_like(scale))
        image = jnp.matmul(self.h, v, precision="highest")
        top = jnp.sum(image * self.w, axis=0, keepdims=True)
        bottom = jnp.sum(image * v, axis=0, keepdims=True)
        fitted = top / jnp.where(bottom > 0, bottom, 1.0)
        fitted = jnp.where((bottom > 0) & (fitted > 0), fitted, scale)
        return books, _stored(fitted, fmt.scale_dtype)


def _less(new, best):
    """Of two `(error, state)` the new one if its error is less."""
    return jax.tree.map(lambda a, b: jnp.where(new[0] < best[0], a, b), new, best)


def _stored(x: Array, dtype: str) -> Array:
    """A float after the rounding of storage."""
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -top, top).astype(dtype).astype(jnp.float32)


def _search(
    goal: Float[Array, "g out"],
    books: Float[Array, "c levels g"],
    current: Int[Array, "c out"],
    beam: int,
) -> Int[Array, "c out"]:
    """Indices of the sum of one vector per codebook that is nearest to each column.

    The current indices stay unless the search finds better ones.
    """
    count, levels, _ = books.shape
    beam = min(beam, levels) if count > 1 else 1
    norms = jnp.sum(jnp.square(books), axis=-1)

    def one(args):
        """All of it for one column, vectorized below."""
        goal, current = args
        rest, found = goal[None], jnp.zeros((1, 0), jnp.int32)
        for c in range(count):
            cross = jnp.matmul(rest, books[c].T, precision="highest")
            score = jnp.sum(jnp.square(rest), -1)[:, None] - 2.0 * cross + norms[c]
            flat = score.reshape(-1)
            if c + 1 < count:
                index = jax.lax.top_k(-flat, beam)[1]
            else:
                index = jnp.argmin(flat)[None]
            source, code = index // levels, (index % levels).astype(jnp.int32)
            rest = rest[source] - books[c][code]
            found = jnp.concatenate([found[source], code[:, None]], axis=1)
        old = goal - sum(books[c][current[c]] for c in range(count))
        keep = jnp.sum(jnp.square(old)) <= jnp.sum(jnp.square(rest[0]))
        return jnp.where(keep, current, found[0])

    width = min(max(DISTANCES // (beam * levels), 1), goal.shape[1])
    return jax.lax.map(one, (goal.T, current.T), batch_size=width).T

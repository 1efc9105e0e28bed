"""Nearest points of the IQ types' grids, as llama.cpp looks for them.

llama.cpp rounds to a point of the whole lattice first. If it is not in the grid, only
grid points at one of its few smallest distances are candidates, and the one with the
least weighted error is taken; of equals the nearest, then the first. Some points have
hundreds of candidates and most have few, so points are sorted by their number and
searched in runs.

Reference: ggml `src/ggml-quants.c` (MIT): `iq2xs_init_impl`, `iq3xs_init_impl`,
`iq2_find_best_neighbour`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.formats.base import rounded
from qjax.formats.ggml_grids import GRIDS, digits, words

_RUNS = 16  # divides the number of points of a block


@dataclasses.dataclass(frozen=True)
class Book:
    """A grid and how far its candidates may be.

    Attributes:
      name: of the grid.
      near: number of smallest distances at which grid points are candidates, at most 3.
    """

    name: str
    near: int

    @property
    def dims(self) -> int:
        """Coordinates of a point."""
        return GRIDS[self.name].dims

    @property
    def levels(self) -> int:
        """Values of a coordinate."""
        return len(GRIDS[self.name].levels)

    @functools.cached_property
    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is known of each lattice point.

        Returns:
          The index of the point, or -1, int16 `[lattice]`; the number of its
          candidates, int16 `[lattice]`; and their indices, the nearest first, int16
          `[most, lattice]`.
        """
        points = digits(self.name).astype(np.int16)
        numbers = np.arange(self.levels**self.dims)
        places = self.levels ** np.arange(self.dims)
        lattice = (numbers[:, None] // places % self.levels).astype(np.int16)
        far = np.zeros((len(lattice), len(points)), np.int16)
        for i in range(self.dims):
            far += np.square(lattice[:, None, i] - points[None, :, i])
        index = np.where(far.min(1) == 0, far.argmin(1), -1).astype(np.int16)
        reach = np.full((len(lattice), 1), -1, np.int16)
        for _ in range(self.near):
            beyond = np.where(far > reach, far, np.iinfo(np.int16).max)
            reach = beyond.min(1, keepdims=True)
        counts = np.where(index < 0, (far <= reach).sum(1), 1).astype(np.int16)
        order = np.argsort(far, axis=1, kind="stable")[:, : counts.max()]
        return index, counts, np.ascontiguousarray(order.T.astype(np.int16))

    def number(self, level: Float[Array, " d *points"]) -> Int[Array, "*points"]:
        """The number of lattice points."""
        level = level.astype(jnp.int32)
        return sum(level[i] * self.levels**i for i in range(self.dims))  # pyright: ignore[reportReturnType]

    def coordinates(self, index: Int[Array, "*points"]) -> Float[Array, " d *points"]:
        """The levels of grid points."""
        packed = jnp.asarray(words(self.name)).at[index].get(mode="clip")
        return jnp.stack(self.unpacked(packed)).astype(jnp.float32)

    def unpacked(self, packed: Array) -> list[Array]:
        """The levels in words of grid points."""
        width = GRIDS[self.name].digit_bits
        mask = jnp.uint16(2**width - 1)
        return [packed >> jnp.uint16(i * width) & mask for i in range(self.dims)]

    def nearest(
        self,
        level: Float[Array, " d *points"],
        scale: Float[Array, "..."],
        first: Float[Array, "..."] | float,
        step: float,
        x: Float[Array, " d *points"],
        weight: Float[Array, " d *points"],
    ) -> tuple[Int[Array, "*points"], Array]:
        """The grid point for points of the lattice.

        Args:
          level: the points.
          scale: of the values, broadcastable to points.
          first: what the lowest level stands for, times the scale.
          step: between levels, times the scale.
          x: what they should be near to.
          weight: of the squared errors.

        Returns:
          Indices, and which points were in the grid already.
        """
        index, counts, _ = (jnp.asarray(table) for table in self.tables)
        number = self.number(level)
        own = index.at[number].get(mode="clip").astype(jnp.int32)
        count = counts.at[number].get(mode="clip")
        order = jnp.argsort(count.reshape(-1))

        def cut(a):
            """Points `[..., *points]` in runs `[_RUNS, ..., points / _RUNS]`."""
            lead = a.shape[: max(a.ndim - number.ndim, 0)]
            a = jnp.broadcast_to(a, (*lead, *number.shape))
            a = a.reshape(*lead, -1)[..., order]
            return jnp.moveaxis(a.reshape(*a.shape[:-1], _RUNS, -1), -2, 0)

        first = jnp.asarray(first, jnp.float32)
        parts = tuple(cut(a) for a in (count, number, scale, first, x, weight))
        found = jax.lax.map(lambda run: self._among(step, *run), parts).reshape(-1)
        found = jnp.zeros_like(found).at[order].set(found, unique_indices=True)
        found = found.reshape(number.shape).astype(jnp.int32)
        return jnp.where(own >= 0, own, found), own >= 0

    def _among(self, step: float, count, number, scale, first, x, weight):
        """The best candidates of points `[p]`; the time is that of the longest list."""
        candidates = jnp.asarray(self.tables[2])
        packed = jnp.asarray(words(self.name))
        most = jnp.max(count)

        def visit(state):
            """Compares one candidate of every point."""
            place, least, found = state
            row = jax.lax.dynamic_index_in_dim(candidates, place, keepdims=False)
            here = row.at[number].get(mode="clip")
            error = jnp.zeros_like(least)
            for i, at in enumerate(self.unpacked(packed.at[here].get(mode="clip"))):
                value = first + step * at.astype(jnp.float32)
                miss = rounded(scale * value) - x[i]
                error = error + rounded(weight[i] * miss * miss)
            better = (place < count) & (error < least)
            least = jnp.where(better, error, least)
            return place + 1, least, jnp.where(better, here, found)

        start = jnp.int16(0), jnp.full(number.shape, jnp.inf, jnp.float32)
        start = (*start, jnp.zeros(number.shape, jnp.int16))
        return jax.lax.while_loop(lambda s: s[0] < most, visit, start)[2]

"""Nearest points of the IQ types' grids, as llama.cpp looks for them.

llama.cpp rounds to a point of the whole lattice first. If it is not in the grid, only
grid points at one of its few smallest distances are candidates, and the one with the
least weighted error is taken. Here all points of the grid are visited in turn, and a
bit per lattice and grid point says which are candidates.

Of candidates with equal errors the lowest index wins; llama.cpp's order is by distance
first.

Reference: ggml `src/ggml-quants.c` (MIT): `iq2xs_init_impl`, `iq3xs_init_impl`,
`iq2_find_best_neighbour`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.formats.ggml_grids import GRIDS, digits, words
from qjax.formats.base import rounded


@dataclasses.dataclass(frozen=True)
class Book:
    """A grid and how far its candidates may be.

    Attributes:
      name: of the grid.
      near: number of smallest distances at which grid points are candidates.
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
    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """The index of each lattice point, or -1, and its candidates as bits.

        Returns:
          int16 `[lattice]` and uint32 `[points / 32, lattice]`.
        """
        points = digits(self.name).astype(np.int16)
        places = self.levels ** np.arange(self.dims)
        numbers = np.arange(self.levels**self.dims)
        lattice = (numbers[:, None] // places % self.levels).astype(np.int16)
        far = sum(
            np.square(lattice[:, None, i] - points[None, :, i])
            for i in range(self.dims)
        )
        assert isinstance(far, np.ndarray)
        reach = far.min(1)
        index = np.where(reach == 0, far.argmin(1), -1).astype(np.int16)
        for _ in range(self.near - 1):
            beyond = np.where(far > reach[:, None], far, np.iinfo(np.int16).max)
            reach = beyond.min(1)
        near = far <= reach[:, None]
        near[index >= 0] = False  # never asked for
        bits = np.packbits(near, axis=1, bitorder="little").view("<u4")
        return index, np.ascontiguousarray(bits.T)

    def number(self, level: Float[Array, "d *points"]) -> Int[Array, "*points"]:
        """The number of lattice points."""
        level = level.astype(jnp.int32)
        return sum(level[i] * self.levels**i for i in range(self.dims))  # pyright: ignore[reportReturnType]

    def coordinates(self, index: Int[Array, "*points"]) -> Float[Array, "d *points"]:
        """The levels of grid points."""
        packed = jnp.asarray(words(self.name)).at[index].get(mode="clip")
        width = GRIDS[self.name].digit_bits
        parts = [packed >> jnp.uint16(i * width) for i in range(self.dims)]
        return (jnp.stack(parts) & jnp.uint16(2**width - 1)).astype(jnp.float32)

    def nearest(
        self,
        level: Float[Array, "d *points"],
        values: Float[Array, "v *points"],
        x: Float[Array, "d *points"],
        weight: Float[Array, "d *points"],
    ) -> tuple[Int[Array, "*points"], Array]:
        """The grid point for points of the lattice.

        Args:
          level: the points.
          values: what the levels stand for.
          x: what they should be near to.
          weight: of the squared errors.

        Returns:
          Indices, and which points were in the grid already.
        """
        index, candidates = (jnp.asarray(table) for table in self.tables)
        number = self.number(level)
        own = index.at[number].get(mode="clip").astype(jnp.int32)
        miss = values[None] - x[:, None]  # `values` are rounded
        cost = rounded(weight[:, None] * miss * miss)

        def visit(best, point):
            """Compares one grid point everywhere."""
            least, found, bits = best
            place, at = point
            error = cost[0][at[0]]
            for i in range(1, self.dims):
                error = error + cost[i][at[i]]
            allowed = (bits >> (place % 32).astype(jnp.uint32)) & 1 == 1
            better = allowed & (error < least)
            least = jnp.where(better, error, least)
            return (least, jnp.where(better, place, found), bits), None

        def word(best, group):
            """Thirty-two grid points, whose bits are in one word."""
            bits, places, at = group
            state = (*best, bits.at[number].get(mode="clip"))
            return jax.lax.scan(visit, state, (places, at))[0][:2], None

        at = digits(self.name).astype(np.int32)
        places = np.arange(len(at), dtype=np.int32)
        groups = (
            candidates,
            jnp.asarray(places.reshape(-1, 32)),
            jnp.asarray(at.reshape(-1, 32, self.dims)),
        )
        start = jnp.full(number.shape, jnp.inf, jnp.float32), jnp.zeros_like(number)
        found = jax.lax.scan(word, start, groups)[0][1]
        return jnp.where(own >= 0, own, found), own >= 0

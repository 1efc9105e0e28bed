"""How persistent blocks of threads share the tiles of a product.

A tile is `width` columns of the result by `config.tokens` rows, summed in `steps` steps
of `config.rows` rows of the weight. Blocks own either

* an equal share of all steps (`config.split`): what several blocks sum of one tile goes
  to memory apart and `Schedule.total` adds it in a fixed order (deterministic, no
  atomics, no block waits for another); or
* whole tiles.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who does which step; tokens vary fastest among tiles.

    Attributes:
      config: tiles, with `warpgroups`, `tokens`, `rows`, `split` and `blocks`.
      outer: the axis of the weight that the result keeps, padded.
      inner: the contracted one, padded.
      tokens: rows of the result.
    """

    config: Any
    outer: int
    inner: int
    tokens: int

    def obstacle(self, narrow: bool) -> str | None:
        """Why the tiles do not fit, or None; `narrow`: the result has 16 bits."""
        config = self.config
        if self.outer % self.width:
            return f"{self.width} columns per tile do not divide {self.outer}"
        if config.tokens % 8 or not 8 <= config.tokens <= 256:
            return "tokens"
        if not config.split and config.tokens % 64:
            return "whole tiles need 64 tokens"
        if not config.split and not narrow:
            return "whole tiles are written in 16 bits"
        if not self.whole and self.blocks * (self.tiles * self.steps + 1) >= 2**31:
            return "the numbers of steps do not fit 32 bits"
        return None

    @property
    def width(self) -> int:
        """Output columns of a tile."""
        return 64 * self.config.warpgroups

    @property
    def m_tiles(self) -> int:
        """Tiles of tokens."""
        return -(-self.tokens // self.config.tokens)

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.inner // self.config.rows

    @property
    def tiles(self) -> int:
        """Tiles."""
        return self.outer // self.width * self.m_tiles

    @property
    def blocks(self) -> int:
        """Size of the grid."""
        most = self.tiles * (self.steps if self.config.split else 1)
        return min(self.config.blocks, most)

    @property
    def whole(self) -> int:
        """Tiles per block where shares are whole tiles, else 0."""
        return 0 if self.tiles % self.blocks else self.tiles // self.blocks

    @property
    def counts(self) -> np.ndarray:
        """How many blocks share each tile, `[tiles]`, when split."""
        first = np.arange(self.tiles) * self.steps
        owners = [
            (self.owner(int(i)), self.owner(int(i) + self.steps - 1)) for i in first
        ]
        return np.array([last + 1 - first for first, last in owners])

    @property
    def shares(self) -> int:
        """Most blocks that share a tile."""
        return int(max(self.counts)) if self.config.split else 1

    def owner(self, step):
        """The block of a step: the largest `b` with `b total // blocks <= step`."""
        if self.whole:
            return step // (self.steps * self.whole)
        total = self.tiles * self.steps
        return ((step + 1) * self.blocks + total - 1) // total - 1

    def span(self, block):
        """First step of a block and the one behind its last, among its own."""
        if self.config.split and self.whole:
            run = self.steps * self.whole
            return block * run, (block + 1) * run
        if self.config.split:
            total = self.tiles * self.steps
            # Each of `blocks` gets `total // blocks` or one more.
            return block * total // self.blocks, (block + 1) * total // self.blocks
        own = (self.tiles - block + self.blocks - 1) // self.blocks
        return jnp.int32(0), own * self.steps

    def place(self, block, step):
        """Tile and step in the tile of one of a block's steps."""
        tile = step // self.steps
        inner = step - tile * self.steps
        return (tile if self.config.split else block + tile * self.blocks), inner

    def axes(self, tile):
        """Number of a tile along the columns and along the rows of the result."""
        return tile // self.m_tiles, lax.rem(tile, self.m_tiles)

    def total(self, y):
        """Partial sums `[shares, outer, tokens]` added in order: `[tokens, outer]`."""
        shares, outer, tokens = y.shape
        columns = outer // self.width
        counts = self.counts.reshape(columns, 1, self.m_tiles, 1)
        full = (columns, self.width, self.m_tiles, self.config.tokens)
        total = y[0].reshape(full)
        for piece in range(1, shares):
            # Fewer blocks may share a tile: what they left is undefined.
            mine = jnp.asarray(counts > piece)
            total = total + jnp.where(mine, y[piece].reshape(full), jnp.float32(0))
        return total.reshape(outer, tokens).T

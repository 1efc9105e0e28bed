"""Which weights share a scale.

A `Grouping` maps a weight `[..., in, out]` to the grouped view `[..., G, g, N]` in
which every group is one column of axis -2, and back. All formats and methods work on
this view, so "per tensor", "per channel", "128 along `in`", "128x128 blocks" and
bitsandbytes' flat blocks are one code path. A group size that does not divide leaves
a short last group, which the view pads by repeating its last weight (so that minima,
maxima and absolute maxima are unchanged).
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

Kind = Literal["tensor", "channel", "in", "out", "block", "flat"]


@dataclasses.dataclass(frozen=True)
class Grouping:
    """How a matrix `[in, out]` is cut into groups that share a scale.

    Attributes:
      kind: `tensor` one group; `channel` one per output column; `in` groups of `size`
        consecutive inputs of one output; `out` groups of `size` consecutive outputs of
        one input; `block` tiles of `size` x `size`; `flat` runs of `size` over the
        row-major transpose `[out, in]` (bitsandbytes' order).
      matrix: logical `(in, out)`.
      size: group size; unused by `tensor` and `channel`.
    """

    kind: Kind
    matrix: tuple[int, int]
    size: int = 0

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Trailing shape of the stored scale: one entry per group."""
        rows, cols = self.matrix
        return {
            "tensor": lambda: (1, 1),
            "channel": lambda: (1, cols),
            "in": lambda: (_ceil(rows, self.size), cols),
            "out": lambda: (rows, _ceil(cols, self.size)),
            "block": lambda: (_ceil(rows, self.size), _ceil(cols, self.size)),
            "flat": lambda: (_ceil(rows * cols, self.size), 1),
        }[self.kind]()

    @property
    def groups(self) -> int:
        """Number of groups per matrix."""
        return math.prod(self.scale_shape)

    def split(self, w: Shaped[Array, "*lead in out"]) -> Shaped[Array, "*lead G g N"]:
        """Grouped view of `w`; short groups are padded with their last weight."""
        *lead, rows, cols = w.shape
        if self.kind == "tensor":
            return w.reshape(*lead, 1, rows * cols, 1)
        if self.kind == "channel":
            return w.reshape(*lead, 1, rows, cols)
        if self.kind == "out":
            w = jnp.swapaxes(w, -1, -2)
        elif self.kind == "flat":
            w = jnp.swapaxes(w, -1, -2).reshape(*lead, rows * cols, 1)
        elif self.kind == "block":
            w = _pad_rows(w, self.size)
            w = jnp.swapaxes(_pad_rows(jnp.swapaxes(w, -1, -2), self.size), -1, -2)
            gr, gc = self.scale_shape
            w = w.reshape(*lead, gr, self.size, gc, self.size)
            w = jnp.moveaxis(w, -3, -2).reshape(*lead, gr * gc, self.size**2)
            return jnp.swapaxes(w, -1, -2)[..., None, :, :]
        w = _pad_rows(w, self.size)
        return w.reshape(*lead, w.shape[-2] // self.size, self.size, w.shape[-1])

    def join(self, groups: Shaped[Array, "*lead G g N"]) -> Shaped[Array, "*lead i o"]:
        """Inverse of `split`: drops the padding."""
        *lead, count, length, width = groups.shape
        rows, cols = self.matrix
        if self.kind in ("tensor", "channel"):
            return groups.reshape(*lead, rows, cols)
        if self.kind == "block":
            gr, gc = self.scale_shape
            size = self.size
            tiles = jnp.swapaxes(groups[..., 0, :, :], -1, -2)
            tiles = tiles.reshape(*lead, gr, gc, size, size)
            w = jnp.moveaxis(tiles, -2, -3).reshape(*lead, gr * size, gc * size)
            return w[..., :rows, :cols]
        w = groups.reshape(*lead, count * length, width)
        if self.kind == "out":
            return jnp.swapaxes(w[..., :cols, :], -1, -2)
        if self.kind == "flat":
            w = w[..., : rows * cols, :].reshape(*lead, cols, rows)
            return jnp.swapaxes(w, -1, -2)
        return w[..., :rows, :]

    def store(self, stat: Shaped[Array, "*lead G 1 N"]) -> Shaped[Array, "*lead s t"]:
        """One value per group, from the grouped view to the stored shape."""
        *lead, groups, _, cols = stat.shape
        if self.kind == "block":
            return stat.reshape(*lead, *self.scale_shape)
        stat = stat.reshape(*lead, groups, cols)
        return jnp.swapaxes(stat, -1, -2) if self.kind == "out" else stat

    def load(self, stored: Shaped[Array, "*lead s t"]) -> Shaped[Array, "*lead G 1 N"]:
        """Inverse of `store`: broadcasts against the grouped view."""
        *lead, rows, cols = stored.shape
        if self.kind == "block":
            return stored.reshape(*lead, 1, 1, rows * cols)
        if self.kind == "out":
            stored = jnp.swapaxes(stored, -1, -2)
        return stored[..., :, None, :]

    def mask(self) -> Bool[Array, "G g N"] | None:
        """True for real weights of the grouped view; None when nothing is padded."""
        rows, cols = self.matrix
        size = self.size
        whole = {
            "tensor": True,
            "channel": True,
            "in": size and rows % size == 0,
            "out": size and cols % size == 0,
            "block": size and rows % size == 0 and cols % size == 0,
            "flat": size and rows * cols % size == 0,
        }[self.kind]
        if whole:
            return None
        ones = jnp.ones(self.matrix, jnp.int8)
        return self._split_zero(ones) > 0

    def _split_zero(self, ones):
        """`split`, but padded with zeros: only used to build the mask."""
        rows, cols = self.matrix
        size = self.size
        up = -(-rows // size) * size
        across = -(-cols // size) * size
        if self.kind == "flat":
            total = rows * cols
            flat = jnp.arange(-(-total // size) * size) < total
            return flat.astype(jnp.int8).reshape(-1, size, 1)
        grown = {"in": (up, cols), "out": (rows, across), "block": (up, across)}
        target = grown[self.kind]
        ones = jnp.pad(ones, [(0, target[0] - rows), (0, target[1] - cols)])
        return Grouping(self.kind, target, size).split(ones)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _pad_rows(w, size):
    rows = w.shape[-2]
    if rows % size == 0:
        return w
    pad = [(0, 0)] * (w.ndim - 2) + [(0, -rows % size), (0, 0)]
    return jnp.pad(w, pad, mode="edge")

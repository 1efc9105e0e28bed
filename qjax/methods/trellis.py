"""Trellis-coded quantization with error feedback: the best weights per bit there are.

The weight is made incoherent (a random Hadamard transform of inputs and outputs), its
rows are rounded sixteen at a time, each after the errors of the rows before it have
been fed back through the Hessian's factor, and each 16 x 16 tile is rounded to the
nearest of the walks through the format's trellis:

    w = diag(l) H u H diag(r),   h' = H diag(l) h diag(l) H = M D M^T,
    v_i = walk(u_i + sum_{j < i} M_{ji}^T (u_j - v_j)),   i, j sixteen rows each.

`l` and `r` are random signs. With `equalize`, `r` scales too: errors are alike in all
of `v`, so that of output `j` is `r_j^2`, while the size of `v` follows the sum of
`|w_j|^2 / r_j^2`; their product is least for `r_j^2` in proportion to `|w_j|`. These
scales take 8 bits each, and walks are found for their stored values.

Without statistics the Hessian is the identity, and tiles are rounded on their own.

Memory beside the weight: one more of it, two Hessians. Cost: the searches, `2**16`
steps per weight.

Reference: Tseng et al., QTIP, arXiv 2406.11235; exllamav3 `modules/quant/exl3_lib`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format, Trellis
from qjax.formats.base import check_choice
from qjax.formats.trellis import (
    TILE,
    codebook_values,
    join_tiles,
    split_tiles,
    states_to_words,
)
from qjax.methods.base import Method
from qjax.methods.hessian import factor
from qjax.methods.statistics import Statistics
from qjax.pallas_kernels.quantize import trellis as kernel
from qjax.tensor import QuantizedTensor
from qjax.trellis import (
    BLOCK,
    Incoherent,
    TrellisTensor,
    pack_signs,
    unpack_signs,
)
from qjax.wrappers import hadamard

EIGHT_BITS = jnp.float8_e4m3fn
ROTATIONS = ("both", "in", "none")
_SPREAD = {1: 0.95, 2: 0.93, 3: 0.92, 4: 0.9, 5: 0.85, 6: 0.82, 7: 0.8, 8: 0.78}
"""Root mean square of scaled weights over that of the codebook, by bits.

Normal weights alone are served best by 1.0, 0.95 and 0.9 at 2, 3 and 4 bits; what error
feedback adds to them needs room.
"""


@dataclasses.dataclass(frozen=True)
class TrellisLDLQ(Method):
    """Trellis-coded quantization, for the `Trellis` format.

    Attributes:
      rotate: which axes the Hadamard transform mixes: `both`, `in` (for embedding
        tables, whose rows are then read without decoding the others) or `none`.
      damp: share of the mean diagonal added to the Hessian.
      equalize: also scale columns, which takes 7 bits more for each.
      around: steps on each side of a tile's seam that its state is found from.
      seed: of the signs.

    Raises:
      SpecError: a field is out of range.
    """

    rotate: str = "both"
    damp: float = 0.025
    equalize: bool = True
    around: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("TrellisLDLQ", "rotate", self.rotate, ROTATIONS)
        whole = type(self.around) is int and type(self.seed) is int
        if not (whole and 1 <= self.around <= 128 and 0 <= self.seed < 2**32):
            raise SpecError(
                "TrellisLDLQ: needs integers 1 <= around <= 128 and 0 <= seed < 2**32; "
                f"got around={self.around!r}, seed={self.seed!r}"
            )
        if not self.damp >= 0:
            raise SpecError(f"TrellisLDLQ: damp is {self.damp}, expected 0 or more")

    @property
    def name(self) -> str:
        """`trellis`."""
        return "trellis"

    @property
    def uses(self) -> frozenset[str]:
        """The Hessian."""
        return frozenset({"hessian"})

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
        """See `Method.__call__`; `importance` is not used."""
        del importance, key
        if not isinstance(fmt, Trellis):
            raise SpecError(f"TrellisLDLQ encodes the Trellis format, got {fmt.name}")
        fmt.grouping((w.shape[-2], w.shape[-1]))
        hessian = None
        if statistics is not None and statistics.hessian is not None:
            hessian = statistics.mean_hessian()

        def one(w):
            return self._matrix(w.astype(jnp.float32), fmt, hessian, shared)

        run: Any = one
        for _ in w.shape[:-2]:
            run = functools.partial(lax.map, run)
        return run(w)

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Any:
        """The factor of the Hessian of the transformed inputs."""
        del fmt
        if statistics is None or statistics.hessian is None:
            return None
        rows = weights[0].shape[-2]
        left = self._signs(rows, 0) if self.rotate != "none" else None
        return self._factor(statistics.mean_hessian(), left)

    def _matrix(self, w, fmt, hessian, shared):
        stored = self._sides(w)
        left, right = map(_factors, stored, w.shape)
        u = w if right is None else hadamard(w / right, BLOCK)
        if left is not None:
            u = hadamard((u / left[:, None]).T, BLOCK).T
        m = shared
        if m is None and hessian is not None:
            m = self._factor(hessian, left)
        deviation = float(codebook_values(fmt.codebook).std())
        size = jnp.sqrt(jnp.mean(jnp.square(u)))
        scale = size / jnp.float32(_SPREAD[fmt.bits] * deviation)
        scale = jnp.where(scale > 0, scale, 1.0)
        states = walks(u, scale, m, fmt, self.around)
        codes = states_to_words(states, fmt.bits)
        codes = codes.reshape(codes.shape[0], -1)
        scale = jnp.where(size > 0, scale, 0.0)  # no state has the value 0
        q = TrellisTensor(codes, scale.reshape(1, 1), fmt, (w.shape[0], w.shape[1]))
        return q if left is None else Incoherent(q, *stored)

    def _sides(self, w):
        """Factors of inputs and of outputs as stored, or None."""
        if self.rotate == "none":
            return None, None
        rows, cols = w.shape
        left = pack_signs(self._signs(rows, 0))
        if self.rotate == "in":
            return left, None
        right = self._signs(cols, 1)
        if not self.equalize:
            return left, pack_signs(right)
        return left, (right * jnp.sqrt(_relative_size(w))).astype(EIGHT_BITS)

    def _signs(self, n, side):
        rng = np.random.default_rng([self.seed, side])
        return jnp.asarray(rng.choice(np.array([-1, 1], np.float32), n))

    def _factor(self, h, left):
        """The factor of the Hessian of transformed inputs."""
        if left is not None:
            h = hadamard(h * left * left[:, None], BLOCK)
            h = hadamard(h.T, BLOCK)
        return factor(h, self.damp, TILE)[0]


def walks(
    u: Float[Array, "in out"],
    scale: Float[Array, ""],
    m: Float[Array, "in in"] | None,
    fmt: Trellis,
    around: int,
) -> Any:
    """The states of all tiles, rows of tiles rounded with error feedback.

    Args:
      u: the transformed weight.
      scale: what the values of states are multiplied by.
      m: the Hessian's factor, identity in its diagonal blocks of 16; None for no
        feedback.
      fmt: the format.
      around: see `TrellisLDLQ`.

    Returns:
      uint16 `[in / 16, out / 16, 256]`.
    """
    table = codebook_values(fmt.codebook)

    def nearest(rows):
        tiles = split_tiles(rows / scale)
        flat = tiles.reshape(-1, TILE * TILE)
        states = kernel.search(flat, table, fmt.bits, around=around)
        return states.reshape(tiles.shape)

    if m is None:
        return nearest(u)

    def step(i, carry):
        error, states = carry
        rows = lax.dynamic_slice_in_dim(u, i * TILE, TILE)
        share = lax.dynamic_slice_in_dim(m, i * TILE, TILE, 1)
        fed = jnp.matmul(share.T, error, precision="highest")
        found = nearest(rows + fed)
        missed = rows - join_tiles(fmt.decode(found)) * scale
        error = lax.dynamic_update_slice_in_dim(error, missed, i * TILE, 0)
        return error, lax.dynamic_update_slice_in_dim(states, found, i, 0)

    rows, cols = u.shape
    states = jnp.zeros((rows // TILE, cols // TILE, TILE * TILE), jnp.uint16)
    return lax.fori_loop(0, rows // TILE, step, (jnp.zeros_like(u), states))[1]


def _factors(stored, n):
    """What stored signs or scales multiply by."""
    if stored is None:
        return None
    if stored.dtype == jnp.uint8:
        return unpack_signs(stored, n)
    return stored.astype(jnp.float32)


def _relative_size(w):
    """Root mean squares of columns over their mean, none far from it."""
    size = jnp.sqrt(jnp.mean(jnp.square(w), 0))
    mean = jnp.mean(size)
    return jnp.clip(size / jnp.where(mean > 0, mean, 1.0), 2.0**-5, 2.0**5)

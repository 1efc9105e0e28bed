"""Randomized Hadamard rotation of a weight's inputs before another method.

`y = x w = (x diag(signs) H) (H diag(signs) w)`: the rotated weight and the rotated
activations have no outliers, so that uniform grids lose less. The rotation runs on
activations, `log2(block)` additions per input; nothing else is stored than the signs,
8 / out bits per weight. Weights that read one input share signs, so a compiler can
rotate the input once.

`qjax.models.rotate` has the rotations that cost nothing at run time.

Reference: Tseng et al., QuIP#, arXiv 2402.04396, section 3 (randomized Hadamard
transform); Ashkboos et al., QuaRot, arXiv 2404.00456 (R4: inputs of down projections).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.methods.awq import check_inner, mean_square
from qjax.methods.base import Method
from qjax.methods.change import rotate_inputs
from qjax.methods.rtn import RTN
from qjax.methods.statistics import Statistics
from qjax.tensor import QuantizedTensor
from qjax.wrappers import Rotated, hadamard


class Turned(NamedTuple):
    """What weights with one input share: the signs, and the inner method's part."""

    signs: Int[Array, " in"]
    inner: Any


@dataclasses.dataclass(frozen=True)
class Rotate(Method):
    """Rotates inputs by a randomized Hadamard matrix, around another method.

    Statistics are optional unless the inner method needs some; they are rotated along.

    Attributes:
      inner: rounds the rotated weight.
      seed: of the signs, which depend on it and on the number of inputs only.

    Raises:
      SpecError: a field is out of range.
    """

    inner: Method = dataclasses.field(default_factory=lambda: RTN("mse"))
    seed: int = 0

    def __post_init__(self) -> None:
        check_inner("Rotate", self.inner)
        if type(self.seed) is not int or not 0 <= self.seed < 2**31:
            raise SpecError(
                f"Rotate: seed is {self.seed!r}, expected an integer in [0, 2**31)"
            )

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the inner method needs; see `Method.needs`."""
        return self.inner.needs

    @property
    def name(self) -> str:
        """`rotate-rtn-mse` and so on."""
        return f"rotate-{self.inner.name}"

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
        """See `Method.__call__`; returns `Rotated`.

        `importance` of single inputs means nothing after rotation: it is replaced by
        the mean squared rotated activation where statistics are known, else ignored.
        """
        del importance
        if self.needs:
            self.check_statistics(statistics)
        signs = self.signs(w.shape[-2]) if shared is None else shared.signs
        moved = rotate_inputs(statistics, signs.astype(jnp.float32))
        inner = None if shared is None else shared.inner
        base = self.inner(
            turn(w, signs),
            fmt,
            importance=mean_square(moved),
            key=key,
            statistics=moved,
            shared=inner,
        )
        signs = jnp.broadcast_to(signs, (*w.shape[:-2], w.shape[-2]))
        return Rotated(base, signs)

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Turned:
        """Shares the signs, and prepares the inner method for the rotated weights."""
        signs = self.signs(weights[0].shape[0])
        moved = rotate_inputs(statistics, signs.astype(jnp.float32))
        turned = [turn(w, signs) for w in weights]
        return Turned(signs, self.inner.prepare(turned, fmt, moved))

    def signs(self, features: int) -> Int[Array, " in"]:
        """The signs for a number of inputs, int8."""
        key = jax.random.key(self.seed)
        return jax.random.rademacher(key, (features,), jnp.int8)


def turn(w: Float[Array, "*lead in out"], signs: Int[Array, " in"]) -> Any:
    """`H diag(signs) w`, float32.

    Raises:
      SpecError: the number of inputs is odd.
    """
    w = w.astype(jnp.float32) * signs.astype(jnp.float32)[:, None]
    return jnp.swapaxes(hadamard(jnp.swapaxes(w, -1, -2)), -1, -2)

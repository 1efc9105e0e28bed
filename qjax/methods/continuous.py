"""The continuous leaves of quantized parameters: what gradients can move.

Codes are fixed once they are chosen. Scales, zero-points, learned tables, offsets,
input scales, outlier values and low-rank factors stay differentiable, and so do norms
and biases. `Continuous` takes them out of a tree of parameters, in float32, and puts
them back in the dtype they are stored in.

Values move in units of their own size, so that one learning rate serves all of them:
`value = start + unit * delta`, where the unit of a zero-point is one code, that of a
table or a low-rank factor its root mean square, and that of everything else its own
magnitude (at least a tenth of the root mean square; a scale's exactly). Scales never
fall below a tenth of where they started.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.tensor import QuantizedTensor

FIELDS = frozenset(
    ("scale", "zero", "codebook", "offset", "global_scale", "s", "values", "a", "b")
)
"""Fields of quantized tensors that hold continuous values, where they are floats."""

_SCALES = ("scale", "global_scale")
_SHARED = ("codebook", "a", "b")
_LEAST = -0.9


@dataclasses.dataclass(frozen=True)
class Continuous:
    """A tree of parameters, split into leaves that move and leaves that stay.

    Attributes:
      tree: structure of the parameters.
      fixed: all leaves in order; None where a leaf moves.
      start: the leaves that move, as stored.
      kinds: for each of them the field it is, or `"vector"`.
      places: for each of them its position in `fixed`.
    """

    tree: Any
    fixed: tuple[Any, ...]
    start: tuple[Array, ...]
    kinds: tuple[str, ...]
    places: tuple[int, ...]

    @classmethod
    def split(
        cls, params: Any, *, vectors: bool = False, where: str = "tune"
    ) -> "Continuous":
        """Finds the leaves that move.

        Args:
          params: pytree with `QuantizedTensor` nodes.
          vectors: also move float arrays of rank 1 that are not part of a quantized
            tensor: norms and biases.
          where: what the error calls the caller.

        Raises:
          SpecError: nothing can move.
        """
        leaves, tree = jax.tree.flatten(params)
        kinds = _kinds(params)
        moving = [
            (place, kind)
            for place, (leaf, kind) in enumerate(zip(leaves, kinds, strict=True))
            if _moves(leaf, kind, vectors)
        ]
        if not moving:
            raise SpecError(
                f"{where}: the parameters hold no float scales, zero-points, tables or "
                "factors of quantized tensors; quantize them first"
            )
        places = tuple(place for place, _ in moving)
        kept = tuple(None if i in places else x for i, x in enumerate(leaves))
        start = tuple(jnp.asarray(leaves[i]) for i in places)
        return cls(tree, kept, start, tuple(kind for _, kind in moving), places)

    def zeros(self) -> tuple[Float[Array, "..."], ...]:
        """The deltas at which every leaf is what it was."""
        return tuple(jnp.zeros(x.shape, jnp.float32) for x in self.start)

    def merge(self, deltas: tuple[Float[Array, "..."], ...], *, stored: bool) -> Any:
        """The parameters for some deltas.

        Args:
          deltas: one per leaf of `start`.
          stored: give leaves their own dtype. Otherwise they are float32 with the very
            same values, and gradients pass the rounding as if it were not there.
        """
        leaves = list(self.fixed)
        for place, kind, start, delta in zip(
            self.places, self.kinds, self.start, deltas, strict=True
        ):
            value = _moved(kind, start, delta)
            leaves[place] = value.astype(start.dtype) if stored else value
        return jax.tree.unflatten(self.tree, leaves)


jax.tree_util.register_dataclass(
    Continuous, ["fixed", "start"], ["tree", "kinds", "places"]
)


def adam(lr: float, steps: int) -> optax.GradientTransformation:
    """Adam with a cosine decay to zero over `steps`.

    Epsilon is far below the default: gradients of a mean loss with respect to single
    scales are tiny, and what matters is their size relative to each other.
    """
    rate = optax.cosine_decay_schedule(lr, steps)
    rule = optax.adam(rate, b1=0.9, b2=0.99, eps=1e-14)

    def update(updates, state, params=None):
        # Optax counts steps in integers and mixes them with floats.
        with jax.numpy_dtype_promotion("standard"):
            return rule.update(updates, state, params)

    return optax.GradientTransformation(rule.init, update)


@jax.custom_vjp
def straight_through(
    value: Float[Array, "*s"], carrier: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """Returns `value` exactly; its gradient goes to `carrier`."""
    del carrier
    return value


def _straight_forward(value, carrier):
    del carrier
    return value, None


def _straight_backward(_, gradient):
    return jnp.zeros_like(gradient), gradient


straight_through.defvjp(_straight_forward, _straight_backward)


def _kinds(params: Any) -> list[str]:
    """The field of every leaf; empty for leaves outside quantized tensors."""
    kinds: list[str] = []
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    for node in nodes:
        if not isinstance(node, QuantizedTensor):
            kinds.append("")
            continue
        paths = jax.tree_util.tree_flatten_with_path(node)[0]
        kinds += [str(getattr(path[-1], "name", "")) for path, _ in paths]
    return kinds


def _moves(leaf: Any, kind: str, vectors: bool) -> bool:
    dtype = np.dtype(leaf.dtype)
    # Float8 leaves are codes or E4M3 scales: too coarse for a small step to show.
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2 or not leaf.size:
        return False
    if kind:
        return kind in FIELDS
    return vectors and leaf.ndim == 1


def _unit(kind, start):
    size = jnp.abs(start)
    if kind == "zero":
        return jnp.ones_like(start)
    if kind in _SCALES:
        return size
    rms = jnp.sqrt(jnp.mean(jnp.square(start)))
    if kind in _SHARED:
        return jnp.broadcast_to(rms, start.shape)
    return jnp.maximum(size, 0.1 * rms)


def _moved(kind, start, delta):
    """The value of a leaf in float32, rounded to its dtype."""
    info = jnp.finfo(start.dtype)
    exact = start.astype(jnp.float32)
    if kind in _SCALES:
        delta = jnp.maximum(delta, _LEAST)
    value = exact + _unit(kind, exact) * delta
    if kind in _SCALES:  # positive scales stay positive, also in 16 bits
        value = jnp.maximum(value, jnp.minimum(exact, float(info.tiny)))
    top = float(info.max)
    value = jnp.clip(value, -top, top)
    stored = value.astype(start.dtype).astype(jnp.float32)
    # Where nothing has moved the leaf keeps its bytes, whatever the sum rounds to.
    return straight_through(jnp.where(delta == 0, exact, stored), value)

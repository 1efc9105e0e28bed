"""AdamW and Lion as optax transformations that can also update in place.

`Fused.update` gives updates, as any optax transformation does, and composes with those:
in chains, under masks, with schedules. `Fused.apply` gives new parameters instead, with
the same numbers and without an array of updates: a kernel decodes the moments, updates
the parameter and encodes them again, leaf by leaf.

Moments are float32 or, with `bits=8`, codes of blocks of 256 as in bitsandbytes
(`qjax.train.moments`): 2.03 bytes per parameter for AdamW, 1.02 for Lion. A state that
lies in host memory (`qjax.train.offload`) is fetched and put back leaf by leaf.

Reference: optax's `adamw` and `lion`, whose numbers these are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jaxtyping import Array

from qjax.errors import SpecError
from qjax.train.moment_shards import where_of
from qjax.train.moments import Scalars, init_leaf, update_leaf
from qjax.train.stream import any_on_host, fetched, put_back, streamed

FLOATS = ("float32", "bfloat16", "float16")
"""Dtypes of what can be trained."""


class MomentState(NamedTuple):
    """State of `adamw` and `lion`.

    Attributes:
      count: Number of steps done, int32.
      moments: The tree of the parameters, with the moments of each in its place.
    """

    count: Any
    moments: Any


class Fused(optax.GradientTransformationExtraArgs):
    """A transformation with a way to update parameters in place.

    Attributes:
      apply: `(params, grads, state, shardings=None)` to new parameters and state.
    """

    apply: Callable[..., tuple[Any, Any]]

    def __new__(cls, init: Any, update: Any, apply: Any) -> "Fused":
        """Returns the transformation."""
        self = super().__new__(cls, init, update)
        self.apply = apply
        return self


def apply(
    tx: optax.GradientTransformation,
    params: Any,
    grads: Any,
    state: Any,
    shardings: Any = None,
) -> tuple[Any, Any]:
    """Returns parameters and state after a step of any transformation.

    Args:
      tx: The transformation; a `Fused` one makes no array of updates.
      params: The parameters; donate them, and the state, to update in place.
      grads: Their gradients.
      state: The state.
      shardings: As `adamw`; instead of those that it was given.
    """
    if isinstance(tx, Fused):
        return tx.apply(params, grads, state, shardings)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = None,
    bits: int = 8,
    min_size: int = 4096,
    shardings: Any = None,
) -> Fused:
    """Returns AdamW: the steps of `optax.adamw`, after clipping.

    Args:
      learning_rate: A number, or a function of the number of steps done before.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled decay, which the learning rate multiplies.
      clip: Global norm to which gradients are scaled down.
      bits: Of a moment's element: 8, or 32 for float32.
      min_size: With 8 bits, leaves of fewer elements stay in float32.
      shardings: On meshes with automatic axes, how parameters are split: their tree
        with a `NamedSharding` each; moments are split and updated likewise.

    Raises:
      SpecError: `bits` is neither 8 nor 32.

    Example:
      >>> tx = adamw(2e-4, clip=1.0)
      >>> state = tx.init(params)
      >>> params, state = tx.apply(params, grads, state)
    """
    numbers = learning_rate, b1, b2, eps, weight_decay, clip
    return _Rule("adamw", *numbers, bits, min_size, shardings).fused()


def lion(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    clip: float | None = None,
    bits: int = 8,
    min_size: int = 4096,
    shardings: Any = None,
) -> Fused:
    """Returns Lion: the steps of `optax.lion`, after clipping.

    Args:
      learning_rate: A number, or a function of the number of steps done before.
      b1: Weight of the moment in the direction.
      b2: Decay of the moment.
      weight_decay: Decoupled decay, which the learning rate multiplies.
      clip: As `adamw`.
      bits: As `adamw`.
      min_size: As `adamw`.
      shardings: As `adamw`.

    Raises:
      SpecError: `bits` is neither 8 nor 32.
    """
    numbers = learning_rate, b1, b2, 0.0, weight_decay, clip
    return _Rule("lion", *numbers, bits, min_size, shardings).fused()


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A rule with its numbers: what `Fused` is made of."""

    name: str
    learning_rate: Any
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip: float | None
    bits: int
    min_size: int
    shardings: Any

    def fused(self) -> Fused:
        if self.bits not in (8, 32):
            raise SpecError(f"{self.name}: bits is {self.bits!r}; expected 8 or 32")
        return Fused(self.init, self.update, self.apply)

    def init(self, params):
        found, tree = jax.tree.flatten_with_path(params)
        leaves = []
        for (path, p), given in zip(found, self._places(tree, None), strict=True):
            _check(self.name, jax.tree_util.keystr(path), p)
            eight = self.bits == 8 and p.size >= self.min_size
            leaves.append(init_leaf(p, self.name, eight, _now(p, given)))
        return MomentState(jnp.zeros((), jnp.int32), tree.unflatten(leaves))

    def update(self, updates, state, params=None, **extra):
        del extra
        if params is None and self.weight_decay:
            raise SpecError(
                f"{self.name}: update needs the parameters for weight decay; call "
                "tx.update(grads, state, params)"
            )
        return self._step(params, updates, state, _change)

    def apply(self, params, grads, state, shardings=None):
        return self._step(params, grads, state, _applied, shardings)

    def _step(self, params, grads, state, one, shardings=None):
        """`one(p, g, moments, scalars, where)` of every leaf."""
        leaves, tree = jax.tree.flatten(grads)
        moments = self._same(tree, state.moments, "the state")
        params = self._same(tree, grads if params is None else params, "parameters")
        by, places = self._scalars(state.count, leaves), self._places(tree, shardings)
        rows = zip(params, leaves, moments, places, strict=True)
        found = [one(p, g, m, by, where_of(p, place)) for p, g, m, place in rows]
        count = optax.safe_increment(state.count)
        news, moved = (tree.unflatten([x[i] for x in found]) for i in (0, 1))
        return news, MomentState(count, moved)

    def _scalars(self, count: Array, grads: list[Array]) -> Scalars:
        """Those of the step after `count`."""
        rate = self.learning_rate
        rate = rate(count) if callable(rate) else rate
        scale = 1.0
        if self.clip is not None:
            norm = global_norm(grads)
            scale = jnp.where(norm <= self.clip, 1.0, self.clip / norm)
        t, decay = count + 1, self.weight_decay
        return Scalars(rate, t, self.b1, self.b2, self.eps, decay, scale)

    def _places(self, tree, given):
        """How each leaf is split, if that was said."""
        given = self.shardings if given is None else given
        if given is None:
            return [None] * tree.num_leaves
        return self._same(tree, given, "shardings")

    def _same(self, tree, other, what):
        """Leaves of a tree that has to be like that of the gradients."""
        try:
            return tree.flatten_up_to(other)
        except ValueError as error:
            raise SpecError(
                f"{self.name}: gradients and {what} are different trees: {error}; "
                "give those of one model"
            ) from None


def global_norm(grads: Any) -> Array:
    """Returns the root of the sum of squares of all elements, in float32."""
    squares = [
        jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(grads)
    ]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def _applied(p, g, moments, by, where):
    """A leaf after a step."""
    if any_on_host(moments):
        return streamed(update_leaf, p, g, moments, by, where)
    return update_leaf(p, g, moments, by, where)


def _change(p, g, moments, by, where):
    """What a step adds to a leaf: what it makes of zeros, and the decay."""
    zeros = jnp.zeros_like(g, jnp.float32)
    bare = by._replace(weight_decay=0.0)
    change, near = update_leaf(zeros, g, fetched(moments), bare, where)
    if by.weight_decay:
        change -= by.learning_rate * by.weight_decay * p.astype(jnp.float32)
    return change.astype(g.dtype), put_back(near, moments)


def _now(p, given):
    """How a leaf is split when a state is made."""
    where = where_of(p, given)
    if where is None and not isinstance(p, Tracer):
        where = getattr(p, "sharding", None)
    return where if isinstance(where, NamedSharding) else None


def _check(name, path, p):
    if jnp.dtype(p.dtype).name not in FLOATS:
        raise SpecError(
            f"{name}: parameter {path or 'at the root'} is {p.dtype}, expected one of "
            f"{', '.join(FLOATS)}; keep what is not trained in a tree of its own"
        )

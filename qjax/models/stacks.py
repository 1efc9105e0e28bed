"""Parameters of layers put on stacks one by one.

A run is consecutive layers whose parameters agree in structure, format, shape and
dtype; it is one stack. Memory is the stacks and the layer that is being added: each
leaf is written into its place, also when it comes from a mapped file.
"""

import functools
import itertools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qjax.errors import SpecError

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


class Stacks:
    """Parameters of a model, layers of a run stacked on a leading axis.

    Args:
      layers: number of layers.

    Attributes:
      shapes: logical shape of every parameter by path.
      outer: parameters outside of layers, by path.
      runs: first layer and the one behind the last, for every run.
      stacked: parameters of every run by their path inside a layer.
    """

    def __init__(self, layers: int):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.outer: dict[str, Any] = {}
        self.runs: list[tuple[int, int]] = []
        self.stacked: list[dict[str, Any]] = []
        self._layers = layers
        self._kind: Any = None
        self._held: dict[str, Any] | None = None

    @classmethod
    def of(cls, layers: int, params: Mapping[str, Any]) -> "Stacks":
        """Stacks all of a dict of parameters; layers without any are an error later."""
        made = cls(layers)
        made.shapes = {path: tuple(leaf.shape) for path, leaf in params.items()}
        own: list[dict[str, Any]] = [{} for _ in range(layers)]
        for path, leaf in params.items():
            found = _LAYER.fullmatch(path)
            if found is None:
                made.outer[path] = leaf
            elif int(found[1]) < layers:
                own[int(found[1])][found[2]] = leaf
        kinds = [{path: structure(leaf) for path, leaf in one.items()} for one in own]
        cuts = [i for i in range(1, layers) if kinds[i] != kinds[i - 1]]
        made.runs = list(itertools.pairwise([0, *cuts, layers]))
        for start, stop in made.runs:
            run = own[start:stop]
            made.stacked.append({p: _stack([one[p] for one in run]) for p in run[0]})
        return made

    def add(self, part: Mapping[str, Any]) -> None:
        """Adds the next layer, or parameters outside of layers.

        Args:
          part: parameters by path; those of a layer start with `layers.{layer}.`.

        Raises:
          SpecError: the part holds anything but the whole of the next layer.
        """
        found = {m[1] for path in part if (m := _LAYER.fullmatch(path))}
        self.shapes |= {path: tuple(leaf.shape) for path, leaf in part.items()}
        if not found:
            self.outer |= part
            return
        layer = self.runs[-1][1] if self.runs else 0
        if found != {str(layer)} or not all(map(_LAYER.fullmatch, part)):
            raise SpecError(
                f"a part holds layers {', '.join(sorted(found))}; expected layer "
                f"{layer}, whole and alone"
            )
        start = f"layers.{layer}."
        own = {path.removeprefix(start): leaf for path, leaf in part.items()}
        kind = {path: structure(leaf) for path, leaf in own.items()}
        if kind != self._kind:
            self.close()
            self._kind, self._held = kind, own
            self.runs.append((layer, layer + 1))
            self.stacked.append({})
            return
        first, end = self.runs[-1]
        stacks = self.stacked[-1]
        if self._held is not None:  # the second of a run: there may be many
            room = functools.partial(_room, self._layers - first)
            stacks |= {path: jax.tree.map(room, leaf) for path, leaf in own.items()}
            _fill(stacks, self._held, 0)
            self._held = None
        _fill(stacks, own, end - first)
        self.runs[-1] = first, end + 1

    def close(self) -> None:
        """Ends the last run: what it reserved for further layers is given back."""
        if self._kind is None:
            return
        first, end = self.runs[-1]
        if self._held is not None:
            held = self._held.items()
            self.stacked[-1] |= {path: _stack([leaf]) for path, leaf in held}
        elif end < self._layers:
            cut = jax.tree.map(lambda x: x[: end - first], self.stacked[-1])
            self.stacked[-1] = cut
        self._kind = self._held = None


def structure(leaf: Any) -> Any:
    """What must agree for leaves to be stacked: tree, shapes and dtypes."""
    parts, tree = jax.tree.flatten(leaf)
    return tree, tuple((p.shape, np.dtype(p.dtype).name) for p in parts)


def _stack(leaves: list[Any]) -> Any:
    """Equal leaves on a new leading axis; each array part on its own."""

    def join(*parts: Any) -> Array:
        host = all(isinstance(p, np.ndarray) for p in parts)
        return jnp.asarray(np.stack(parts)) if host else jnp.stack(parts)

    return jax.tree.map(join, *leaves)


def _room(layers: int, leaf: Any) -> Array:
    return jnp.zeros((layers, *leaf.shape), leaf.dtype)


def _fill(stacks: dict[str, Any], own: Mapping[str, Any], place: int) -> None:
    """Writes the parameters of a layer into their places."""

    def put(stack: Array, leaf: Any) -> Array:
        return _written(stack, leaf, np.int32(place))

    for path, leaf in own.items():
        stacks[path] = jax.tree.map(put, stacks[path], leaf)


@functools.partial(jax.jit, donate_argnums=0)
def _written(stack: Array, leaf: Array, place: Array) -> Array:
    kind = stack.dtype
    if kind.itemsize == 1:  # XLA copies float8 value by value, bytes as they are
        stack, leaf = (
            jax.lax.bitcast_convert_type(x, jnp.uint8) for x in (stack, leaf)
        )
    made = jax.lax.dynamic_update_index_in_dim(stack, leaf, place, 0)
    return made if kind == made.dtype else jax.lax.bitcast_convert_type(made, kind)

"""Where every variable of a model lies on a mesh.

Matrices are split over `fsdp`, each leaf of a packed weight on its own: what is moved
between devices is always the leaf as it is stored, so any axis that divides will do.
Over `tensor` a weight is split into weights: columns of query, key, value, gate and up,
rows of output and down, with the scales and adapters that belong to them. Vectors, and
everything else outside of the layers, are on every device.

Scales that are quantized themselves run in blocks through the whole matrix. Where
blocks do not end with a device's columns, all of them are on every device of `tensor`
and decoded there (`qjax.train.parallel`).

A weight that is trained for a format lies as a dense one does, with its learned scales.
Over `fsdp` it is gathered as floats and rounded whole, over `tensor` rounded by parts.
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qjax.errors import SpecError, UnsupportedError
from qjax.models import Decoder, ModelConfig
from qjax.nn import QEmbed
from qjax.nn.base import QuantizedLayer
from qjax.ops.partition import axes_of
from qjax.tensor import LayoutTensor, QuantizedTensor
from qjax.train.cuts import cut_of, training_cut
from qjax.train.mesh import automatic

Path = tuple[Any, ...]
"""Of a variable, as `nnx.to_flat_state` gives it."""

TABLE = ("embed", "tokens", "embedding")
"""The path of the table of embeddings."""
SIDES = {
    ("attn", "q"): "out",
    ("attn", "k"): "out",
    ("attn", "v"): "out",
    ("attn", "o"): "in",
    ("mlp", "gate"): "out",
    ("mlp", "up"): "out",
    ("mlp", "down"): "in",
}
"""The axis along which a layer's weight is split over `tensor`."""

_VARIABLES = {
    "kernel": {"in": -2, "out": -1},
    "bias": {"out": -1},
    "a": {"in": -2},
    "b": {"out": -1},
    "magnitude": {"out": -1},
    "squares": {"out": -1},
}
"""The axis of a variable that runs along each axis of the weight."""
_WHOLE = ("scale", "alpha", "rank", "key", "clock", "inputs")
"""Variables of adapters, and of training for a format, that run along neither."""


class Layout:
    """The place of a model's variables.

    Args:
      mesh: As `qjax.train.make_mesh` makes it.
      model: A `Decoder`; its arrays may be abstract.

    Attributes:
      mesh: The mesh, axes automatic.
      split_table: Whether columns of the embeddings are split over `fsdp`: those of a
        table that is only looked up, which need not be gathered.

    Raises:
      SpecError: The model cannot be split over `tensor` devices so.
      UnsupportedError: A kind of weight cannot be split over `tensor` at all.
    """

    def __init__(self, mesh: jax.sharding.Mesh, model: Any):
        self.mesh = automatic(mesh)
        self.fsdp, self.tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
        if not isinstance(model, Decoder):
            raise UnsupportedError(
                f"mesh: it is for a Decoder, not for a {type(model).__name__}"
            )
        _check_heads(model.config, self.tensor)
        table = model.embed.tokens
        self.split_table = (
            type(table) is QEmbed
            and not table.frozen
            and table.format is None
            and model.head is not None
            and table.features % self.fsdp == 0
        )
        self._training = self._cuts_of_training(model) if self.tensor > 1 else {}
        self._specs = {
            path: self._of(path, variable)
            for path, variable in nnx.to_flat_state(nnx.state(model))
        }

    def spec(self, path: Path) -> Any:
        """`PartitionSpec`s of a variable's leaves, as a value of the variable."""
        return self._specs[path]

    def specs(self, state: Any) -> Any:
        """A tree like a state of the model, with `PartitionSpec`s for leaves."""
        flat = [
            (path, variable.replace(self._specs[path]))
            for path, variable in nnx.to_flat_state(state)
        ]
        return nnx.from_flat_state(flat)

    def shardings(self, state: Any) -> Any:
        """The same, with shardings."""

        def name(spec: PartitionSpec) -> NamedSharding:
            return NamedSharding(self.mesh, spec)

        return jax.tree.map(name, self.specs(state), is_leaf=_is_spec)

    def place(self, state: Any) -> Any:
        """Puts a state of the model, equal on all hosts, in its place.

        Abstract arrays get their shardings.
        """
        return jax.tree.map(put, state, self.shardings(state))

    def everywhere(self) -> NamedSharding:
        """The sharding of what every device has."""
        return NamedSharding(self.mesh, PartitionSpec())

    def _of(self, path: Path, variable: Any) -> Any:
        """Specs of one variable."""
        value = variable.get_value()
        lead = int(path[0] == "layers")
        side = SIDES.get(path[2:4]) if lead and self.tensor > 1 else None
        entries = self._tensor(path, value, side) if side else {}

        def one(inside: Any, leaf: Any) -> PartitionSpec:
            last = path == TABLE and self.split_table
            used = entries.get(tuple(map(str, inside)), {})
            spec = [used.get(axis - leaf.ndim) for axis in range(leaf.ndim)]
            if leaf.ndim - lead < 2:
                return PartitionSpec(*spec)
            return self._fsdp(spec, leaf.shape, lead, last=last)

        return jax.tree.map_with_path(one, value)

    def _fsdp(
        self, spec: list[Any], shape: Any, lead: int, *, last: bool = False
    ) -> PartitionSpec:
        """Adds `fsdp` to the first axis behind the leading ones that divides."""
        axes = range(lead, len(shape))
        for axis in reversed(axes) if last else axes:
            parts = self.tensor if spec[axis] else 1
            if self.fsdp > 1 and shape[axis] % (parts * self.fsdp) == 0:
                spec[axis] = ("tensor", "fsdp") if spec[axis] else "fsdp"
                break
        return PartitionSpec(*spec)

    def _tensor(self, path: Path, value: Any, side: str) -> dict[Any, dict[int, str]]:
        """Which axes, counted from the last, of which leaves are over `tensor`."""
        name, where = path[-1], ".".join(map(str, path))
        if path[-2] == "qat" and name in ("scale", "offset"):
            return self._training[path[:4]]
        if name in _WHOLE:
            return {}
        if name not in _VARIABLES:
            raise UnsupportedError(
                f"mesh: tensor={self.tensor} has no rule for {where}; use fsdp"
            )
        if name == "magnitude" and side == "in":
            raise UnsupportedError(
                f"mesh: DoRA over rows of {where} that are on {self.tensor} devices; "
                "use fsdp instead of tensor"
            )
        if isinstance(value, QuantizedTensor):
            return self._packed(where, value, side)
        axis = _VARIABLES[name].get(side)
        if axis is None:
            return {}
        if value.shape[axis] % self.tensor:
            raise SpecError(
                f"mesh: tensor={self.tensor} does not divide axis {axis} of {where}, "
                f"{list(value.shape)}"
            )
        return {(): {axis: "tensor"}}

    def _cuts_of_training(self, model: Decoder) -> dict[Path, Any]:
        """Of the layers that are trained for a format, how their scales are cut."""
        found = {}
        for path, layer in nnx.iter_modules(model):
            parts: Any = path
            side = SIDES.get(parts[2:]) if parts[:1] == ("layers",) else None
            if side and isinstance(layer, QuantizedLayer) and layer.qat is not None:
                where = ".".join(map(str, path))
                found[path] = training_cut(layer, side, self.tensor, where)
        return found

    def _packed(self, where: str, q: Any, side: Any) -> dict[Any, dict[int, str]]:
        if not isinstance(q, LayoutTensor):
            raise UnsupportedError(
                f"mesh: tensor={self.tensor} cannot split {where}, a "
                f"{type(q).__name__}; use fsdp"
            )
        cuts = cut_of(q, side, self.tensor)
        if cuts is None:
            raise SpecError(
                f"mesh: tensor={self.tensor} cuts groups of {where}, {q!r}, along its "
                f"{side}puts; use fewer devices, or fsdp"
            )
        return cuts


def put(value: Any, sharding: NamedSharding) -> Any:
    """An array, equal on all hosts, with a sharding; abstract ones only get it."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    if jax.process_count() == 1:
        return jax.device_put(value, sharding)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(value)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])


def split_over(spec: PartitionSpec, name: str) -> int | None:
    """The axis that a spec splits over a mesh axis, if any."""
    found = [axis for axis, entry in enumerate(spec) if name in axes_of(entry)]
    return found[0] if found else None


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _check_heads(config: ModelConfig, parts: int) -> None:
    for name, count in (("query", config.heads), ("key/value", config.kv_heads)):
        if count % parts:
            raise SpecError(
                f"mesh: tensor={parts} does not divide {count} {name} heads; use "
                f"{math.gcd(config.heads, config.kv_heads)} or a divisor of it"
            )

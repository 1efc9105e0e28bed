"""What each device of a mesh computes of a training step.

The step runs under `jax.shard_map`, so every movement between devices is written here
and none is left to a compiler, which would rather move activations than weights, or
weights as floats (and cannot split kernels on TPUs):

* when its layer is due, forward, recomputed or backward, a layer's leaves are gathered
  over `fsdp` as they are stored, packed weights as bytes, and dropped after it;
* gradients of gathered leaves come back summed to the device that holds that part; of
  others they are summed over the devices that saw other rows;
* over `tensor` the inputs of attention and of the MLP are shared and their results are
  summed, twice each way in a block.

A layout says where things are (`qjax.train.layout`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from qjax import ops
from qjax.nn import QEmbed
from qjax.ops.partition import axes_of
from qjax.tensor import LayoutTensor
from qjax.train.cuts import local_weight
from qjax.train.layout import SIDES, TABLE, Layout, Path, split_over
from qjax.train.mesh import BATCH, ROWS
from qjax.wrappers import LayerOf

Gradient = Callable[[Any, Any, Any, Array], tuple[Array, Any]]
"""`(trainable, frozen, batch, key)` to the sum of losses and its gradient."""


class Parallel:
    """A step's parts, to run on every device of a mesh.

    Args:
      layout: Where the model's variables are.
    """

    def __init__(self, layout: Layout):
        self.layout = layout

    def gradient(self, function: Gradient) -> Gradient:
        """The same function of whole arrays, computed by parts.

        Args:
          function: Computes on the rows of one device; its key is that device's own.
        """

        def local(trainable, frozen, batch, key):
            own = jax.random.fold_in(key, lax.axis_index(ROWS))
            loss, grads = function(trainable, frozen, batch, own)
            return lax.psum(loss, ROWS), self._summed(grads)

        def run(trainable, frozen, batch, key):
            where, fixed = map(self.layout.specs, (trainable, frozen))
            batches = jax.tree.map(lambda _: BATCH, batch)
            specs = (where, fixed, batches, PartitionSpec())
            split = self._spread(local, specs, (PartitionSpec(), where))
            return split(trainable, frozen, batch, key)

        return run

    def losses(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """The same for `(trainable, frozen, batch)` to the sum of losses."""

        def local(*operands):
            return lax.psum(function(*operands), ROWS)

        def run(trainable, frozen, batch):
            states = map(self.layout.specs, (trainable, frozen))
            specs = (*states, jax.tree.map(lambda _: BATCH, batch))
            split = self._spread(local, specs, PartitionSpec())
            return split(trainable, frozen, batch)

        return run

    def _spread(self, function: Any, specs: Any, out: Any) -> Any:
        mesh = self.layout.mesh
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
        )

    def model(self, model: Any) -> Any:
        """The same model of this device's leaves, all outside of layers whole.

        A table of embeddings stays split where it is only looked up.
        """
        graph, state = nnx.split(model)

        def whole(path: Path, variable: Any) -> Any:
            if path[0] == "layers" or (path == TABLE and self.layout.split_table):
                return variable
            spec = self.layout.spec(path)
            return variable.replace(jax.tree.map(joined, variable.get_value(), spec))

        made = nnx.merge(graph, _map(whole, state))
        if self.layout.split_table:
            made.embed.tokens = SplitTable(made.embed.tokens)
        return made

    def block(self, run: int, block: Any) -> Any:
        """A layer's block of this device's leaves, with what it needs of others.

        Args:
          run: The run that the layer is of.
          block: Inside the scan over layers; see `qjax.models.block.run_blocks`.
        """
        graph, state = nnx.split(block)

        def whole(path: Path, variable: Any) -> Any:
            value = self._whole(("layers", run, *path), variable.get_value())
            return variable.replace(value)

        made = nnx.merge(graph, _map(whole, state))
        if self.layout.tensor > 1:
            self._divide(made)
        return made

    def _whole(self, path: Path, value: Any) -> Any:
        """A layer's variable, gathered over `fsdp`."""
        spec = self.layout.spec(path)
        specs = jax.tree.leaves(spec, is_leaf=lambda x: isinstance(x, PartitionSpec))
        if all(entry is None for one in specs for entry in one):
            return value
        value = jax.tree.map(_cut, value, is_leaf=_is_view)
        value = jax.tree.map(lambda x, at: joined(x, at[1:]), value, spec)
        side = SIDES.get(path[2:4]) if self.layout.tensor > 1 else None
        if side and isinstance(value, LayoutTensor):
            index = lax.axis_index("tensor")
            return local_weight(value, side, self.layout.tensor, index)
        return value

    def _divide(self, block: Any) -> None:
        """Makes a block of a device's heads and features; adds up what they give."""
        parts, config = self.layout.tensor, block.attn.config
        block.attn.config = dataclasses.replace(
            config, heads=config.heads // parts, kv_heads=config.kv_heads // parts
        )
        for layer in (block.attn.o, block.mlp.down):
            if layer.bias is not None:  # added once
                bias = layer.bias.get_value()
                first = lax.axis_index("tensor") == 0
                kept = jnp.where(first, bias, jnp.zeros_like(bias))
                layer.bias = layer.bias.replace(kept)
        block.attn, block.mlp = Shared(block.attn), Shared(block.mlp)

    def _summed(self, grads: Any) -> Any:
        """Gradients of all rows; of what is whole, also of all heads and features."""

        def one(path: Path, variable: Any) -> Any:
            shared = path[0] == "layers" and path[2] in ("attn", "mlp")
            axes = (*ROWS, "tensor") if shared else ROWS

            def total(grad: Array, spec: PartitionSpec) -> Array:
                own = sum(map(axes_of, spec), ())
                rest = tuple(axis for axis in axes if axis not in own)
                return lax.psum(grad, rest) if rest else grad

            value = variable.get_value()
            spec = self.layout.spec(path)
            return variable.replace(jax.tree.map(total, value, spec))

        return _map(one, grads)


class Shared(nnx.Module):
    """Attention, or an MLP, of the heads or features of one device of `tensor`."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __call__(self, x: Float[Array, "batch time dim"], *rest: Any) -> Any:
        """The sum over devices."""
        y = self.inner(entering(x), *rest)
        return (leaving(y[0]), *y[1:]) if isinstance(y, tuple) else leaving(y)


class SplitTable(QEmbed):
    """A table whose columns are split over `fsdp`, looked up where they are.

    Ids go out to all devices and columns of their rows come back, which is less than
    the table.
    """

    def __init__(self, layer: QEmbed):
        super().__init__(layer.embedding, dtype=layer.dtype)

    def __call__(
        self, ids: Int[Array, "batch time"], out_sharding: Any = None
    ) -> Float[Array, "batch time dim"]:
        """Looks up the rows of this device's ids."""
        del out_sharding
        every = lax.all_gather(ids, "fsdp", axis=0, tiled=True)
        part = ops.embed(every, self.weight(), dtype=self.dtype)
        return lax.all_to_all(part, "fsdp", 0, part.ndim - 1, tiled=True)


@jax.custom_vjp
def entering(x: Array) -> Array:
    """`x`, which all devices of `tensor` use; its gradient is the sum of theirs."""
    return x


entering.defvjp(lambda x: (x, None), lambda _, dy: (_total(dy),))


@jax.custom_vjp
def leaving(y: Array) -> Array:
    """The sum of `y` over the devices of `tensor`; all have its gradient."""
    return _total(y)


leaving.defvjp(lambda y: (_total(y), None), lambda _, dy: (dy,))


def _total(x: Array) -> Array:
    return lax.psum(x.astype(jnp.float32), "tensor").astype(x.dtype)


def joined(x: Any, spec: Any) -> Any:
    """An array gathered over `fsdp` along the axis that a spec names; bytes as bytes.

    Args:
      x: This device's part.
      spec: Of its axes.
    """
    axis = split_over(spec, "fsdp")
    if axis is None:
        return x
    kind = x.dtype
    if kind.itemsize == 1 and kind != jnp.uint8:
        x = lax.bitcast_convert_type(x, jnp.uint8)
    x = lax.all_gather(x, "fsdp", axis=axis, tiled=True)
    return x if x.dtype == kind else lax.bitcast_convert_type(x, kind)


def _map(function: Callable[[Path, Any], Any], state: Any) -> Any:
    """Applies a function of path and variable to a state."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, function(path, v)) for path, v in flat])


def _is_view(leaf: Any) -> bool:
    return isinstance(leaf, LayerOf)


def _cut(leaf: Any) -> Any:
    return leaf.cut() if isinstance(leaf, LayerOf) else leaf

"""What a layer holds while its weight is trained for its format.

The layer keeps a float weight, `Master`, and every call multiplies by its codes, so
that freezing changes nothing; `Training` adds what is learned beside it.

*Straight-through* (any format): the method of the recipe chooses scales anew in every
call, and `dw'/dw = 1` everywhere, beyond the range of the codes too.

*Learned step sizes* (`Int`): scales and offsets are parameters beside the weight; see
`qjax.nn.lsq`.

Weights of adapters: what is rounded is `w + scale a b`, for DoRA with its columns
scaled to the magnitude; the base is not trained and may be packed.

Reference: Bengio et al., arXiv 1308.3432 (straight-through estimator).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats.base import divided, rounded
from qjax.methods import quantize
from qjax.methods.array import check_finite
from qjax.nn.lsq import Spec, first_scales, for_scales, learned
from qjax.ops.trained import instead
from qjax.tensor import QuantizedTensor, with_dtype
from qjax.wrappers import RoundedInputs, Trained, Transposed

NOW = np.int32(2**31 - 1)
"""The step of a model that is not being trained: everything is rounded."""


class Master(nnx.Param):
    """A float weight that is trained for its format."""


class Learned(nnx.Param):
    """A scale or offset that is learned."""


class Fixed(nnx.Variable):
    """A scale that is not."""


class Clock(nnx.Variable):
    """The number of the training step, int32; see `at_step`."""


def at_step(tree: Any, step: Any) -> Any:
    """Tells the layers of a model the number of the training step.

    Args:
      tree: an `nnx.State`.
      step: int32 scalar, traced or not.

    Returns:
      The tree with `step` in every `Clock`.
    """

    def tell(leaf: Any) -> Any:
        if not isinstance(leaf, Clock):
            return leaf
        held = leaf.get_value()
        return leaf.replace(jnp.broadcast_to(step, held.shape).astype(held.dtype))

    return jax.tree.map(tell, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


class Training(nnx.Module):
    """What a layer is trained with, beside its weight.

    Args:
      layer: dense or under an adapter, with a format.
      learn: `"none"` or `"lsq"`.
      activation: what inputs are rounded to, or None.
      start: first training step at which anything is rounded.
      backward: see `qjax.wrappers.Trained`.
      adapter: a `qjax.nn.lora.Adapter` to train in place of the weight, or None.

    Attributes:
      scale: learned scales as a format stores them, float32; or None.
      offset: learned offsets of the same shape, or None.
      inputs: static scale of the inputs, learned or not; None for one of each row's.
      clock: step of the training, where something starts later.
    """

    def __init__(
        self,
        layer: Any,
        *,
        learn: str = "none",
        activation: str | None = None,
        start: int = 0,
        backward: tuple[str, ...] = (),
        adapter: Any = None,
    ):
        self.adapter, self.activation = adapter, activation
        self.start, self.backward = start, backward
        held = layer.variable.get_value()
        self.dtype = str(jnp.dtype(held.dtype).name)
        w = self._merged(layer)
        self.inputs = nnx.data(None)
        at = nnx.data(None)
        self.clock = Clock(jnp.full(w.shape[:-2], NOW, jnp.int32)) if start else at
        self.scale = self.offset = nnx.data(None)
        if learn == "lsq":
            scale, offset = first_scales(
                w, layer.format, layer.method, layer.weight_axis
            )
            self.scale = Learned(scale)
            self.offset = nnx.data(None) if offset is None else Learned(offset)

    def weight(self, layer: Any) -> Trained:
        """What the layer multiplies by: codes of one matrix, differentiable."""
        spec, w = self._spec(layer), self._merged(layer)
        scale, offset, inputs = map(_value, (self.scale, self.offset, self.inputs))
        fixed = lax.stop_gradient((w, scale, offset, inputs))
        base = lax.stop_gradient(_pack(*fixed, spec))
        dense: Any = base.dequantize(jnp.float32)
        if scale is None:
            dense = instead(dense, w)
        else:
            dense = learned(w, scale, offset, base, spec)
        active = None
        if self.clock is not None:
            active = self.clock.get_value() >= self.start
            dense = jnp.where(active[..., None, None], dense, w)
        moved = None
        if inputs is not None and isinstance(self.inputs, Learned):
            moved = _positive(inputs)
        return Trained(base, dense, moved, active, self.backward)

    def packed(
        self, layer: Any, name: str = "weight", nonfinite: str = "raise"
    ) -> QuantizedTensor:
        """The codes that the layer multiplies by now; matrix by matrix.

        Args:
          layer: the layer.
          name: what errors call the weight.
          nonfinite: only `"raise"`; training has spoiled what is not finite.

        Raises:
          NonFiniteError: the weight or what is learned holds NaN or infinity.
          SpecError: another `nonfinite`.
        """
        if nonfinite != "raise":
            raise SpecError(
                f"{name}: nonfinite={nonfinite!r} is for weights that were not "
                "trained; leave it out and restore an earlier checkpoint"
            )
        parts = (self._parts(layer), self.scale, self.offset, self.inputs)
        arrays = tuple(map(_value, parts))
        for leaf in jax.tree.leaves(arrays):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                check_finite(leaf, name)
        lead = layer.to_matrix(_dense(layer)).ndim - 2
        return _pack_alone(arrays, self._spec(layer), lead)

    def _spec(self, layer: Any) -> Spec:
        pool = 1 if self.adapter is None else self.adapter.pool
        return Spec(
            layer.format,
            layer.method,
            layer.weight_axis,
            self.activation,
            pool,
            self.dtype,
        )

    def _parts(self, layer: Any) -> tuple[Any, ...]:
        """The weight in matrix form, and what an adapter adds."""
        one, w = self.adapter, layer.to_matrix(_dense(layer))
        if one is None:
            return (w,)
        return (w, *map(_value, (one.a, one.b, one.scale, one.magnitude)))

    def _merged(self, layer: Any) -> Float[Array, "*lead in out"]:
        """The weight that is rounded, float32."""
        return merged(
            self._parts(layer), 1 if self.adapter is None else self.adapter.pool
        )


def merged(parts: tuple[Any, ...], pool: int = 1) -> Float[Array, "*lead in out"]:
    """The weight that is rounded: a base, or a base and its adapter, in float32.

    Args:
      parts: the weight alone; or weight, `a`, `b`, scale and magnitude (or None) of an
        adapter.
      pool: inputs that share a row of `a`, averaged.
    """
    w = parts[0].astype(jnp.float32)
    if len(parts) == 1:
        return w
    _, a, b, scale, magnitude = lax.optimization_barrier((w, *parts[1:]))
    delta = jnp.matmul(a, b, precision="highest")
    delta = rounded(lax.optimization_barrier(delta) * scale[..., None, None])
    if pool > 1:
        delta = jnp.repeat(delta, pool, axis=-2) * (1.0 / pool)
    w = w + rounded(delta)
    if magnitude is not None:
        squares = lax.optimization_barrier(jnp.square(lax.stop_gradient(w)))
        norm = jnp.sqrt(jnp.sum(squares, axis=-2, keepdims=True))
        w = w * divided(magnitude[..., None, :], jnp.maximum(norm, 1e-30))
    return w


def _pack(w, scale, offset, inputs, spec: Spec) -> QuantizedTensor:
    """Codes of a matrix, behind barriers: the compiler rounds as it does alone."""
    w, scale, offset = lax.optimization_barrier((w, scale, offset))
    if scale is None:
        q = quantize(w, spec.format, spec.method, axis=spec.axis)
    else:
        q = for_scales(
            jnp.swapaxes(w, -1, -2) if spec.axis == -1 else w, scale, offset, spec
        )
        q = Transposed(q) if spec.axis == -1 else q
    q = with_dtype(lax.optimization_barrier(q), spec.dtype)
    if spec.activation is None:
        return q
    return RoundedInputs(
        q, spec.activation, None if inputs is None else _positive(inputs)
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pack_all(arrays, spec: Spec, lead: int):
    """Codes of a stack, each matrix by the program that a call runs for it."""

    def one(arrays):
        parts, scale, offset, inputs = arrays
        return _pack(merged(parts, spec.pool), scale, offset, inputs, spec)

    run: Any = one
    for _ in range(lead):
        run = functools.partial(lax.map, run)
    return run(arrays)


def _pack_alone(arrays, spec: Spec, lead: int):
    """The same of arrays that may be on several devices: on one, layer by layer."""
    leaves = jax.tree.leaves(arrays)
    devices = {device for leaf in leaves for device in leaf.sharding.device_set}
    if len(devices) == 1:
        return _pack_all(arrays, spec, lead)
    if not lead:
        return _pack_all(jax.device_put(arrays, jax.local_devices()[0]), spec, 0)
    made = [
        _pack_alone(jax.tree.map(lambda x, i=i: x[i], arrays), spec, lead - 1)
        for i in range(leaves[0].shape[0])
    ]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *made)


def _positive(scale):
    return jnp.maximum(scale, float(jnp.finfo(jnp.float32).tiny))


def _value(part: Any) -> Any:
    if isinstance(part, tuple):
        return tuple(map(_value, part))
    return part.get_value() if isinstance(part, nnx.Variable) else part


def _dense(layer: Any) -> Any:
    """The layer's weight as an array; a packed one is decoded."""
    value = layer.variable.get_value()
    if isinstance(value, QuantizedTensor):
        return value.dequantize(jnp.float32)
    return value

"""Low-rank adapters beside frozen weights: LoRA, rsLoRA, DoRA, QA-LoRA.

A layer keeps its weight, dense or packed, and an `Adapter` holds what is trained. The
factors are `nnx.LoRAParam`s in float32; the weight is not, so `nnx.split(model,
nnx.LoRAParam, ...)` gives the trained tree and the frozen one. The weight is multiplied
as it is: a packed one stays packed, in the gradient too.

    y = x W + s drop(x) A B (+ bias)                    LoRA, s = alpha / r
    y = m / |W + s A B| * (x W + s x A B) (+ bias)      DoRA, norms of columns
    y = x W + s mean(x) A B (+ bias)                    QA-LoRA, s = alpha in / (r pool)

Leading axes of the factors are the weight's: layers of a scanned stack, experts.

Reference: Hu et al., arXiv 2106.09685 (LoRA); Kalajdzievski, arXiv 2312.03732
(rsLoRA: s = alpha / sqrt(r)); Liu et al., arXiv 2402.09353 (DoRA, whose norm is a
constant of the gradient, section 4.3); Xu et al., arXiv 2309.14717 (QA-LoRA).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Num

from qjax import ops
from qjax.nn.base import compute_dtype
from qjax.nn.einsum import QEinsum
from qjax.nn.linear import QEmbed, QLinear, kept, multiply, reshard
from qjax.tensor import QuantizedTensor
from qjax.wrappers import RoundedInputs, Wrapper


class AdapterConstant(nnx.Variable):
    """A number of an adapter that is not trained."""


class DropoutKey(nnx.Variable):
    """A PRNG key per layer; while there is one, inputs of adapters are dropped."""


class Adapter(nnx.Module):
    """The low-rank part of one layer, or of a stack of layers.

    Args:
      a: `[*lead, in / pool, rank]`; of a table of embeddings `[vocab, rank]`.
      b: `[*lead, rank, out]`.
      scale: `[*lead]`, the factor of the product.
      magnitude: `[*lead, out]`, the norms of the columns, of DoRA; or None.
      squares: `[*lead, out]`, squared norms of the columns of the frozen weight, with
        `magnitude`.
      rank: `[*lead]`, columns of `a` in use, where layers of a stack differ: the others
        are zeros and stay so. Their number by default.
      alpha: `[*lead]`, what `scale` was made from, for files.
      rate: Part of the inputs that dropout sets to 0.
      pool: Inputs that are averaged before they meet `a` (QA-LoRA).

    Attributes:
      key: `DropoutKey`, which `with_dropout_key` sets; None without dropout.
    """

    def __init__(
        self,
        a: Float[Array, "*lead in rank"],
        b: Float[Array, "*lead rank out"],
        scale: Float[Array, "*lead"],
        *,
        magnitude: Float[Array, "*lead out"] | None = None,
        squares: Float[Array, "*lead out"] | None = None,
        rank: Int[Array, "*lead"] | None = None,
        alpha: Float[Array, "*lead"] | None = None,
        rate: float = 0.0,
        pool: int = 1,
    ):
        none = nnx.data(None)
        self.a, self.b = nnx.LoRAParam(a), nnx.LoRAParam(b)
        self.scale = AdapterConstant(scale)
        self.magnitude = none if magnitude is None else nnx.LoRAParam(magnitude)
        self.squares = none if squares is None else AdapterConstant(squares)
        rank = jnp.full(scale.shape, a.shape[-1], jnp.int32) if rank is None else rank
        self.rank = AdapterConstant(rank)
        alpha = scale * rank.astype(jnp.float32) if alpha is None else alpha
        self.alpha = AdapterConstant(alpha)
        self.rate, self.pool = rate, pool
        lead = a.shape[:-2]
        self.key = DropoutKey(jnp.zeros((*lead, 2), jnp.uint32)) if rate else none

    def drop(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
        """Sets a part `rate` of the inputs to 0 and scales the rest up.

        A key of zeros, which new adapters have, drops nothing.
        """
        if self.key is None:
            return x
        data = self.key.get_value()
        rate = jnp.where(jnp.any(data), self.rate, 0.0)
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
        kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
        return jnp.where(kept, x / (1.0 - rate).astype(x.dtype), jnp.zeros_like(x))

    def delta(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Returns `s pool(x) A B` in the dtype of `x`."""
        if self.pool > 1:
            x = x.reshape(*x.shape[:-1], -1, self.pool).mean(-1)
        a, b = (leaf.get_value().astype(x.dtype) for leaf in (self.a, self.b))
        return _factor(kept(_factor(x, a)), b) * self.scale.get_value().astype(x.dtype)

    def columns(self, w: Any) -> Float[Array, " out"]:
        """Returns `m / |W + s A B|` of DoRA, float32; the norm has no gradient.

        |W + s A B|^2 = |W|^2 + 2 s sum_r B * (A^T W) + s^2 sum_r B * (A^T A B), so that
        the weight is only multiplied by.
        """
        assert self.magnitude is not None and self.squares is not None
        a, b = (lax.stop_gradient(leaf.get_value()) for leaf in (self.a, self.b))
        s = self.scale.get_value()
        if isinstance(w, QuantizedTensor):
            own = ops.matmul(a.T, lax.stop_gradient(_exact(w)))
        else:
            thin, dense = a.T.astype(w.dtype), lax.stop_gradient(w)
            own = jnp.matmul(thin, dense, preferred_element_type=jnp.float32)
        gram = jnp.matmul(a.T, a, precision="highest")
        own = 2.0 * own + s * jnp.matmul(gram, b, precision="highest")
        squares = self.squares.get_value() + s * jnp.sum(b * own, 0)
        norm = lax.stop_gradient(jnp.sqrt(jnp.maximum(squares, 1e-30)))
        return self.magnitude.get_value() / norm


@jax.custom_vjp
def _factor(
    x: Float[Array, "*batch in"], w: Float[Array, "in out"]
) -> Float[Array, "*batch out"]:
    """The product with a factor, of which `in` or `out` is the rank.

    The factor's gradient is computed so that no wide array has to be transposed: XLA
    on CPU copies the first operand when it is summed over its rows.
    """
    return x @ w


def _factor_forward(x, w):
    return x @ w, (x, w)


def _factor_backward(kept, g):
    x, w = kept
    rows = tuple(range(x.ndim - 1))

    def along(a, b):
        return lax.dot_general(a, b, ((rows, rows), ((), ())))

    if x.shape[-1] <= g.shape[-1]:
        dw = along(x, g)
    else:
        dw = lax.optimization_barrier(along(g, x)).T
    return g @ w.T, dw


_factor.defvjp(_factor_forward, _factor_backward)


class LoRALinear(QLinear):
    """A `QLinear` with an adapter.

    Args:
      layer: What it replaces; its variables are shared.
      lora: The adapter.
    """

    lora: Adapter

    def __init__(self, layer: QLinear, lora: Adapter):
        super().__init__(layer.kernel, layer.bias, **settings_of(layer))
        self.lora, self.note = lora, layer.note

    def __call__(
        self, x: Num[Array, "*batch in"], out_sharding: Any = None
    ) -> Float[Array, "*batch out"]:
        """See `QLinear`."""
        x = x.astype(compute_dtype(x, self.dtype, self.param_dtype))
        w = self.weight()
        y = self.adapted(x, multiply(x, w, self), w)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(x.dtype).astype(y.dtype)
        return reshard(kept(y), out_sharding)

    def adapted(
        self,
        x: Float[Array, "*batch in"],
        y: Float[Array, "*batch out"],
        w: Any = None,
    ) -> Float[Array, "*batch out"]:
        """Returns the product with weight and adapter, without the bias.

        Args:
          x: The input.
          y: Its product with the weight alone.
          w: The weight, if it is at hand.
        """
        return _adapted(self.lora, x, y, self.weight() if w is None else w, self)


def _adapted(lora: Adapter, x: Any, y: Any, w: Any, layer: Any) -> Any:
    """The product `y = x w` of a layer with what its adapter adds."""
    dropped = lora.drop(x)
    delta = lora.delta(dropped).astype(y.dtype)
    if lora.magnitude is None:
        return y + delta
    factor = lora.columns(w).astype(y.dtype)
    base = y if lora.key is None else multiply(dropped, w, layer).astype(y.dtype)
    return y + (factor - 1) * base + factor * delta


def _exact(w: Any) -> Any:
    """A packed weight whose products do not round their inputs."""
    if isinstance(w, RoundedInputs):
        return _exact(w.base)
    if isinstance(w, Wrapper):
        return dataclasses.replace(w, base=_exact(w.base))
    return w


class LoRAEmbed(QEmbed):
    """A `QEmbed` with an adapter: `y = E[ids] + s A[ids] B`.

    The tied head of a model multiplies by the table alone, as in PEFT.

    Args:
      layer: What it replaces; its variable is shared.
      lora: The adapter, `a` of `[vocab, rank]`.
    """

    lora: Adapter

    def __init__(self, layer: QEmbed, lora: Adapter):
        super().__init__(layer.embedding, **settings_of(layer))
        self.lora, self.note = lora, layer.note

    def __call__(
        self, ids: Int[Array, "*batch"], out_sharding: Any = None
    ) -> Float[Array, "*batch dim"]:
        """See `QEmbed`."""
        y, lora = super().__call__(ids), self.lora
        rows = jnp.take(lora.a.get_value(), ids, axis=0, mode="clip").astype(y.dtype)
        delta = rows @ lora.b.get_value().astype(y.dtype)
        delta = delta * lora.scale.get_value().astype(y.dtype)
        return reshard(y + delta, out_sharding)


class LoRAEinsum(QEinsum):
    """A `QEinsum` with adapters of its matrix form, one for every expert.

    Args:
      layer: What it replaces; its variables are shared.
      lora: The adapters; their leading axes are the batch axes of the kernel.
    """

    lora: Adapter

    def __init__(self, layer: QEinsum, lora: Adapter):
        super().__init__(layer.equation, layer.kernel, layer.bias, **settings_of(layer))
        self.lora, self.note = lora, layer.note

    def __call__(
        self, x: Num[Array, "..."], *, out_sharding: Any = None
    ) -> Float[Array, "..."]:
        """See `QEinsum`."""
        x = x.astype(compute_dtype(x, self.dtype, self.param_dtype))
        graph, state = nnx.split(self.lora)

        def product(x: Any, own: Any) -> Any:
            w, state = own
            return _adapted(nnx.merge(graph, state), x, multiply(x, w, self), w, self)

        own = self.weight(), state
        y = self.equation.apply(x, own, self.kernel_shape, product)
        if self.bias is not None:
            bias = self.bias.get_value().astype(x.dtype).astype(y.dtype)
            y = y + self.equation.spread(bias, x.ndim)
        return reshard(y, out_sharding)


ADAPTED = {QLinear: LoRALinear, QEmbed: LoRAEmbed, QEinsum: LoRAEinsum}
"""Layers, and the same with an adapter."""


def settings_of(layer: Any) -> dict[str, Any]:
    """The settings that a layer was made with."""
    names = ("dtype", "param_dtype", "precision", "preferred_element_type")
    names += ("format", "method", "kernel_shape")
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def without_adapter(layer: Any) -> Any:
    """The layer that an adapted one replaced; of Flax's layers, ours."""
    made: Any
    if isinstance(layer, LoRAEinsum):
        made = QEinsum(layer.equation, layer.kernel, layer.bias, **settings_of(layer))
    elif isinstance(layer, LoRAEmbed):
        made = QEmbed(layer.embedding, **settings_of(layer))
    else:
        made = QLinear(layer.kernel, layer.bias, **settings_of(layer))
    made.note = layer.note
    return made


def with_dropout_key(tree: Any, key: Array | None) -> Any:
    """Gives the layers of every adapter keys of their own.

    Args:
      tree: A module or an `nnx.State`; keys are not trained, so they are in the frozen
        part.
      key: A PRNG key, typed or raw; None turns dropout off.

    Returns:
      A copy of the tree with new keys.
    """
    number = 0

    def own(leaf: Any) -> Any:
        nonlocal number
        if not isinstance(leaf, DropoutKey):
            return leaf
        number += 1
        shape = leaf.get_value().shape
        if key is None:
            return leaf.replace(jnp.zeros(shape, jnp.uint32))
        bits = jax.random.bits(jax.random.fold_in(key, number), shape, jnp.uint32)
        return leaf.replace(bits | jnp.uint32(1))  # never all zero

    return jax.tree.map(own, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))

"""Small parts of a block: norms, activations, the MLP, linear layers.

Norms compute in float32 whatever the stream's dtype; everything else computes in the
dtype of its input.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qjax.models.config import ModelConfig
from qjax.ops import matmul
from qjax.tensor import QuantizedTensor
from qjax.wrappers import Transposed

Leaves = Mapping[str, Any]
"""Parameters of one part by path relative to it, such as `"q.kernel"`."""


def below(leaves: Leaves, prefix: str) -> dict[str, Any]:
    """Returns the leaves under `prefix.`, with that prefix removed."""
    start = f"{prefix}."
    return {k[len(start) :]: v for k, v in leaves.items() if k.startswith(start)}


def leaves_of(module: nnx.Module) -> dict[str, Any]:
    """Returns the parameters of a module by dotted path; inverse of construction."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


class QuantizedParam(nnx.Variable):
    """A variable that holds a quantized tensor; not an `nnx.Param`."""


def variable(leaf: Any) -> nnx.Variable:
    """Returns the variable for a leaf: `nnx.Param` unless it is quantized."""
    quantized = isinstance(leaf, QuantizedTensor)
    return QuantizedParam(leaf) if quantized else nnx.Param(leaf)


class Linear(nnx.Module):
    """y = x W (+ b), with W dense or quantized."""

    def __init__(self, leaves: Leaves):
        self.kernel = variable(leaves["kernel"])
        bias = leaves.get("bias")
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Multiplies; the result has the dtype of `x`."""
        y = matmul(x, self.kernel.get_value())
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def wide(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Multiplies with a float32 result."""
        y = wide_matmul(x, self.kernel.get_value())
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


def wide_matmul(x: Float[Array, "*batch in"], w: Any) -> Float[Array, "*batch out"]:
    """Returns x W in float32, without rounding to the compute dtype where W is dense."""
    if isinstance(w, QuantizedTensor):
        return matmul(x, w).astype(jnp.float32)
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


class Embedding(nnx.Module):
    """Token embedding, learned positions if the model has them, and the tied head."""

    def __init__(self, leaves: Leaves, config: ModelConfig):
        self.embedding = variable(leaves["embedding"])
        position = leaves.get("position")
        self.position = None if position is None else nnx.Param(position)
        self.offset, self.scale = config.position_offset, config.embed_scale

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        dtype: Any,
    ) -> Float[Array, "batch time dim"]:
        """Returns scale * E[token] (+ P[position + offset])."""
        x = self.embedding.get_value()[tokens].astype(dtype)
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, dtype)
        if self.position is not None:
            rows = jnp.maximum(positions, 0) + self.offset
            x = x + jnp.take(self.position[...], rows, axis=0).astype(dtype)
        return x

    def attend(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        """Returns float32 x E^T, the logits of a tied head."""
        table = self.embedding.get_value()
        if isinstance(table, QuantizedTensor):
            turned = table.base if isinstance(table, Transposed) else Transposed(table)
            return wide_matmul(x, turned)
        return wide_matmul(x, table.T)


class Norm(nnx.Module):
    """RMS norm or layer norm over the last axis, computed in float32.

    rms: y = x / sqrt(mean(x^2) + eps) * (scale + offset);
    layer: y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias.

    Args:
        leaves: `scale` and `bias`, either absent.
        config: Gives kind, eps and offset.
        kind: Overrides the configured kind.
    """

    def __init__(self, leaves: Leaves, config: ModelConfig, kind: str | None = None):
        scale, bias = leaves.get("scale"), leaves.get("bias")
        self.scale = None if scale is None else nnx.Param(scale)
        self.bias = None if bias is None else nnx.Param(bias)
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.centred = (kind or config.norm) == "layer"

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Normalizes; the result has the dtype of `x`."""
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * (self.scale[...].astype(jnp.float32) + self.offset)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _relu2(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": _relu2,
}


class MLP(nnx.Module):
    """Gated, `down(act(gate x) * up x)`, or plain, `down(act(up x))`."""

    def __init__(self, leaves: Leaves, config: ModelConfig):
        self.gate = Linear(below(leaves, "gate")) if config.gated else None
        self.up = Linear(below(leaves, "up"))
        self.down = Linear(below(leaves, "down"))
        self.activation = config.activation

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Applies the MLP."""
        act = ACTIVATION_FUNCTIONS[self.activation]
        up = self.up(x)
        hidden = act(up) if self.gate is None else act(self.gate(x)) * up
        return self.down(hidden)

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

from qjax import ops
from qjax.models.config import ModelConfig
from qjax.nn import QEmbed, QLinear
from qjax.tensor import QuantizedTensor
from qjax.wrappers import Transposed

Leaves = Mapping[str, Any]
"""Parameters of one part by path relative to it, such as `"q.kernel"`."""


def below(leaves: Leaves, prefix: str) -> dict[str, Any]:
    """Returns the leaves under `prefix.`, with that prefix removed."""
    start = f"{prefix}."
    return {k[len(start) :]: v for k, v in leaves.items() if k.startswith(start)}


def leaves_of(module: nnx.Module) -> dict[str, Any]:
    """Returns the parameters of a module by dotted path; inverse of construction.

    Adapters are not among them.
    """
    own = nnx.Not(nnx.PathContains("lora"))
    flat = nnx.to_flat_state(nnx.state(module, own))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def linear(leaves: Leaves) -> QLinear:
    """Returns y = x W (+ b) over a dense or quantized kernel."""
    return QLinear(leaves["kernel"], leaves.get("bias"))


def wide_matmul(x: Float[Array, "*batch in"], w: Any) -> Float[Array, "*batch out"]:
    """Returns x W in float32; a dense W keeps the accumulator's full precision."""
    if isinstance(w, QuantizedTensor):
        return ops.matmul(x, w).astype(jnp.float32)
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


class Embedding(nnx.Module):
    """Token embedding, learned positions if the model has them, and the tied head."""

    def __init__(self, leaves: Leaves, config: ModelConfig, dtype: Any):
        self.tokens = QEmbed(leaves["embedding"], dtype=dtype)
        learned = "position" in leaves
        self.places = QEmbed(leaves["position"], dtype=dtype) if learned else None
        self.offset, self.scale = config.position_offset, config.embed_scale

    def __call__(
        self, tokens: Int[Array, "batch time"], positions: Int[Array, "batch time"]
    ) -> Float[Array, "batch time dim"]:
        """Returns scale * E[token] (+ P[position + offset])."""
        x = self.tokens(tokens)
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.places is not None:
            x = x + self.places(jnp.maximum(positions, 0) + self.offset)
        return x

    def attend(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        """Returns float32 x E^T, the logits of a tied head."""
        table = self.tokens.weight()
        if isinstance(table, QuantizedTensor):
            turned = table.base if isinstance(table, Transposed) else Transposed(table)
            return wide_matmul(x, turned)
        return wide_matmul(x, table.T)

    def leaves(self) -> dict[str, Any]:
        """Returns the tables by the names they are built from."""
        tables = {"embedding": self.tokens, "position": self.places}
        return {
            name: table.variable.get_value()
            for name, table in tables.items()
            if table is not None
        }


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
        self.gate = linear(below(leaves, "gate")) if config.gated else None
        self.up = linear(below(leaves, "up"))
        self.down = linear(below(leaves, "down"))
        self.activation = config.activation

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Applies the MLP."""
        act = ACTIVATION_FUNCTIONS[self.activation]
        up = self.up(x)
        hidden = act(up) if self.gate is None else act(self.gate(x)) * up
        return self.down(hidden)

"""`QLinear` and `QEmbed`: products and look-ups with a dense or packed weight.

They compute through `qjax.ops`, so a packed weight is never expanded. Leading axes of
the leaves are for `scan` and `vmap`: a layer whose leaves carry a layer axis is split,
scanned and merged like any NNX module.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Num

from qjax import ops
from qjax.formats import Format
from qjax.methods import Method
from qjax.nn.base import QuantizedLayer, as_variable, compute_dtype
from qjax.tensor import QuantizedTensor
from qjax.wrappers import Transposed

PRODUCT = "product"
"""Name of results of products, for policies of `jax.checkpoint`."""


class QLinear(QuantizedLayer):
    """`y = x W (+ b)`.

    Args:
      kernel: float array `[in, out]`, a `QuantizedTensor` of that shape, or a variable
        holding one; leaves may carry leading axes that are scanned or mapped over.
      bias: `[out]`, an array or variable, or None.
      dtype: compute dtype; by default that of `x`, promoted with `param_dtype`.
      param_dtype: takes part in promotion as Flax does; None leaves `x` alone.
      precision: `jax.lax.Precision` of the products.
      preferred_element_type: dtype of the result, when it differs from the compute one.
      format: quantize a float kernel on the fly to this format.
      method: how codes are chosen.

    Example:
      >>> layer = QLinear(qjax.quantize(w, qjax.Int(4, 128)))
      >>> y = layer(x)
    """

    def __init__(
        self,
        kernel: Any,
        bias: Any = None,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        precision: Any = None,
        preferred_element_type: Any = None,
        format: Format | None = None,
        method: Method | None = None,
    ):
        self.kernel = as_variable(kernel)
        self.bias = nnx.data(None) if bias is None else as_variable(bias)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.preferred_element_type = preferred_element_type
        self.format = format
        self.method = method

    @property
    def in_features(self) -> int:
        """Size of the contracted axis."""
        return self.kernel.get_value().shape[-2]

    @property
    def out_features(self) -> int:
        """Size of the result."""
        return self.kernel.get_value().shape[-1]

    def __call__(
        self, x: Num[Array, "*batch in"], out_sharding: Any = None
    ) -> Float[Array, "*batch out"]:
        """Multiplies; the result has the compute dtype.

        Args:
          x: input.
          out_sharding: sharding of the result, as in `nnx.Linear`.
        """
        dtype = compute_dtype(x, self.dtype, self.param_dtype)
        y = multiply(x.astype(dtype), self.weight(), self)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(dtype).astype(y.dtype)
        return reshard(kept(y), out_sharding)


class QEmbed(QuantizedLayer):
    """`y = E[ids]`, and `x E^T` for tied logits.

    Args:
      embedding: table `[vocab, dim]`, an array, a `Transposed` quantized tensor (groups
        along `dim`), or a variable holding one.
      dtype: dtype of the result; by default that of the table.
      format: quantize a float table on the fly to this format.
      method: how codes are chosen.

    Example:
      >>> table = qjax.quantize(w, qjax.Int(8, "channel"), axis=-1)
      >>> y = QEmbed(table)(ids)
    """

    weight_name = "embedding"
    weight_axis = -1

    def __init__(
        self,
        embedding: Any,
        *,
        dtype: Any = None,
        format: Format | None = None,
        method: Method | None = None,
    ):
        self.embedding = as_variable(embedding)
        self.dtype = dtype
        self.format = format
        self.method = method

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return self.embedding.get_value().shape[-2]

    @property
    def features(self) -> int:
        """Size of a row."""
        return self.embedding.get_value().shape[-1]

    def __call__(
        self, ids: Int[Array, "*batch"], out_sharding: Any = None
    ) -> Float[Array, "*batch dim"]:
        """Looks up rows.

        Args:
          ids: row numbers; those outside the table are clipped.
          out_sharding: sharding of the result.
        """
        table = self.weight()
        y = ops.embed(ids, table, dtype=self.dtype)
        return reshard(y, out_sharding)

    def attend(
        self, x: Float[Array, "*batch dim"], out_sharding: Any = None
    ) -> Float[Array, "*batch vocab"]:
        """Multiplies by the transposed table, for logits of a tied head.

        Args:
          x: hidden states.
          out_sharding: sharding of the result.
        """
        x = x.astype(compute_dtype(x, self.dtype, None))
        return reshard(multiply(x, transpose(self.weight()), self), out_sharding)


def transpose(w: Any) -> Any:
    """The transposed weight, without touching codes."""
    if isinstance(w, Transposed):
        return w.base
    return Transposed(w) if isinstance(w, QuantizedTensor) else jnp.swapaxes(w, -1, -2)


def multiply(x: Float[Array, "*batch in"], w: Any, layer: Any) -> Float[Array, "..."]:
    """`ops.matmul` under a layer's `precision` and `preferred_element_type`."""
    precision = getattr(layer, "precision", None)
    wanted = getattr(layer, "preferred_element_type", None)
    if wanted is not None:
        with jax.numpy_dtype_promotion("standard"):
            x = x.astype(jnp.promote_types(x.dtype, wanted))
    scope = contextlib.nullcontext()
    if precision is not None:
        scope = jax.default_matmul_precision(_precision_name(precision))
    with scope:
        y = ops.matmul(x, w)
    return y if wanted is None else y.astype(wanted)


def _precision_name(precision: Any) -> str:
    """What `jax.default_matmul_precision` calls a precision; of a pair, the first."""
    if isinstance(precision, tuple):
        precision = precision[0]
    name = getattr(precision, "name", precision)
    return name.lower() if isinstance(precision, jax.lax.Precision) else str(name)


def kept(y: Array) -> Array:
    """Marks what a gradient finds stored under `remat="products"`."""
    return checkpoint_name(y, PRODUCT)


def reshard(y: Array, out_sharding: Any) -> Array:
    """Applies an `out_sharding` argument, when there is one."""
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)

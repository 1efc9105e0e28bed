"""`QConv`: `nnx.Conv` and `nnx.ConvTranspose` with a packed kernel.

The kernel `[*taps, in / groups, out]` is quantized as one matrix `[taps * in / groups,
out]`, so that groups may span taps: early and depthwise convolutions have few inputs
per tap. Each call decodes the kernel and runs Flax's own convolution. Kernels are small
next to activations, so the decoded kernel is the only cost; it is a temporary of the
call, in the logical dtype of the weight.
"""

import math
import types
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from qjax.formats import Format
from qjax.methods import Method
from qjax.nn.base import QuantizedLayer
from qjax.tensor import QuantizedTensor


class QConv(QuantizedLayer):
    """A convolution whose kernel is quantized on the fly, or packed.

    Args:
      conv: the `nnx.Conv` or `nnx.ConvTranspose` to take settings and variables from.
      format: number format of the kernel.
      method: how codes are chosen.

    Example:
      >>> layer = QConv(nnx.Conv(8, 16, (3, 3), rngs=rngs), qjax.Int(8, "channel"))
    """

    kernel: Any

    def __init__(
        self,
        conv: nnx.Conv | nnx.ConvTranspose,
        format: Format,
        method: Method | None = None,
    ):
        for name, value in vars(conv).items():
            if not name.startswith("_"):
                setattr(self, name, nnx.data(None) if value is None else value)
        self.kind = type(conv)
        self.format = format
        self.method = method

    def to_matrix(self, w: Float[Array, "..."]) -> Float[Array, "*lead in out"]:
        """The kernel, with any leading axes, as `[*lead, taps * in, out]`."""
        shape = self._kernel_shape
        mask = getattr(self, "mask", None)
        if mask is not None:
            w = w * mask
        lead = w.shape[: w.ndim - len(shape)]
        return w.reshape(*lead, math.prod(shape[:-1]), shape[-1])

    def __call__(self, x: Num[Array, "..."], **options: Any) -> Float[Array, "..."]:
        """Convolves, as the Flax layer does with the decoded kernel.

        Args:
          x: input, channels last.
          **options: passed on (`out_sharding`).
        """
        w = self.weight()
        dense = w.dequantize() if isinstance(w, QuantizedTensor) else w
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        settings["kernel"] = jnp.reshape(dense, self._kernel_shape)
        # Flax's method reads plain attributes, so any object that has them will do.
        layer: Any = types.SimpleNamespace(**settings)
        return self.kind.__call__(layer, x, **options)

    @property
    def _kernel_shape(self) -> tuple[int, ...]:
        return tuple(vars(self)["kernel_shape"])

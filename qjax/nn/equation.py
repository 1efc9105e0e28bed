"""Einsum equations that are (batched) products with a matrix.

Kernel axes fall into three kinds: *batch* (in the input and in the result),
*contracted* (in the input only) and *features* (in the result only). A kernel is
quantized as `[*batch, contracted, features]` and multiplied as a matrix for every batch
index.

Refuses what is not such a product: repeated letters, an ellipsis in the kernel, an axis
that appears in one operand alone and is summed.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from qjax.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class Equation:
    """An einsum `x,kernel->out` that is a batched matrix product.

    Attributes:
      x: letters of the input; `...` stands for any axes.
      kernel: letters of the kernel.
      out: letters of the result.

    Raises:
      UnsupportedError: it is something else than a batched matrix product.
    """

    x: str
    kernel: str
    out: str

    def __post_init__(self) -> None:
        reason = self._reason()
        if reason:
            raise UnsupportedError(
                f"einsum {self}: {reason}, so it is not a batched product with a "
                "matrix; keep this kernel in floating point"
            )

    def __str__(self) -> str:
        return f"{self.x},{self.kernel}->{self.out}"

    def _reason(self) -> str | None:
        if "." in self.kernel:
            return "the kernel has an ellipsis"
        x, kernel, out = (set(s) - {"."} for s in (self.x, self.kernel, self.out))
        for letters in (self.x, self.kernel, self.out):
            plain = letters.replace("...", "")
            if len(set(plain)) != len(plain) or not (plain.isalpha() or not plain):
                return f"{letters!r} repeats an axis or is malformed"
        if ("..." in self.x) != ("..." in self.out):
            return "the ellipsis is summed over"
        if alone := (x ^ kernel) - out:
            return f"axis {min(alone)!r} is summed over in one operand alone"
        if extra := out - x - kernel:
            return f"axis {min(extra)!r} of the result is in neither operand"
        if not x & kernel - out:
            return "nothing is contracted"
        if not kernel - x:
            return "the kernel adds no features"
        return None

    @property
    def batch(self) -> str:
        """Kernel axes that index independent products, in kernel order."""
        return "".join(c for c in self.kernel if c in self.x and c in self.out)

    @property
    def contracted(self) -> str:
        """Kernel axes summed over, in kernel order."""
        return "".join(c for c in self.kernel if c in self.x and c not in self.out)

    @property
    def features(self) -> str:
        """Kernel axes new in the result, in kernel order."""
        return "".join(c for c in self.kernel if c not in self.x)

    @property
    def bias(self) -> str:
        """Axes of the bias: those the result has from the kernel, in its order."""
        return "".join(c for c in self.out if c in self.kernel)

    def sizes(self, kernel_shape: Sequence[int]) -> dict[str, int]:
        """Size of every kernel axis."""
        return dict(zip(self.kernel, kernel_shape, strict=True))

    def matrix_shape(self, kernel_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape `[*batch, contracted, features]` of a kernel of this shape."""
        size = self.sizes(kernel_shape)
        rows = math.prod(size[c] for c in self.contracted)
        cols = math.prod(size[c] for c in self.features)
        return (*(size[c] for c in self.batch), rows, cols)

    def to_matrix(
        self, kernel: Float[Array, "..."], kernel_shape: Sequence[int]
    ) -> Float[Array, "..."]:
        """A kernel `[*lead, ...]` as `[*lead, *batch, contracted, features]`."""
        lead = kernel.ndim - len(kernel_shape)
        order = self.batch + self.contracted + self.features
        axes = [lead + self.kernel.index(c) for c in order]
        kernel = jnp.transpose(kernel, [*range(lead), *axes])
        return kernel.reshape(*kernel.shape[:lead], *self.matrix_shape(kernel_shape))

    def from_matrix(
        self, w: Float[Array, "*lead in out"], kernel_shape: Sequence[int]
    ) -> Float[Array, "..."]:
        """The inverse of `to_matrix`."""
        lead = w.ndim - len(self.matrix_shape(kernel_shape))
        order, size = (
            self.batch + self.contracted + self.features,
            self.sizes(kernel_shape),
        )
        w = w.reshape(*w.shape[:lead], *(size[c] for c in order))
        axes = [lead + order.index(c) for c in self.kernel]
        return jnp.transpose(w, [*range(lead), *axes])

    def expand(self, ndim: int) -> "Equation":
        """The equation with the ellipsis written out for an input of `ndim` axes.

        Raises:
          UnsupportedError: the input has another number of axes.
        """
        named = len(self.x.replace("...", ""))
        fill = ndim - named
        if fill < 0 or (fill and "..." not in self.x):
            raise UnsupportedError(
                f"einsum {self}: the input has {ndim} axes, expected {self.x!r}"
            )
        used = self.x + self.kernel + self.out
        spare = [c for c in map(chr, range(0x391, 0x3C9)) if c.isalpha()]
        letters = "".join(c for c in spare if c not in used)[:fill]
        x, out = (s.replace("...", letters) for s in (self.x, self.out))
        return Equation(x, self.kernel, out)

    def apply(
        self,
        x: Num[Array, "..."],
        w: Any,
        kernel_shape: Sequence[int],
        multiply: Callable[[Any, Any], Array],
    ) -> Float[Array, "..."]:
        """Computes the product.

        Args:
          x: input.
          w: kernel in matrix form, dense or packed.
          kernel_shape: shape of the kernel, for the sizes of its axes.
          multiply: `(x [m, in], w [in, out])` to their product.
        """
        full = self.expand(x.ndim)
        size = {**full.sizes(kernel_shape), **dict(zip(full.x, x.shape, strict=True))}
        free = "".join(c for c in full.x if c not in full.kernel)
        order = full.batch + free + full.contracted
        x = jnp.transpose(x, [full.x.index(c) for c in order])
        batch = [size[c] for c in full.batch]
        rows = math.prod(size[c] for c in free)
        x = x.reshape(*batch, rows, math.prod(size[c] for c in full.contracted))
        for _ in batch:
            multiply = jax.vmap(multiply)
        y = multiply(x, w)
        result = full.batch + free + full.features
        y = y.reshape([size[c] for c in result])
        return jnp.transpose(y, [result.index(c) for c in full.out])

    def spread(self, bias: Float[Array, "..."], ndim: int) -> Float[Array, "..."]:
        """The bias reshaped to broadcast against the result of an `ndim`-axis input."""
        out = self.expand(ndim).out
        size = dict(zip(self.bias, bias.shape, strict=True))
        return bias.reshape([size.get(c, 1) for c in out])


def parse_einsum(text: str) -> Equation:
    """Reads `"x,kernel->out"`.

    Raises:
      UnsupportedError: it has not two operands and an explicit result, or is not a
        batched matrix product.
    """
    operands, arrow, out = text.replace(" ", "").partition("->")
    parts = operands.split(",")
    if not arrow or len(parts) != 2:
        raise UnsupportedError(
            f"einsum {text!r}: expected two operands and a result, 'x,kernel->out'"
        )
    return Equation(parts[0], parts[1], out)


def general_equation(
    axis: Sequence[int], features: int, batch: Sequence[int] = ()
) -> Equation:
    """The equation of `LinearGeneral` and `DenseGeneral`.

    Args:
      axis: input axes contracted, as kernel axes follow the batch axes.
      features: number of feature axes.
      batch: leading input axes that the kernel has too.

    Raises:
      UnsupportedError: axes repeat, or are not in the order Flax takes them.
    """
    front = max([a for a in (*axis, *batch) if a >= 0], default=-1) + 1
    back = max([-a for a in axis if a < 0], default=0)
    letters = {
        a: chr(ord("a") + i) for i, a in enumerate([*range(front), *range(-back, 0)])
    }
    if list(axis) != sorted(axis, key=lambda a: (a < 0, a)) or len(letters) > 20:
        raise UnsupportedError(
            f"axis={tuple(axis)}: contracted axes must be listed in input order; keep "
            "this kernel in floating point"
        )
    new = "".join(chr(ord("A") + i) for i in range(features))
    ordered = sorted(batch)
    first = "".join(letters[a] for a in range(front))
    last = "".join(letters[a] for a in range(-back, 0))
    contracted = {letters[a] for a in axis}
    kernel = "".join(letters[a] for a in (*ordered, *axis)) + new
    rest = (
        "".join(c for c in first if c not in contracted)
        + "..."
        + "".join(c for c in last if c not in contracted)
    )
    return Equation(f"{first}...{last}", kernel, rest + new)

"""Compositions of a quantized weight with a cheap exact operation.

Outlier decomposition, activation order, activation-aware scaling, rotation, low-rank
repair and transposition are wrappers around any `QuantizedTensor`, so LLM.int8, SpQR,
GPTQ's act-order, AWQ without folding, QuaRot and LoRA-style repair need no classes of
their own. Each is a pytree whose leaves share the leading axes of its base, and each
states its logical weight; `qjax.ops.matmul` applies the operation to the activations
or the result instead of the weight. `RowParts` is a weight made of several.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.tensor import QuantizedTensor, pytree_node

ACTIVATIONS = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""What activations can be rounded to, and the greatest code."""
MAX_PARTS = 64
"""Most parts of a `RowParts` in a file."""


@dataclasses.dataclass(frozen=True, repr=False)
class Wrapper(QuantizedTensor):
    """Base of wrappers: format, matrix and dtype are those of the base."""

    base: Any

    @property
    def format(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """Format of the base."""
        return self.base.format

    @property
    def matrix(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Logical `(in, out)`."""
        return self.base.matrix

    @property
    def dtype(self) -> str:
        """Logical dtype of the base."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return (*self.base.shape[:-2], *self.matrix)

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """See `QuantizedTensor.dequantize`; composed in float32."""
        return self.compose(self.base.dequantize(jnp.float32)).astype(
            dtype or self.dtype
        )

    @abc.abstractmethod
    def compose(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Applies the wrapper to the dense float32 base."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class Transposed(Wrapper):
    """`w = base^T`: a table `[vocab, dim]` whose groups run along `dim`."""

    @property
    def matrix(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Logical `(in, out)`: the base's, swapped."""
        return (self.base.matrix[1], self.base.matrix[0])

    def compose(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Swaps the matrix axes."""
        return jnp.swapaxes(w, -1, -2)


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class Permuted(Wrapper):
    """`w[perm[j]] = base[j]`: groups formed in another order of inputs (act-order).

    Attributes:
      perm: int32 `[*lead, in]`, a permutation; activations are gathered by it.
    """

    perm: Any

    def compose(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Scatters rows back to their own inputs."""
        inverse = jnp.argsort(self.perm, axis=-1)
        return jnp.take_along_axis(w, inverse[..., :, None], axis=-2)


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class InputScaled(Wrapper):
    """`w = s[:, None] * base`: activations are multiplied by `s` (AWQ unfolded).

    Attributes:
      s: float `[*lead, in]`.
    """

    s: Any

    def compose(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Scales rows."""
        return w * self.s[..., :, None].astype(jnp.float32)


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class Rotated(Wrapper):
    """`w = diag(signs) H base`, `H` a blockwise orthonormal Hadamard matrix.

    The block is the largest power of two that divides `in`. `(x * signs) H` is what the
    base is multiplied by.

    Attributes:
      signs: int8 (or float, in files of earlier versions) `[*lead, in]`, +1 and -1.
    """

    signs: Any

    def compose(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Undoes the rotation."""
        turned = jnp.swapaxes(hadamard(jnp.swapaxes(w, -1, -2)), -1, -2)
        return turned * self.signs[..., :, None].astype(jnp.float32)


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class WithOutliers(Wrapper):
    """`w = base` plus a sparse correction: `w[rows[k], cols[k]] += values[k]`.

    Attributes:
      values: float `[*lead, n]`.
      rows: int32 or uint16 `[*lead, n]`, input indices.
      cols: the same, output indices.
    """

    values: Any
    rows: Any
    cols: Any

    def compose(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Adds the correction."""
        lead = w.shape[:-2]

        def add(m, values, rows, cols):
            return m.at[rows, cols].add(values.astype(jnp.float32))

        for _ in lead:
            add = jax.vmap(add)
        return add(w, self.values, self.rows, self.cols)


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class SplitInputs(Wrapper):
    """`w = base`, but for some rows: `w[index[k]] = rows[k]` (LLM.int8()).

    The base is multiplied by the activations without the features at `index`, which
    are multiplied by `rows` instead: their magnitude takes no part in the scale of
    rounded activations, and what the base holds in their rows does not matter.

    Attributes:
      rows: float `[*lead, n, out]`.
      index: int32 `[*lead, n]`, distinct inputs; `in` marks a slot that is not used.
    """

    rows: Any
    index: Any

    def compose(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Replaces rows."""

        def put(m, rows, index):
            return m.at[index].set(rows.astype(jnp.float32), mode="drop")

        for _ in w.shape[:-2]:
            put = jax.vmap(put)
        return put(w, self.rows, self.index)


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class RoundedInputs(Wrapper):
    """`w = base`, multiplied by activations that are rounded first (W8A8, W4A8).

    Attributes:
      activation: what activations are rounded to, `"int8"` or `"float8_e4m3fn"`; see
        `qjax.ops.matmul`.
      scale: one static scale for all activations, float32 `[*lead]`; None for a scale
        of each row's own.
    """

    activation: str = dataclasses.field(default="int8", metadata={"static": True})
    scale: Any = None

    def compose(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """The base itself."""
        return w


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class Trained(Wrapper):
    """`w = base`, whose gradient goes to a float weight: what training multiplies by.

    Products are those of the base, bit for bit; their gradient is that of
    `round(x) dense`. See `qjax.ops.trained`.

    Attributes:
      dense: float `[*lead, in, out]`, what the base decodes to, differentiable.
      inputs: float32 `[*lead]`, the learned static scale of a base in `RoundedInputs`,
        of the same value as its own; or None.
      active: bool `[*lead]`; where false, products are those of `dense` and activations
        are not rounded. None for always.
      backward: which products of the gradient round their operands to int8, of
        `"dgrad"` and `"wgrad"`.
    """

    dense: Any
    inputs: Any = None
    active: Any = None
    backward: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """The dense weight, differentiable."""
        return self.dense.astype(dtype or self.dtype)

    def compose(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """The base itself."""
        return w


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(Wrapper):
    """`w = base + a b`: low-rank repair of the rounding error.

    Attributes:
      a: float `[*lead, in, rank]`.
      b: float `[*lead, rank, out]`.
    """

    a: Any
    b: Any

    def compose(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Adds the product."""
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        return w + jnp.matmul(a, b, precision="highest")


def hadamard(
    x: Float[Array, "*batch n"], most: int | None = None
) -> Float[Array, "*batch n"]:
    """Multiplies the last axis by a blockwise orthonormal Hadamard matrix.

    The block is the largest power of two dividing `n`; the transform is symmetric, so
    it is its own inverse. Cost: `n log2(block)` additions.

    Args:
      x: float array.
      most: bound of the block, a power of two.

    Returns:
      Array of the same shape and dtype.

    Raises:
      SpecError: `n` is odd, so that there is nothing to rotate.
    """
    n = x.shape[-1]
    block = n & -n if most is None else min(n & -n, most)
    if block < 2:
        raise SpecError(f"hadamard: size {n} is odd, so it has no block to rotate")
    lead = x.shape[:-1]
    y = x.reshape(*lead, n // block, block)
    span = 1
    while span < block:
        pairs = y.reshape(*lead, n // block, block // (2 * span), 2, span)
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([even + odd, even - odd], axis=-2)
        y = y.reshape(*lead, n // block, block)
        span *= 2
    return (y * jnp.asarray(block**-0.5, x.dtype)).reshape(x.shape)


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class RowParts(QuantizedTensor):
    """`w[starts[p] : starts[p] + in_p] += parts[p]`, for every part, from zero.

    Parts behind one another have groups of inputs in different formats (EXL2); parts
    over one another refine each other (VPTQ's residual codes).

    Attributes:
      parts: tuple of weights `[*lead, in_p, out]`, in wrappers or not.
      starts: the first input of each part.
      matrix: logical `(in, out)`.
      dtype: logical dtype name.
    """

    parts: Any
    starts: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    matrix: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def format(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """Format of the first part."""
        return self.parts[0].format

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return (*self.parts[0].shape[:-2], *self.matrix)

    def windows(self) -> tuple[tuple[slice, QuantizedTensor], ...]:
        """Every part and the inputs that it belongs to."""
        placed = zip(self.starts, self.parts, strict=True)
        return tuple((slice(at, at + q.matrix[0]), q) for at, q in placed)

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """See `QuantizedTensor.dequantize`; added in float32."""
        total = jnp.zeros(self.shape, jnp.float32)
        for rows, part in self.windows():
            total = total.at[..., rows, :].add(part.dequantize(jnp.float32))
        return total.astype(dtype or self.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.parts))})"


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class LayerOf(Wrapper):
    """`w = base[layer]`: one layer of a stack, not cut out of it.

    A scan over a stack that slices it copies every layer's codes before multiplying by
    them. With this view the stack stays where it is and kernels read the layer.

    Attributes:
      base: a weight with one leading axis.
      layer: int32 scalar, usually traced.
    """

    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the layer."""
        return self.matrix

    def cut(self) -> QuantizedTensor:
        """The layer as a tensor of its own: a copy."""

        def take(leaf):
            return jax.lax.dynamic_index_in_dim(leaf, self.layer, 0, keepdims=False)

        return jax.tree.map(take, self.base)

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """See `QuantizedTensor.dequantize`."""
        return self.cut().dequantize(dtype)

    def compose(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Takes the layer."""
        return jax.lax.dynamic_index_in_dim(w, self.layer, 0, keepdims=False)


def layer_of(tree: Any, layer: Any) -> Any:
    """One layer of stacked parameters, packed weights left in place.

    Args:
      tree: pytree whose every leaf has a leading layer axis.
      layer: int32 scalar.

    Returns:
      The tree with arrays cut, and packed weights as `LayerOf` inside their wrappers.
    """

    def packed(leaf):
        return isinstance(leaf, QuantizedTensor)

    def take(leaf):
        if isinstance(leaf, tuple):
            return tuple(map(take, leaf))
        if not packed(leaf):
            return jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)
        if not isinstance(leaf, Wrapper | RowParts):
            return LayerOf(leaf, layer)
        fields = {
            f.name: getattr(leaf, f.name)
            for f in dataclasses.fields(leaf)
            if not f.metadata.get("static") and getattr(leaf, f.name) is not None
        }
        return dataclasses.replace(leaf, **{k: take(v) for k, v in fields.items()})

    return jax.tree.map(take, tree, is_leaf=packed)

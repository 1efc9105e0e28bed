"""Weights in the order in which a device's kernels read them.

At rest every format has one layout. Some kernels want another: fragments of a tensor
core in the order of its registers, or scales that are not quantized themselves.
`prepack` rewrites packed weights once, and products then skip that work; `canonical`
is the exact inverse, which saving a model applies. A weight whose kernel reads the
layout at rest is left as it is, and so are one that no kernel of the device takes and
embedding tables, whose rows are looked up.
"""

import dataclasses
import functools
import importlib
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float

import qjax.pallas_kernels.device as device
from qjax.formats import Format, Ggml, Int
from qjax.formats.codebook import TableFormat
from qjax.ggml import GgmlTensor, put_together, take_apart
from qjax.ops import kernels
from qjax.ops.blocks import gathered, materialize_scale, replaced
from qjax.pallas_kernels.weights import Weight, WeightSpec
from qjax.tensor import (
    AffineTensor,
    CodebookTensor,
    LayoutTensor,
    MinifloatTensor,
    QuantizedTensor,
    pytree_node,
)
from qjax.wrappers import LayerOf, RowParts, Wrapper

_T = TypeVar("_T")
TABLE = "embedding"
"""What parameters are called from which rows are gathered: they keep their layout."""
_LAYOUTS = {
    ("cpu", False): "qjax.pallas_kernels.matmul.cpu_layout",
    ("cpu", True): "qjax.pallas_kernels.matmul.cpu_layout",
    ("tpu", False): "qjax.pallas_kernels.matmul.layout",
    ("cuda", False): "qjax.pallas_kernels.matmul.gpu_layout",
    ("cuda", True): "qjax.pallas_kernels.matmul_a8.layout",
}
"""The module that makes the layout, by platform and whether activations are rounded."""


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class Prepacked(QuantizedTensor):
    """A weight in the layout of a kernel; its values are those of `canonical()`.

    Attributes:
      codes: kernel's array; may be wider than the matrix.
      scale: kernel's array, never nested.
      zero: kernel's array or None.
      codebook: float32 `[*lead, 2**bits]` when learned, else None.
      nested: the doubly quantized scale that `scale` was decoded from, or None; of
        llama.cpp's blocks the bytes beside the codes.
      offset: float32 `[*lead, 1, 1]` or None, as in `CodebookTensor`.
      global_scale: float32 `[*lead, 1, 1]` or None, as in `MinifloatTensor`.
      format: the format.
      matrix: logical `(in, out)`.
      dtype: logical dtype name.
      layout: `WeightSpec.layout` of the kernel's arrays.
    """

    codes: Any
    scale: Any
    zero: Any
    codebook: Any
    nested: Any
    offset: Any
    global_scale: Any
    format: Format = dataclasses.field(metadata={"static": True})
    matrix: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape `[*lead, in, out]`."""
        return (*self.scale.shape[:-2], *self.matrix)

    @property
    def spec(self) -> WeightSpec:
        """What the arrays are to a kernel."""
        spec: Any = kernels.format_spec(self.format, self.matrix)
        return dataclasses.replace(spec, layout=self.layout)

    def canonical(self) -> LayoutTensor:
        """The tensor this was made from, bit for bit."""
        weight = Weight(self.codes, self.scale, self.zero)
        if self.layout != "canonical":
            weight = _layout_module(self.layout).unpack(weight, self.spec)
        fmt, matrix, dtype = self.format, self.matrix, self.dtype
        if isinstance(fmt, Ggml):
            codes = put_together(fmt, weight.codes, self.nested, matrix)
            return GgmlTensor(codes, fmt, matrix, dtype)
        scale, zero = (_narrow(v, self) for v in (weight.scale, weight.zero))
        scale = scale if self.nested is None else self.nested
        if isinstance(fmt, Int):
            return AffineTensor(weight.codes, scale, zero, fmt, matrix, dtype)
        if isinstance(fmt, TableFormat):
            table, offset = self.codebook, self.offset
            return CodebookTensor(
                weight.codes, scale, table, offset, fmt, matrix, dtype
            )
        kept: Any = fmt
        return MinifloatTensor(
            weight.codes, scale, self.global_scale, kept, matrix, dtype
        )

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """See `QuantizedTensor.dequantize`."""
        return self.canonical().dequantize(dtype)


def prepack(model: _T, *, kind: str | None = None, activation: str | None = None) -> _T:
    """Rewrites packed weights into the layout that a device's kernels read.

    Args:
      model: an NNX module, a quantized tensor, or any pytree of parameters.
      kind: the device, as in `qjax.ops.target`; by default the one in use.
      activation: what `matmul` will round activations to, if it will.

    Returns:
      The same model with `Prepacked` weights where that makes products faster. It
      computes the same products; `qjax.save` stores the original layout.

    Example:
      >>> model, tokenizer = qjax.load("out/")
      >>> model = qjax.prepack(model)
    """
    with device.target(kind or device.device_kind()):
        rounds = activation is not None
        return _map(functools.partial(_prepacked, rounds), model)


def canonical(tree: _T) -> _T:
    """The inverse of `prepack`, bit for bit."""

    def back(leaf):
        return leaf.canonical() if isinstance(leaf, Prepacked) else leaf

    return _map(back, tree)


def cut(q: Any) -> LayoutTensor:
    """The weight at rest, with a float scale; a layer is copied out of its stack."""
    one: Any = q.cut() if isinstance(q, LayerOf) else q
    if isinstance(one, Prepacked):
        one = gathered(one).canonical()
    return materialize_scale(one)


def _map(function: Any, tree: Any) -> Any:
    """Applies a function to every packed weight, inside wrappers and NNX modules."""
    if isinstance(tree, nnx.Module):
        graph, state = nnx.split(tree)
        return nnx.merge(graph, _map(function, state))

    def apply(leaf):
        if isinstance(leaf, Wrapper):
            base = apply(leaf.base)
            return replaced(leaf, base=base)
        if isinstance(leaf, RowParts):
            return replaced(leaf, parts=tuple(map(apply, leaf.parts)))
        return function(leaf) if isinstance(leaf, QuantizedTensor) else leaf

    def place(path, leaf):
        return leaf if TABLE in map(_name, path) else apply(leaf)

    is_leaf = lambda x: isinstance(x, QuantizedTensor)  # noqa: E731
    return jax.tree.map_with_path(place, tree, is_leaf=is_leaf)


def _name(key):
    """What a part of a path is called in its container."""
    return getattr(key, "key", getattr(key, "name", None))


def _prepacked(rounds, q):
    """One weight prepacked, or as it is."""
    if not isinstance(q, LayoutTensor):
        return q
    if isinstance(q, GgmlTensor):
        return _apart(rounds, q)
    if isinstance(getattr(q, "zero", None), QuantizedTensor):
        return q  # stays as it is: decoded zero-points cannot be turned back
    nested = q.scale if isinstance(q.scale, QuantizedTensor) else None
    plain = materialize_scale(q)
    spec = kernels.kernel_spec(plain)
    if isinstance(spec, str):
        return q
    weight, spec = _laid_out(rounds, kernels.kernel_weight(plain, spec), spec)
    if spec.layout == "canonical" and nested is None:
        return q
    return Prepacked(
        weight.codes,
        weight.scale,
        weight.zero,
        getattr(q, "codebook", None),
        nested,
        getattr(q, "offset", None),
        getattr(q, "global_scale", None),
        q.format,
        q.matrix,
        q.dtype,
        spec.layout,
    )


def _laid_out(rounds, weight, spec):
    """A canonical weight in the layout of the device's kernels, where they have one."""
    layout = _LAYOUTS.get((device.platform(), rounds))
    if layout is None:
        return weight, spec
    return importlib.import_module(layout).prepack(weight, spec) or (weight, spec)


def _apart(rounds, q):
    """llama.cpp's blocks in pieces that kernels multiply by, or as they are."""
    spec = kernels.format_spec(q.format, q.matrix)
    if isinstance(spec, str) or not q.size:
        return q
    parts = take_apart(q)
    weight = Weight(parts.codes, parts.scale, parts.zero)
    weight, spec = _laid_out(rounds, weight, spec)
    return Prepacked(
        *(weight.codes, weight.scale, weight.zero),
        *(None, parts.rest, None, None),
        *(q.format, q.matrix, q.dtype, spec.layout),
    )


def _layout_module(tag):
    """The module that made a layout."""
    for name in _LAYOUTS.values():
        module = importlib.import_module(name)
        if tag in module.TAGS:
            return module
    raise KeyError(tag)


def _narrow(leaf, q):
    """Scales as the format stores them: the inverse of one column per output."""
    if leaf is None:
        return None
    group = q.format.grouping(q.matrix)
    if group.kind == "tensor":
        return leaf[..., :1]
    return leaf[..., :: group.size] if group.kind == "block" else leaf

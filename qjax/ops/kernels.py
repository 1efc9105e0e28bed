"""Quantized tensors as the arrays that `qjax.pallas_kernels` multiply by.

`kernel_spec` says what a tensor is to a kernel, or why no kernel can take it;
`run_kernel` calls one and applies what kernels leave out: NVFP4's divisor and a table's
offset, which are exact operations on the result.

Kernels see one layer of a stack as the whole stack and a number, so that a scan over
layers reads packed weights where they lie instead of copying them.

A program on several devices computes each kernel call where the weight's shards are:
columns stay split as the weight is, rows as the activations are, and shards along `in`
are summed, when they hold whole groups (see `qjax.ops.partition`).
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Additive, Cast, Format, Ggml, Int
from qjax.formats.ggml_parts import TableParts
from qjax.formats.kmeans import KMeans
from qjax.formats.minifloat import Minifloat
from qjax.formats.trellis import Trellis
from qjax.ggml import GgmlTensor, layout
from qjax.ops.partition import on_one, partitioned
from qjax.pallas_kernels.weights import KernelError, Weight, WeightSpec
from qjax.tensor import LayoutTensor, QuantizedTensor
from qjax.wrappers import LayerOf

_ROOM = "qjax.pallas_kernels"
KINDS = {"tpu": "tpu", "gpu": "gpu", "native": "cpu"}
"""Kernel backends and the module that holds each."""


def module(name: str, activation: str | None = None) -> Any:
    """The kernel module of a backend, imported when first asked for."""
    room = "matmul" if activation is None else "matmul_a8"
    return importlib.import_module(f"{_ROOM}.{room}.{KINDS[name]}")


def kernel_spec(q: Any) -> WeightSpec | str:
    """What a tensor is to a kernel.

    Args:
      q: a `LayoutTensor` or `Prepacked`, possibly with one leading layer axis.

    Returns:
      The spec, or the reason why no kernel takes it.
    """
    if isinstance(q, GgmlTensor):
        if layout(q.format) is None:
            return "its codes index a grid or share bytes; products decode blocks"
        return "codes and scales share blocks; qjax.prepack takes them apart"
    if isinstance(q.scale, QuantizedTensor):
        return "its scales are quantized themselves; qjax.prepack decodes them"
    if not q.size:
        return "the weight is empty"
    spec = format_spec(q.format, q.matrix)
    tag = getattr(q, "layout", None)
    if isinstance(spec, str) or tag is None:
        return spec
    return dataclasses.replace(spec, layout=tag)


def format_spec(fmt: Format, matrix: tuple[int, int]) -> WeightSpec | str:
    """What a matrix of a format is to a kernel in the layout at rest, or why none."""
    rows, cols = matrix
    group = fmt.grouping(matrix)
    if isinstance(fmt, Ggml):
        return _block_spec(fmt, matrix)
    if isinstance(fmt, Cast):
        return "it is a plain cast, which XLA multiplies by"
    if isinstance(fmt, Trellis):
        return "no kernel walks a trellis"
    if isinstance(fmt, Additive):
        return "its codes index vectors, which kernels do not look up"
    if isinstance(fmt, KMeans) and fmt.columnwise:
        return "each column has a table of its own; kernels take one table per matrix"
    if group.kind not in ("in", "channel", "tensor", "block"):
        return f"scales are grouped by {group.kind!r}, not along `in`"
    kind, offset = "table", 0.0
    if isinstance(fmt, Int):
        kind, offset = "int", fmt.offset if fmt.symmetric else 0.0
    elif isinstance(fmt, Minifloat):
        kind = fmt.kind
    size = group.size if group.kind in ("in", "block") else rows
    return WeightSpec(rows, cols, kind, fmt.code_bits, size, offset)


def _block_spec(fmt: Ggml, matrix: tuple[int, int]) -> WeightSpec | str:
    """What llama.cpp's blocks are once they are taken apart."""
    parts = layout(fmt)
    if parts is None:
        return "its blocks are not taken apart"
    rows, cols = matrix
    if isinstance(parts, TableParts):
        return WeightSpec(rows, cols, "table", 4, parts.group)
    return WeightSpec(rows, cols, "int", parts.bits, parts.group, parts.offset)


def kernel_weight(q: Any, spec: WeightSpec) -> Weight:
    """The arrays of a tensor that `kernel_spec` accepts."""
    table = None
    if spec.kind == "table":
        table = q.codebook
        if table is None:
            lead = q.shape[:-2]
            table = jnp.broadcast_to(_table(q.format), (*lead, 2**spec.bits))
    zero = getattr(q, "zero", None)
    if not isinstance(q, LayoutTensor):
        return Weight(q.codes, q.scale, zero, table)
    return Weight(q.codes, _wide(q.scale, q, spec), _wide(zero, q, spec), table)


def _table(fmt):
    """The value of each code, float32."""
    parts: Any = layout(fmt) if isinstance(fmt, Ggml) else fmt
    return jnp.asarray(parts.table, jnp.float32)


def _wide(leaf, q, spec):
    """Scales or zero-points with one column per output."""
    if leaf is None:
        return None
    if q.grouping.kind == "block":
        leaf = jnp.repeat(leaf, q.grouping.size, axis=-1)[..., : spec.n]
    shape = (*q.codes.shape[:-2], spec.groups, spec.n)
    return jnp.broadcast_to(leaf, shape)


def obstacle(
    name: str,
    m: int,
    q: Any,
    dtype: Any,
    transpose: bool = False,
    activation: str | None = None,
) -> str | None:
    """Why a kernel backend cannot compute a product, or None when it can."""
    q = q.base if isinstance(q, LayerOf) else q
    spec = kernel_spec(q)
    if isinstance(spec, str):
        return spec
    try:
        kernel = module(name, activation)
    except ModuleNotFoundError as e:
        return str(e)
    if name == "native" and spec.kind == "int" and not activation and _exact(dtype):
        return "float32 precision was asked for; its activations have 16 bits"
    options = {"activation": activation} if activation else {"transpose": transpose}
    return kernel.obstacle(spec, m, dtype, **options)


def _exact(dtype: Any) -> bool:
    """Whether `jax.default_matmul_precision` asks for float32 products of float32."""
    settings: Any = jax.config
    precision = settings.jax_default_matmul_precision
    return dtype == jnp.float32 and precision in ("float32", "highest", "F32_F32_F32")


def run_kernel(
    name: str,
    x: Float[Array, "m k"],
    q: Any,
    transpose: bool,
    activation: str | None = None,
    split: Any = None,
) -> Float[Array, "m n"]:
    """`x W` or `x W^T` by a kernel, without obstacle.

    Args:
      name: the backend.
      x: activations; with `activation` they may be codes, whose scale is left to the
        caller and whose product is float32.
      q: the weight.
      transpose: multiply by the transpose.
      activation: what the kernel rounds `x` to.
      split: for TPUs, `(x, q, dtype)` to the same product before NVFP4's divisor and
        a table's offset, by operations that compilers can split over devices.

    Returns:
      The product in the dtype of `x`.

    Raises:
      SpecError: the arrays of `q` do not fit each other.
    """
    layer = q.layer if isinstance(q, LayerOf) else None
    q = q.base if isinstance(q, LayerOf) else q
    spec = kernel_spec(q)
    assert isinstance(spec, WeightSpec)  # `obstacle` was asked
    divisor, offset = getattr(q, "global_scale", None), getattr(q, "offset", None)
    coded = activation is not None and x.dtype == jnp.dtype(activation)
    wide = divisor is not None or offset is not None or coded
    # The product before NVFP4's divisor can be beyond float16.
    dtype = jnp.float32 if wide else x.dtype
    options: dict[str, Any] = {"out_dtype": dtype, "transpose": transpose}
    if activation is not None:
        options = {"out_dtype": dtype, "activation": activation}
        options |= {"x_scale": 1.0} if coded else {}
    call = functools.partial(_call, module(name, activation), options)

    def kernel(x, q):
        q, plain = (q.base, [q.layer]) if isinstance(q, LayerOf) else (q, [])
        weight = kernel_weight(q, spec)
        told = name != "tpu"
        return partitioned(
            call, spec, x, plain, [weight], transpose=transpose, told=told
        )

    def other(x, q):
        assert split is not None  # for TPUs
        return split(x, q, dtype)

    try:
        y = on_one(name, kernel, other, x, q if layer is None else LayerOf(q, layer))
    except KernelError as error:
        raise SpecError(str(error)) from None
    if divisor is not None:
        y = y / (divisor if layer is None else divisor[layer])
    if offset is not None:
        offset = offset if layer is None else offset[layer]
        y = y + jnp.sum(x.astype(jnp.float32), 1, keepdims=True) * offset
    return y if coded else y.astype(x.dtype)


def _call(kernel, options, spec, x, *rest):
    *layer, weight = rest
    layer = layer[0] if layer else None
    return kernel.matmul(x, weight, spec, layer=layer, **options)

"""Quantized tensors as named arrays plus a JSON description, and back.

`describe` splits a tensor into leaves for a safetensors file and a `spec` for a
manifest; `rebuild` is the inverse and validates everything it is given, because both
may come from an untrusted directory: classes are named from a fixed list, static fields
are parsed by their own checked readers, and the shape and dtype of every leaf must be
the ones the format implies.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from qjax.additive import AdditiveTensor
from qjax.errors import FormatError, SpecError
from qjax.formats import (
    Additive,
    Cast,
    Dynamic8,
    Format,
    Int,
    KMeans,
    format_from_dict,
)
from qjax.formats.codebook import TableFormat
from qjax.formats.minifloat import Minifloat
from qjax.tensor import (
    AffineTensor,
    CodebookTensor,
    LayoutTensor,
    MinifloatTensor,
    QuantizedTensor,
    codes_shape,
)
from qjax.wrappers import (
    InputScaled,
    LowRank,
    Permuted,
    Rotated,
    Transposed,
    WithOutliers,
    Wrapper,
)

_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        AdditiveTensor,
        AffineTensor,
        CodebookTensor,
        MinifloatTensor,
        InputScaled,
        LowRank,
        Permuted,
        Rotated,
        Transposed,
        WithOutliers,
    )
}
_FLOATS = ("float32", "bfloat16", "float16")


def describe(name: str, leaf: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a parameter into a JSON spec and named arrays.

    Args:
      name: dotted parameter path.
      leaf: an array or a quantized tensor.

    Returns:
      `(spec, arrays)`; array names are `name` or `name.field[.field]`.
    """
    if not isinstance(leaf, QuantizedTensor):
        return {"type": "array"}, {name: leaf}
    spec: dict[str, Any] = {"type": type(leaf).__name__}
    arrays: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(leaf):  # pyright: ignore[reportArgumentType]
        value = getattr(leaf, field.name)
        if field.metadata.get("static"):
            value = value.to_dict() if isinstance(value, Format) else value
            spec[field.name] = list(value) if isinstance(value, tuple) else value
        elif value is not None:
            fields[field.name], inner = describe(f"{name}.{field.name}", value)
            arrays.update(inner)
    spec["fields"] = fields
    return spec, arrays


def rebuild(name: str, spec: Any, read: Callable[[str], Any], depth: int = 0) -> Any:
    """Inverse of `describe`, validating spec and arrays.

    Args:
      name: dotted parameter path.
      spec: JSON object as `describe` made it.
      read: returns the array of a name.
      depth: nesting so far.

    Returns:
      The array or quantized tensor.

    Raises:
      FormatError: the spec or an array is not what the format implies.
    """
    if not isinstance(spec, Mapping) or depth > 4:
        raise FormatError(f"{name}: expected a tensor description, got {spec!r}")
    kind = spec.get("type")
    if kind == "array":
        return read(name)
    cls = _CLASSES.get(kind) if isinstance(kind, str) else None
    fields = spec.get("fields")
    if cls is None or not isinstance(fields, Mapping):
        raise FormatError(f"{name}: unknown tensor type {kind!r}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.metadata.get("static"):
            values[field.name] = _static(name, field.name, spec.get(field.name))
        elif field.name in fields:
            inner = f"{name}.{field.name}"
            values[field.name] = rebuild(inner, fields[field.name], read, depth + 1)
        else:
            values[field.name] = None
    tensor = cls(**values)
    _check(name, tensor)
    return tensor


def _static(name: str, field: str, value: Any) -> Any:
    if field == "format":
        try:
            return format_from_dict(dict(value))
        except (SpecError, TypeError, ValueError) as error:
            raise FormatError(f"{name}: {error}") from None
    if field == "matrix":
        ok = isinstance(value, list) and len(value) == 2
        if not ok or not all(type(v) is int and 0 <= v < 2**40 for v in value):
            raise FormatError(f"{name}: matrix {value!r} is not [in, out]")
        return tuple(value)
    if value not in (*_FLOATS, "float64"):
        raise FormatError(f"{name}: dtype {value!r} is not a float dtype")
    return value


def _check(name: str, q: Any) -> None:
    """Raises FormatError unless every leaf fits the format and the other leaves."""
    if isinstance(q, Wrapper):
        _check_wrapper(name, q)
        return
    if not isinstance(q, LayoutTensor):
        raise FormatError(f"{name}: {type(q).__name__} is not a quantized layout")
    fmt = q.format
    wanted = {
        AdditiveTensor: Additive,
        AffineTensor: Int,
        CodebookTensor: TableFormat,
        MinifloatTensor: Minifloat | Cast,
    }[type(q)]
    if not isinstance(fmt, wanted):
        raise FormatError(f"{name}: format {fmt.name} cannot be a {type(q).__name__}")
    try:
        group = fmt.grouping(q.matrix)
    except SpecError as error:
        raise FormatError(f"{name}: {error}") from None
    lead = tuple(q.codes.shape[:-2]) if hasattr(q.codes, "shape") else None
    if lead is None or q.codes.ndim < 2:
        raise FormatError(f"{name}.codes: expected an array of rank 2 or more")
    if isinstance(q, AdditiveTensor):
        _check_additive(name, q, lead)
        return
    codes = jnp.dtype(_codes_dtype(fmt))
    _leaf(f"{name}.codes", q.codes, (*lead, *codes_shape(fmt, q.matrix)), (codes.name,))
    scales = (*lead, *group.scale_shape)
    if isinstance(q.scale, QuantizedTensor):
        if tuple(q.scale.shape) != scales or not isinstance(q.scale.format, Dynamic8):
            raise FormatError(f"{name}.scale: {q.scale!r} does not fit {scales}")
    elif isinstance(fmt, KMeans) and fmt.columnwise:
        tables = (*lead, fmt.levels, q.matrix[1])
        _leaf(f"{name}.codebook", getattr(q, "codebook", None), tables, _FLOATS)
        _absent(name, q, "scale", "offset")
        return
    elif not isinstance(fmt, Cast):
        _leaf(f"{name}.scale", q.scale, scales, (*_FLOATS, "uint8", "float8_e4m3fn"))
    if isinstance(q, AffineTensor) and isinstance(fmt, Int) and not fmt.symmetric:
        _leaf(f"{name}.zero", q.zero, scales, (*_FLOATS, "uint8"))
    if isinstance(q, CodebookTensor):
        if q.codebook is not None:
            levels = (*lead, 2**fmt.code_bits)
            _leaf(f"{name}.codebook", q.codebook, levels, ("float32",))
        if q.offset is not None:
            _leaf(f"{name}.offset", q.offset, (*lead, 1, 1), ("float32",))
    if isinstance(q, MinifloatTensor) and fmt.name == "nvfp4":
        shape = (*lead, 1, 1)
        _leaf(f"{name}.global_scale", q.global_scale, shape, ("float32",))


def _check_additive(name: str, q: AdditiveTensor, lead: tuple[int, ...]) -> None:
    """Codes may not index beyond a codebook of less than 16 bits."""
    fmt, (rows, cols) = q.format, q.matrix
    codes = (*lead, rows // fmt.group * fmt.codebooks, cols)
    _leaf(f"{name}.codes", q.codes, codes, (f"uint{fmt.code_bits}",))
    _leaf(f"{name}.scale", q.scale, (*lead, 1, cols), _FLOATS)
    books = (*lead, fmt.codebooks, fmt.levels, fmt.group)
    _leaf(f"{name}.codebooks", q.codebooks, books, _FLOATS)
    if fmt.bits not in (8, 16) and q.size and int(jnp.max(q.codes)) >= fmt.levels:
        raise FormatError(
            f"{name}.codes: index {int(jnp.max(q.codes))} outside 0..{fmt.levels - 1}"
        )


def _absent(name: str, q: Any, *fields: str) -> None:
    for field in fields:
        if getattr(q, field) is not None:
            raise FormatError(f"{name}.{field}: {q.format.name} has none")


def _check_wrapper(name: str, q: Wrapper) -> None:
    if not isinstance(q.base, QuantizedTensor):
        raise FormatError(f"{name}.base: expected a quantized tensor")
    lead = tuple(q.base.shape[:-2])
    rows, cols = q.matrix
    if isinstance(q, Permuted):
        _leaf(f"{name}.perm", q.perm, (*lead, rows), ("int32",))
        ordered = jnp.sort(q.perm, axis=-1) == jnp.arange(rows, dtype=jnp.int32)
        if not bool(jnp.all(ordered)):
            raise FormatError(f"{name}.perm: is not a permutation of 0..{rows - 1}")
    elif isinstance(q, InputScaled):
        _leaf(f"{name}.s", q.s, (*lead, rows), _FLOATS)
    elif isinstance(q, Rotated):
        _leaf(f"{name}.signs", q.signs, (*lead, rows), _FLOATS)
    elif isinstance(q, LowRank):
        rank = int(q.a.shape[-1])
        _leaf(f"{name}.a", q.a, (*lead, rows, rank), _FLOATS)
        _leaf(f"{name}.b", q.b, (*lead, rank, cols), _FLOATS)
    elif isinstance(q, WithOutliers):
        count = (*lead, int(q.values.shape[-1]))
        _leaf(f"{name}.values", q.values, count, _FLOATS)
        for field, index, size in (("rows", q.rows, rows), ("cols", q.cols, cols)):
            _leaf(f"{name}.{field}", index, count, ("int32", "uint16"))
            if math.prod(count) and not (
                0 <= int(jnp.min(index)) <= int(jnp.max(index)) < size
            ):
                raise FormatError(f"{name}.{field}: index outside 0..{size - 1}")


def _codes_dtype(fmt: Format) -> Any:
    if isinstance(fmt, Int):
        return jnp.int8 if fmt.signed else jnp.uint8
    if isinstance(fmt, TableFormat):
        return jnp.uint8
    return fmt.encode(jnp.zeros((), jnp.float32)).dtype


def _leaf(name: str, leaf: Any, shape: tuple[int, ...], dtypes: tuple[str, ...]):
    if leaf is None:
        raise FormatError(f"{name}: missing")
    if tuple(leaf.shape) != shape:
        raise FormatError(f"{name}: shape {tuple(leaf.shape)}, expected {shape}")
    if jnp.dtype(leaf.dtype).name not in dtypes:
        found = jnp.dtype(leaf.dtype).name
        raise FormatError(f"{name}: dtype {found}, expected {' or '.join(dtypes)}")

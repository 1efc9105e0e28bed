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
    Ggml,
    Int,
    KMeans,
    format_from_dict,
)
from qjax.formats.additive import TABLES
from qjax.formats.codebook import TableFormat
from qjax.formats.minifloat import Minifloat
from qjax.formats.trellis import TILE, Trellis
from qjax.ggml import GgmlTensor
from qjax.tensor import (
    AffineTensor,
    CodebookTensor,
    LayoutTensor,
    MinifloatTensor,
    QuantizedTensor,
    codes_shape,
)
from qjax.trellis import Incoherent, TrellisTensor, sign_bytes
from qjax.wrappers import (
    ACTIVATIONS,
    MAX_PARTS,
    InputScaled,
    LowRank,
    Permuted,
    Rotated,
    RoundedInputs,
    RowParts,
    SplitInputs,
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
        GgmlTensor,
        MinifloatTensor,
        TrellisTensor,
        Incoherent,
        InputScaled,
        LowRank,
        Permuted,
        Rotated,
        RoundedInputs,
        RowParts,
        SplitInputs,
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
        elif isinstance(value, tuple):
            made = [describe(f"{name}.parts.{i}", q) for i, q in enumerate(value)]
            fields[field.name] = [spec for spec, _ in made]
            for _, inner in made:
                arrays.update(inner)
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
    if not isinstance(spec, Mapping) or depth > 8:
        raise FormatError(f"{name}: expected a tensor description, got {spec!r:.200}")
    kind = spec.get("type")
    if kind == "array":
        return read(name)
    cls = _CLASSES.get(kind) if isinstance(kind, str) else None
    fields = spec.get("fields")
    if cls is None or not isinstance(fields, Mapping):
        raise FormatError(f"{name}: unknown tensor type {kind!r:.100}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.metadata.get("static"):
            values[field.name] = _static(name, field.name, spec.get(field.name))
        elif field.name == "parts":
            specs = fields.get("parts")
            if not isinstance(specs, list) or not 0 < len(specs) <= MAX_PARTS:
                raise FormatError(f"{name}.parts: expected 1 to {MAX_PARTS} of them")
            values["parts"] = tuple(
                rebuild(f"{name}.parts.{i}", part, read, depth + 1)
                for i, part in enumerate(specs)
            )
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
    if field == "starts":
        ok = isinstance(value, list) and len(value) <= MAX_PARTS
        if not ok or not all(type(v) is int and 0 <= v < 2**40 for v in value):
            raise FormatError(f"{name}: starts {value!r:.200} are not places")
        return tuple(value)
    if field == "block":
        if type(value) is not int or value < 2 or value & (value - 1):
            raise FormatError(f"{name}: block {value!r} is not a power of two above 1")
        return value
    if field == "activation":
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise FormatError(
                f"{name}: activation {value!r} is not one of {[*ACTIVATIONS]}"
            )
        return value
    if value not in (*_FLOATS, "float64"):
        raise FormatError(f"{name}: dtype {value!r} is not a float dtype")
    return value


def _check(name: str, q: Any) -> None:
    """Raises FormatError unless every leaf fits the format and the other leaves."""
    if isinstance(q, Wrapper):
        _check_wrapper(name, q)
        return
    if isinstance(q, RowParts):
        _check_parts(name, q)
        return
    if not isinstance(q, LayoutTensor):
        raise FormatError(f"{name}: {type(q).__name__} is not a quantized layout")
    fmt = q.format
    wanted = {
        AffineTensor: Int,
        CodebookTensor: TableFormat,
        MinifloatTensor: Minifloat | Cast,
        TrellisTensor: Trellis,
        AdditiveTensor: Additive,
        GgmlTensor: Ggml,
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
    if isinstance(q, GgmlTensor):
        (rows, cols), (weights, size) = q.matrix, q.vector
        _leaf(
            f"{name}.codes", q.codes, (*lead, rows // weights * size, cols), ("uint8",)
        )
        return
    codes = jnp.dtype(_codes_dtype(fmt))
    _leaf(f"{name}.codes", q.codes, (*lead, *_codes_shape(q)), (codes.name,))
    scales = (*lead, *group.scale_shape)
    if isinstance(q.scale, QuantizedTensor):
        _check_nested(f"{name}.scale", q.scale, scales)
    elif isinstance(fmt, Trellis):
        if q.scale is not None:
            _leaf(f"{name}.scale", q.scale, scales, _FLOATS)
    elif isinstance(fmt, KMeans) and fmt.columnwise:
        tables = (*lead, fmt.levels, q.matrix[1])
        _leaf(f"{name}.codebook", getattr(q, "codebook", None), tables, _FLOATS)
        _absent(name, q, "scale", "offset")
        return
    elif not isinstance(fmt, Cast):
        _leaf(f"{name}.scale", q.scale, scales, (*_FLOATS, "uint8", "float8_e4m3fn"))
    if isinstance(q, AffineTensor) and isinstance(fmt, Int) and not fmt.symmetric:
        if isinstance(q.zero, QuantizedTensor) and isinstance(q.scale, QuantizedTensor):
            _check_nested(f"{name}.zero", q.zero, scales)
        else:
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


def _check_nested(name: str, inner: QuantizedTensor, shape: tuple[int, ...]) -> None:
    """Statistics that are quantized themselves: dynamic codes, or integers (SpQR)."""
    known = isinstance(inner.format, Dynamic8 | Int)
    if (
        tuple(inner.shape) != shape
        or not known
        or isinstance(inner, Wrapper | RowParts)
    ):
        raise FormatError(f"{name}: {inner!r} does not fit {shape}")


def _check_additive(name: str, q: AdditiveTensor, lead: tuple[int, ...]) -> None:
    """Codes may not index beyond a codebook of less than 16 bits."""
    fmt, (rows, cols) = q.format, q.matrix
    codes = (*lead, rows // fmt.group * fmt.codebooks, cols)
    _leaf(f"{name}.codes", q.codes, codes, (f"uint{fmt.code_bits}",))
    _leaf(f"{name}.scale", q.scale, (*lead, 1, cols), _FLOATS)
    books = (*lead, fmt.codebooks, fmt.levels, fmt.group)
    _leaf(f"{name}.codebooks", q.codebooks, books, TABLES)
    if fmt.bits not in (8, 16) and q.size and int(jnp.max(q.codes)) >= fmt.levels:
        raise FormatError(
            f"{name}.codes: index {int(jnp.max(q.codes))} outside 0..{fmt.levels - 1}"
        )


def _absent(name: str, q: Any, *fields: str) -> None:
    for field in fields:
        if getattr(q, field) is not None:
            raise FormatError(f"{name}.{field}: {q.format.name} has none")


def _check_parts(name: str, q: RowParts) -> None:
    """Parts agree in columns and leading axes, and lie inside of the matrix."""
    if len(q.parts) != len(q.starts):
        raise FormatError(f"{name}.parts: expected as many parts as starts")
    for i, (part, start) in enumerate(zip(q.parts, q.starts, strict=True)):
        if not isinstance(part, QuantizedTensor):
            raise FormatError(f"{name}.parts.{i}: expected a quantized tensor")
        rows, cols = part.matrix
        same = part.shape[:-2] == q.parts[0].shape[:-2] and cols == q.matrix[1]
        if not same or start + rows > q.matrix[0]:
            raise FormatError(
                f"{name}.parts.{i}: {part!r} at row {start} does not fit {q.matrix}"
            )


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
        _leaf(f"{name}.signs", q.signs, (*lead, rows), (*_FLOATS, "int8"))
        _arrays(name, signs=q.signs)
        if not bool(jnp.all(jnp.abs(q.signs) == 1)):
            raise FormatError(f"{name}.signs: expected +1 and -1 only")
    elif isinstance(q, RoundedInputs):
        if q.scale is not None:
            _arrays(name, scale=q.scale)
            _leaf(f"{name}.scale", q.scale, lead, ("float32",))
            if not bool(jnp.all((q.scale > 0) & jnp.isfinite(q.scale))):
                raise FormatError(f"{name}.scale: expected finite positive scales")
    elif isinstance(q, SplitInputs):
        _arrays(name, rows=q.rows, index=q.index)
        count = int(q.index.shape[-1]) if len(q.index.shape) else 0
        _leaf(f"{name}.rows", q.rows, (*lead, count, cols), _FLOATS)
        _leaf(f"{name}.index", q.index, (*lead, count), ("int32",))
        _check_index(f"{name}.index", q.index, rows)
    elif isinstance(q, Incoherent):
        for field, leaf, size in (("left", q.left, rows), ("right", q.right, cols)):
            if leaf is not None:
                _leaf_of_incoherent(f"{name}.{field}", leaf, lead, size)
    elif isinstance(q, LowRank):
        _arrays(name, a=q.a, b=q.b)
        rank = int(q.a.shape[-1]) if q.a.ndim else 0
        _leaf(f"{name}.a", q.a, (*lead, rows, rank), _FLOATS)
        _leaf(f"{name}.b", q.b, (*lead, rank, cols), _FLOATS)
    elif isinstance(q, WithOutliers):
        _arrays(name, values=q.values, rows=q.rows, cols=q.cols)
        count = (*lead, int(q.values.shape[-1]) if q.values.ndim else 0)
        _leaf(f"{name}.values", q.values, count, _FLOATS)
        for field, index, size in (("rows", q.rows, rows), ("cols", q.cols, cols)):
            _leaf(f"{name}.{field}", index, count, ("int32", "uint16"))
            if math.prod(count) and not (
                0 <= int(jnp.min(index)) <= int(jnp.max(index)) < size
            ):
                raise FormatError(f"{name}.{field}: index outside 0..{size - 1}")


def _arrays(name: str, **leaves: Any) -> None:
    """Raises unless leaves are arrays: not missing, nor quantized themselves."""
    for field, leaf in leaves.items():
        if leaf is None or isinstance(leaf, QuantizedTensor):
            raise FormatError(f"{name}.{field}: expected an array, got {leaf!r}")


def _check_index(name: str, index: Any, rows: int) -> None:
    """Raises unless rows are distinct, but for unused slots, which hold `rows`."""
    ordered = jnp.sort(index, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < rows)
    inside = jnp.all((ordered >= 0) & (ordered <= rows))
    if not bool(inside) or bool(jnp.any(twice)):
        raise FormatError(f"{name}: expected distinct rows of 0..{rows - 1}")


def _leaf_of_incoherent(name: str, leaf: Any, lead: tuple[int, ...], size: int):
    if isinstance(leaf, QuantizedTensor):
        raise FormatError(f"{name}: expected an array, got {leaf!r}")
    packed = jnp.dtype(leaf.dtype) == jnp.uint8
    if size % 2:
        raise FormatError(f"{name}: an axis of {size} has no block to rotate")
    shape = (*lead, sign_bytes(size) if packed else size)
    _leaf(name, leaf, shape, (*_FLOATS, "float8_e4m3fn", "uint8"))


def _codes_shape(q: LayoutTensor) -> tuple[int, int]:
    if isinstance(q, TrellisTensor):
        return (q.matrix[0] // TILE, q.matrix[1] * q.format.bits)
    return codes_shape(q.format, q.matrix)


def _codes_dtype(fmt: Format) -> Any:
    if isinstance(fmt, Trellis):
        return jnp.uint16
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

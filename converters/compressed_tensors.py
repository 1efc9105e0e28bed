"""compressed-tensors checkpoints: packed and plain integers, FP8.

* `pack-quantized`: `weight_packed` int32 `[out, words]`, a bit string along `in` of
  codes plus `2**(bits - 1)`; `weight_scale` `[out, groups]` or `[out, 1]`;
  `weight_shape` int64 `[2]`; `weight_zero_point`, packed the same way along `out`, or
  plain int8; `weight_g_idx` int32 `[in]`. Files up to 2025 fill a word with
  `32 // bits` whole codes; which of the two a file does follows from its width.
* `int-quantized`, `float-quantized`, `naive-quantized`: `weight` int8 or float8_e4m3fn
  `[out, in]` with `weight_scale` per tensor, output, group or block.

Where the settings round activations, the weight becomes `RoundedInputs`: one scale per
token when they are dynamic, `input_scale` when static.

Reference: compressed-tensors 0.20 `compressors/pack_quantized`, `naive_quantized`,
`quantization/quant_args.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.affine import affine, group_of
from qjax.converters.words import codes_of, stream
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import FP8
from qjax.tensor import MinifloatTensor, QuantizedTensor
from qjax.wrappers import RoundedInputs

PARTS = {
    "weight_packed": ("integer", 2),
    "weight": ("any", 2),
    "weight_scale": ("floating", None),
    "weight_zero_point": ("integer", None),
    "weight_shape": ("integer", 1),
    "weight_g_idx": ("integer", 1),
    "input_scale": ("floating", None),
    "input_zero_point": ("any", None),
}
_NESTED = re.compile(r"\([^)]*[+*}][^)]*\)[+*{?]")
"""Repetitions inside repetitions, which take exponential time to match."""
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


class CompressedTensors:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks, parts = "compressed-tensors", ("weight_scale",), PARTS
    stated = ("weight_shape",)

    def __init__(self, settings: Mapping[str, Any], where: str):
        groups = settings.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise FormatError(f"{where}: quantization_config has no config_groups")
        for name, scheme in groups.items():
            _check_scheme(scheme, f"{where}: config_groups.{name}")
        default = settings.get("format")
        found = {scheme.get("format") or default for scheme in groups.values()}
        if unknown := sorted(map(str, found - set(FORMATS))):
            raise UnsupportedError(
                f"{where}: compressed-tensors format {', '.join(unknown)} is not read; "
                f"expected {', '.join(FORMATS)}"
            )
        if settings.get("transform_config") or settings.get("sparsity_config"):
            raise UnsupportedError(
                f"{where}: transforms and sparsity of compressed-tensors are not read"
            )
        self._groups = [dict(scheme) for scheme in groups.values()]
        self._targets = [_targets(scheme, where) for scheme in self._groups]

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        if "weight_packed" in parts:
            return tuple(int(size) for size in parts["weight_shape"])
        return tuple(parts["weight"].shape)

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, in `RoundedInputs` where activations are rounded."""
        scheme = self._scheme(where)
        weights = scheme.get("weights") or {}
        if "weight_packed" in parts:
            made = _packed(parts, weights, where)
        elif parts["weight"].dtype == np.int8:
            made = _integers(parts, weights, where)
        else:
            made = _floats(parts, where)
        return _inputs(made, scheme.get("input_activations"), parts, where)

    def _scheme(self, where: str) -> dict[str, Any]:
        """The scheme of a layer: by its name, by a pattern, or of all layers."""
        name = where.rpartition(": ")[2]
        found = [
            (rank, i)
            for i, targets in enumerate(self._targets)
            for target in targets
            if (rank := _rank(target, name)) is not None
        ]
        if not found:
            raise FormatError(f"{where}: no target of config_groups names it")
        return self._groups[min(found)[1]]


def _rank(target: str | re.Pattern[str], name: str) -> int | None:
    """How closely a target names a layer, 0 closest; None when it does not."""
    if isinstance(target, re.Pattern):
        return 1 if target.match(name) else None
    if name == target or name.endswith(f".{target}"):
        return 0
    return 2 if target == "Linear" else None


def _check_scheme(scheme: Any, where: str) -> None:
    """Raises FormatError unless a scheme has the fields that are read."""
    kinds = {"weights": Mapping, "input_activations": Mapping, "format": str}
    objects = isinstance(scheme, Mapping)
    for field, kind in kinds.items():
        value = scheme.get(field) if objects else scheme
        if not objects or not (value is None or isinstance(value, kind)):
            raise FormatError(f"{where}: {field} is {value!r:.200}")


def _targets(scheme: Mapping[str, Any], where: str) -> list[str | re.Pattern[str]]:
    """Names and patterns of the layers of a scheme."""
    made = []
    for target in scheme.get("targets") or ():
        if not isinstance(target, str) or len(target) > 500 or _NESTED.search(target):
            raise FormatError(f"{where}: target {target!r:.200} is not a layer's name")
        try:
            regular = target.startswith("re:")
            made.append(re.compile(target[3:]) if regular else target)
        except re.error as error:
            raise FormatError(f"{where}: target {target!r}: {error}") from None
    return made


def _packed(parts, weights, where) -> QuantizedTensor:
    words, bits = parts["weight_packed"], weights.get("num_bits")
    if bits not in range(1, 9):
        raise FormatError(f"{where}: num_bits is {bits!r}, expected 1 to 8")
    sizes = [int(size) for size in parts["weight_shape"]]
    if len(sizes) != 2 or sizes[0] != words.shape[0] or sizes[1] < 1:
        raise FormatError(
            f"{where}: weight_packed has shape {list(words.shape)}, expected "
            f"[out, words] for the weight_shape {sizes}"
        )
    cols, rows = sizes
    scale = _transposed(parts["weight_scale"])
    zero = parts.get("weight_zero_point")
    half = 2 ** (bits - 1)
    if zero is not None and zero.dtype == np.int32:
        zero = _codes(zero, bits, cols, where).T
    elif zero is not None:
        zero = _transposed(zero).astype(np.int32) + half
    codes = _bit_string(np.ascontiguousarray(words.T), bits, rows, where)
    return affine(
        codes,
        scale,
        zero,
        bits=bits,
        matrix=(rows, cols),
        where=where,
        group=group_of(weights),
        index=_order(parts),
        dtype=scale.dtype.name,
    )


def _bit_string(words: np.ndarray, bits: int, count: int, where: str) -> np.ndarray:
    """The bytes of codes along the first axis, without gaps."""
    if 8 % bits and words.shape[0] == -(-count // (32 // bits)):
        per = 32 // bits  # whole codes in each word
        if words.shape[0] != -(-count * bits // 32):
            shifts = (np.arange(per, dtype=np.uint32) * bits)[:, None]
            fields = (words.view(np.uint32)[:, None] >> shifts) & np.uint32(2**bits - 1)
            codes = fields.reshape(-1, words.shape[1])[:count].astype(np.uint8)
            flat = np.unpackbits(codes[..., None], axis=-1, bitorder="little")
            planes = flat[..., :bits].transpose(0, 2, 1).reshape(-1, words.shape[1])
            return np.packbits(planes, axis=0, bitorder="little")
    if words.shape[0] != -(-count * bits // 32):
        raise FormatError(
            f"{where}: {words.shape[0]} words for {count} codes of {bits} bits, "
            f"expected {-(-count * bits // 32)}"
        )
    return stream(words)


def _codes(words: np.ndarray, bits: int, count: int, where: str) -> np.ndarray:
    data = _bit_string(words, bits, count, where)
    return codes_of(data, bits, count).astype(np.int32)


def _integers(parts, weights, where) -> QuantizedTensor:
    """int8 codes of any width, one per byte."""
    bits = weights.get("num_bits", 8)
    if bits not in range(1, 9):
        raise FormatError(f"{where}: num_bits is {bits!r}, expected 1 to 8")
    half = 2 ** (bits - 1)
    codes = (parts["weight"].T.astype(np.int16) + half).astype(np.uint8)
    zero = parts.get("weight_zero_point")
    scale = _transposed(parts["weight_scale"])
    if zero is not None:
        zero = np.broadcast_to(_transposed(zero).astype(np.int32) + half, scale.shape)
    return affine(
        codes,
        scale,
        zero,
        bits=bits,
        matrix=codes.shape,
        where=where,
        group=group_of(weights),
        index=_order(parts),
        dtype=scale.dtype.name,
        unpacked=True,
    )


def _floats(parts, where) -> QuantizedTensor:
    """FP8 with a scale per tensor, output or block."""
    codes, scale = parts["weight"].T, _transposed(parts["weight_scale"])
    matrix = codes.shape
    kinds = {(1, 1): "tensor", (1, matrix[1]): "channel"}
    tiles = (-(-matrix[0] // 128), -(-matrix[1] // 128))
    granularity = kinds.get(scale.shape) or ("block" if scale.shape == tiles else None)
    if granularity is None or codes.dtype.name != "float8_e4m3fn":
        raise UnsupportedError(
            f"{where}: {codes.dtype} {list(matrix)} with scales {list(scale.shape)} is "
            "not read; expected float8_e4m3fn with a scale per tensor, output or block "
            "of 128 x 128"
        )
    fmt = FP8("e4m3", granularity)
    dtype = scale.dtype.name
    return MinifloatTensor(codes, scale.astype(np.float32), None, fmt, matrix, dtype)


def _inputs(made, scheme, parts, where) -> QuantizedTensor:
    """Rounded activations, where the settings ask for them."""
    if not scheme:
        return made
    kinds = {("int", 8): "int8", ("float", 8): "float8_e4m3fn"}
    stated = (scheme.get("type", "int"), scheme.get("num_bits", 8))
    activation = next((name for key, name in kinds.items() if key == stated), None)
    if activation is None or not scheme.get("symmetric", True):
        raise UnsupportedError(
            f"{where}: activations of {scheme.get('num_bits')} bits "
            f"({scheme.get('type')}, symmetric={scheme.get('symmetric')}) are not "
            "computed; expected symmetric int8 or float8"
        )
    scale = parts.get("input_scale")
    if scale is None or scheme.get("dynamic", False):
        return RoundedInputs(made, activation)
    if scale.size != 1:
        raise UnsupportedError(f"{where}: input_scale of shape {list(scale.shape)}")
    return RoundedInputs(made, activation, scale.astype(np.float32).reshape(()))


def _transposed(leaf: np.ndarray) -> np.ndarray:
    """Scales as `[groups, out]`."""
    return np.ascontiguousarray((leaf if leaf.ndim > 1 else leaf.reshape(-1, 1)).T)


def _order(parts: Mapping[str, np.ndarray]) -> np.ndarray | None:
    index = parts.get("weight_g_idx")
    return None if index is None or bool(np.all(index < 0)) else index

"""VPTQ checkpoints: vectors of neighbouring outputs from codebooks.

`config_for_layers` says for each layer `vector_lens`, `num_centroids` and
`num_res_centroids` (of outliers, then of the rest; -1 for none), `group_num`,
`group_size` and `outlier_size`. Its tensors, for groups of `g` inputs and vectors of
`n` outputs, are

* `indices` int32 `[groups, out / n, words]`: along the inputs of a group, a bit string
  of fields `main | residual << bits`; or, not packed, 16 bits `[groups, out / n, g]`
  with `res_indices` beside it;
* `centroids.weight`, `res_centroids.weight` `[groups, levels * n]`, which are added;
* `outlier_indices` of 16 bits `[1, out / n, outliers]`, `outlier_centroids.weight`:
  inputs before those of the groups;
* `perm` `[in]`: the input that each of them is, int16 standing for uint16, or wider;
* `weight_scale` and `weight_bias` `[in]`: `w = scale * w' + bias` for each input.

A vector lies along `out`, so a group is `Transposed` around an `AdditiveTensor`, whose
scale is that of the inputs; `RowParts` puts groups behind one another, and codebooks of
different sizes over one another. `weight_bias` is a `LowRank` of rank one.

Reference: VPTQ `vptq/layers/vqlinear.py`, `vptq/utils/pack.py`, `vptq/ops`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.aqlm import additive, check_levels
from qjax.converters.overrides import layer_name
from qjax.errors import FormatError, UnsupportedError
from qjax.tensor import QuantizedTensor
from qjax.wrappers import LowRank, Permuted, RowParts, Transposed

PARTS = {
    "indices": ("any", 3),
    "centroids.weight": ("floating", 2),
    "res_indices": ("any", 3),
    "res_centroids.weight": ("floating", 2),
    "outlier_indices": ("any", 3),
    "outlier_centroids.weight": ("floating", 2),
    "perm": ("integer", 1),
    "weight_scale": ("floating", 1),
    "weight_bias": ("floating", 1),
}
_MAIN, _RESIDUAL = "centroids.weight", "res_centroids.weight"
_OUTLIER = "outlier_centroids.weight"


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What the settings say of a layer.

    Attributes:
      rows: inputs.
      cols: outputs.
      groups: groups of inputs.
      size: inputs of a group.
      vector: outputs of a vector.
      levels: vectors of a codebook.
      more: vectors of a residual codebook, 0 for none.
      outliers: inputs before the groups, coded by `outlier_levels` vectors of
        `outlier_vector` outputs.
    """

    rows: int
    cols: int
    groups: int
    size: int
    vector: int
    levels: int
    more: int
    outliers: int
    outlier_vector: int
    outlier_levels: int

    @property
    def widths(self) -> tuple[int, int]:
        """Bits of a main and of a residual index."""
        return tuple(max(n - 1, 0).bit_length() for n in (self.levels, self.more))  # pyright: ignore[reportReturnType]

    def shapes(self, packed: bool) -> dict[str, tuple[int, ...]]:
        """What the tensors have to be."""
        length = -(-self.size * sum(self.widths) // 32) if packed else self.size
        vectors = -(-self.cols // self.vector)
        made = {
            "indices": (self.groups, vectors, length),
            _MAIN: (self.groups, self.levels * self.vector),
        }
        if self.more:
            made[_RESIDUAL] = self.groups, self.more * self.vector
        if self.more and not packed:
            made["res_indices"] = made["indices"]
        if self.outliers:
            count = -(-self.cols // self.outlier_vector)
            made["outlier_indices"] = 1, count, self.outliers
            made[_OUTLIER] = 1, self.outlier_levels * self.outlier_vector
        return made

    def misfit(self, parts: Mapping[str, Any]) -> str | None:
        """What does not fit the tensors, if anything."""
        packed = np.dtype(parts["indices"].dtype).itemsize == 4
        wanted = self.shapes(packed)
        wanted |= dict.fromkeys(("perm", "weight_scale", "weight_bias"), (self.rows,))
        for name, leaf in parts.items():
            if name in wanted and tuple(leaf.shape) != wanted[name]:
                return f"{name} has shape {list(leaf.shape)}, not {list(wanted[name])}"
        extra = (set(parts) - set(wanted)) | (set(self.shapes(packed)) - set(parts))
        return f"{min(extra)} is missing, or has no settings" if extra else None


class VPTQ:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks, parts, stated = "vptq", ("centroids.weight",), PARTS, ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        self._layers: list[dict[str, _Layer]] = []
        for key in ("config_for_layers", "shared_layer_config"):
            found = settings.get(key) or {}
            if not isinstance(found, Mapping):
                raise FormatError(f"{where}: {key} is {found!r:.200}")
            made = {n: _layer(own, f"{where}: {key}.{n}") for n, own in found.items()}
            self._layers.append(made)
        self._known = {layer for made in self._layers for layer in made.values()}
        if not self._known:
            raise FormatError(
                f"{where}: quantization_config has no config_for_layers, without which "
                "VPTQ's codebooks cannot be cut into vectors"
            )

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        misfits = {}
        for layer in sorted(self._known, key=dataclasses.astuple):
            misfits[layer] = layer.misfit(parts)
            if misfits[layer] is None:
                return layer.cols, layer.rows
        raise ValueError(f"no layer of the settings: {misfits.popitem()[1]}")

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`."""
        layer = self._of(layer_name(where), where)
        misfit = layer.misfit(parts)
        if misfit:
            raise FormatError(f"{where}: {misfit}")
        for length in (layer.vector, layer.outlier_vector)[: 1 + bool(layer.outliers)]:
            if layer.cols % length:
                raise UnsupportedError(
                    f"{where}: vectors of {length} outputs do not divide "
                    f"out={layer.cols}, which is not read"
                )
        scale, order = _scale(parts, layer, where)
        made = _weight(parts, layer, scale, where)
        if order is not None:
            made = Permuted(made, order)
        if "weight_bias" in parts:
            bias = parts["weight_bias"]
            ones = np.ones((1, layer.cols), bias.dtype)
            made = LowRank(made, bias.reshape(-1, 1), ones)
        return made

    def _of(self, name: str, where: str) -> _Layer:
        exact, shared = self._layers
        for end, layer in ({name: exact[name]} if name in exact else shared).items():
            if f".{name}".endswith(f".{end}"):
                return layer
        raise FormatError(f"{where}: config_for_layers does not name it")


def _layer(own: Any, where: str) -> _Layer:
    """The settings of a layer, checked."""
    if not isinstance(own, Mapping):
        raise FormatError(f"{where}: is {own!r:.200}, expected an object")
    if own.get("vector_quant_dim", "out") != "out":
        raise UnsupportedError(f"{where}: vectors along `in` are not read")

    def number(key: str, at: int | None = None) -> int:
        value = own.get(key, -1)
        if at is not None and isinstance(value, list) and len(value) == 2:
            value = value[at]
        if type(value) is not int or not -1 <= value < 2**31:
            raise FormatError(f"{where}: {key} is {own.get(key)!r:.200}")
        return max(value, 0)

    outliers, short, few = number("outlier_size"), number("vector_lens", 0), 0
    if short > 1:
        few = number("num_centroids", 0)
    if not few:
        outliers = short = 0
    rows, groups = number("in_features"), max(number("group_num"), 1)
    size = number("group_size") or (rows - outliers) // groups
    vector, levels = number("vector_lens", 1), number("num_centroids", 1)
    more = number("num_res_centroids", 1)
    for count in (levels, *(n for n in (more, few) if n)):
        check_levels(count, f"{where}.num_centroids")
    cols = number("out_features")
    if not vector or not cols or size < 1 or rows != outliers + groups * size:
        raise UnsupportedError(
            f"{where}: in={rows}, out={cols} with {groups} groups of {size} inputs, "
            f"{outliers} outliers and vectors of {vector} is not read; expected groups "
            "and outliers that are all inputs"
        )
    return _Layer(rows, cols, groups, size, vector, levels, more, outliers, short, few)


def _scale(parts, layer: _Layer, where: str):
    """Scales in the order of the codes, float `[in]`, and that order."""
    scale = parts.get("weight_scale")
    if scale is None:
        scale = np.ones(layer.rows, np.float16)
    order = parts.get("perm")
    if order is None:
        return scale, None
    if order.dtype == np.int16:
        order = order.view(np.uint16)
    if not np.array_equal(np.sort(order), np.arange(layer.rows)):
        raise FormatError(f"{where}.perm: is not a permutation of 0..{layer.rows - 1}")
    return scale[order], order.astype(np.int32)


def _weight(parts, layer: _Layer, scale: np.ndarray, where: str) -> Any:
    """Outliers and groups, in the order of the codes."""
    made: list[tuple[int, QuantizedTensor]] = []

    def add(start: int, books: list[np.ndarray], indices: list[np.ndarray]):
        """Vectors, or sums of them, for inputs from `start`."""
        count, cols = indices[0].shape
        codes = np.stack(indices, 1).reshape(-1, cols)
        own = scale[start : start + cols].reshape(1, -1)
        matrix = count * books[0].shape[1], cols
        base = additive(codes, np.stack(books), own, matrix, where)
        made.append((start, Transposed(base)))

    if layer.outliers:
        books = parts[_OUTLIER].reshape(layer.outlier_levels, layer.outlier_vector)
        index = _short(parts, "outlier_indices", layer.outlier_levels, where)
        add(0, [books], [index[0]])
    main, more = _indices(parts, layer, where)
    for i in range(layer.groups):
        start = layer.outliers + i * layer.size
        books = [parts[_MAIN][i].reshape(layer.levels, layer.vector)]
        index = [main[i]]
        if more is not None:
            rest = parts[_RESIDUAL][i].reshape(layer.more, layer.vector)
            if layer.more == layer.levels and rest.dtype == books[0].dtype:
                books, index = [*books, rest], [*index, more[i]]
            else:
                add(start, [rest], [more[i]])
        add(start, books, index)
    if len(made) == 1:
        return made[0][1]
    starts, weights = zip(*made, strict=True)
    matrix = layer.rows, layer.cols
    return RowParts(weights, starts, matrix, weights[0].dtype)


def _indices(parts, layer: _Layer, where: str):
    """Main and residual indices `[groups, out / n, g]`, the latter or None."""
    words = parts["indices"]
    if words.dtype.itemsize != 4:
        main = _short(parts, "indices", layer.levels, where)
        more = layer.more
        return main, _short(parts, "res_indices", more, where) if more else None
    low, high = layer.widths
    if (total := low + high) > 32:
        raise UnsupportedError(f"{where}: indices of {total} bits are not read")
    main = _fields(words, total, 0, low, layer.size)
    return main, _fields(words, total, low, high, layer.size) if high else None


def _fields(words: np.ndarray, total: int, low: int, bits: int, count: int):
    """Bits from `low` on of `count` fields of `total` bits each, uint16."""
    words = words.view(np.uint32)
    made = np.empty((*words.shape[:-1], count), np.uint16)
    period, step = (n // math.gcd(total, 32) for n in (32, total))  # fields, words
    for i in range(min(period, count)):
        own = made[..., i::period]
        first, place = divmod(i * total + low, 32)
        fields = words[..., first::step][..., : own.shape[-1]] >> np.uint32(place)
        if place + bits > 32:
            rest = words[..., first + 1 :: step][..., : own.shape[-1]]
            fields |= rest << np.uint32(32 - place)
        np.bitwise_and(fields, 2**bits - 1, out=own, casting="unsafe")
    return made


def _short(parts, name: str, levels: int, where: str) -> np.ndarray:
    """Indices of 16 bits, stored under whatever dtype."""
    leaf = parts[name]
    if leaf.dtype.itemsize != 2:
        raise FormatError(f"{where}.{name}: is {leaf.dtype}, expected 16-bit indices")
    index = leaf.view(np.uint16)
    if int(index.max()) >= levels:
        raise FormatError(
            f"{where}.{name}: index {index.max()} outside 0..{levels - 1}"
        )
    return index

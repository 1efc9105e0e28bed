"""optimum-quanto checkpoints, read and written: qint8, qfloat8, qint4 and qint2.

* 8 bits: `weight._data` int8 or float8 `[out, in]` and `weight._scale` `[out, 1]`.
* 2 and 4 bits: the weight `[out, in]` is cut, in row-major order, into a matrix
  `[groups, group]` of unsigned codes, whose rows have a `weight._scale` and a
  `weight._shift` each, `[groups, 1]`: `scale * code - shift` where the shift is a
  float, `scale * (code - shift)` where it is an integer. `weight._data._data` uint8
  packs this matrix along its rows, in as many equal runs as a byte has codes; the first
  run lies in the lowest bits, the last may be short.

A group is 128 inputs, or the first of 96, 64 and 32 that divides `in`; rows of up to
128 inputs, and those that none divides, are one group. The shape of a weight in groups
is not in the file: `expected_shape` has to give it.

`input_scale` and `output_scale` are 1 unless activations are rounded. A file beside the
weights, `quanto_qmap.json`, says by layer what weights and activations are.

Reference: optimum-quanto 0.2.7 `nn/qmodule.py`, `tensor/packed.py`, `tensor/qbits.py`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from qjax.converters.affine import affine, integers
from qjax.converters.biases import affine_of_bias, bias_of_zero
from qjax.converters.overrides import layer_name, usual
from qjax.converters.runs import run_columns, run_words
from qjax.converters.words import transposed
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import FP8, Int
from qjax.formats.base import FLOAT_SCALES
from qjax.tensor import AffineTensor, MinifloatTensor, QuantizedTensor
from qjax.wrappers import RoundedInputs

_log = logging.getLogger(__name__)

PARTS = {
    "weight._data": ("any", 2),
    "weight._data._data": ("uint8", 2),
    "weight._scale": ("floating", None),
    "weight._shift": ("any", None),
    "input_scale": ("floating", None),
    "output_scale": ("floating", None),
    "expected_shape": ("integer", 1),
}
FLOATS = {
    np.dtype(ml_dtypes.float8_e4m3fn): "e4m3",
    np.dtype(ml_dtypes.float8_e5m2): "e5m2",
}
ACTIVATIONS = {"qint8": "int8", "qfloat8_e4m3fn": "float8_e4m3fn"}


def group_size(rows: int) -> int:
    """Inputs in a group of 2- or 4-bit codes, for `rows` inputs."""
    sizes = (128, 96, 64, 32) if rows > 128 else ()
    return next((size for size in sizes if rows % size == 0), rows)


class Quanto:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`.

    Args:
      settings: by layer, `weights` and `activations`, where the checkpoint says them.
      where: what errors call the checkpoint.
    """

    kind, marks, parts = "quanto", ("weight._data", "weight._data._data"), PARTS
    stated = ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        self._settings, self._where, self._warned = settings, where, False

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; `(groups, group)` where nothing says it."""
        if "weight._data" in parts:
            return tuple(parts["weight._data"].shape)
        if "expected_shape" in parts:
            cols, rows = (int(size) for size in parts["expected_shape"])
            return cols, rows
        group = parts["weight._data._data"].shape[1]
        return int(np.prod(parts["weight._scale"].shape)), group

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, in `RoundedInputs` where activations are rounded."""
        name = layer_name(where)
        said = self._settings.get(name)
        said = said if isinstance(said, Mapping) else {}
        if "weight._data" in parts:
            made = _eight(parts, where)
        else:
            made = self._packed(parts, said.get("weights"), where)
        for which in ("input_scale", "output_scale"):
            leaf = parts.get(which)
            if leaf is not None and (leaf.size != 1 or not 0 < leaf.max() < np.inf):
                raise FormatError(f"{where}.{which}: expected one positive number")
        if float(parts.get("output_scale", np.ones(())).reshape(())) != 1:
            self._warn(where)
        scale = parts.get("input_scale")
        if scale is None or float(scale.reshape(())) == 1:
            return made
        activation = ACTIVATIONS.get(str(said.get("activations", "qint8")))
        if activation is None:
            raise UnsupportedError(
                f"{where}: activations of {said.get('activations')!r:.100} are not "
                f"computed; expected {' or '.join(ACTIVATIONS)}"
            )
        return RoundedInputs(made, activation, scale.astype(np.float32).reshape(()))

    def _packed(self, parts, kind: Any, where: str) -> QuantizedTensor:
        cols, rows = self.shape(parts)
        words, group = parts["weight._data._data"], parts["weight._data._data"].shape[1]
        scale, shift = parts["weight._scale"], parts["weight._shift"]
        count = scale.size
        fits = cols > 0 and rows > 0 and cols * rows == count * group
        if not fits or rows % group or shift.size != count:
            raise FormatError(
                f"{where}: {count} scales and {shift.size} shifts for rows of {group} "
                f"codes, which are no groups of a weight of shape {[cols, rows]}"
            )
        bits = _bits(len(words), count, kind, where)
        codes = run_columns(words, range(0, 8, bits), bits, (rows, cols))
        scale, shift = (_placed(leaf, cols) for leaf in (scale, shift))
        common: dict[str, Any] = {"bits": bits, "matrix": (rows, cols)}
        common |= {"where": where, "group": group}
        if shift.dtype == np.bool_:
            raise FormatError(f"{where}.weight._shift: is bool, expected numbers")
        if not np.issubdtype(shift.dtype, np.integer):
            return affine_of_bias(codes, scale, -shift, **common)
        zero = shift.astype(np.float32)
        return affine(codes, scale, zero, dtype=scale.dtype.name, **common)

    def _warn(self, where: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s: rounds its outputs, as other layers may; only weights and inputs "
                "are rounded here",
                where,
            )


def _bits(words: int, count: int, kind: Any, where: str) -> int:
    """2 or 4, as is said, or as the number of bytes shows."""
    fitting = [bits for bits in (4, 2) if -(-count * bits // 8) == words]
    if kind in ("qint2", "qint4"):
        fitting = [bits for bits in fitting if kind == f"qint{bits}"]
    if len(fitting) != 1:
        raise FormatError(
            f"{where}: {words} rows of bytes for {count} groups of "
            f"{kind or 'codes'!s:.100}, expected {-(-count // 2)} for qint4, "
            f"{-(-count // 4)} for qint2"
        )
    return fitting[0]


def _placed(leaf: np.ndarray, cols: int) -> np.ndarray:
    """Statistics of groups as `[groups, out]`."""
    return transposed(leaf.reshape(cols, -1))


def _eight(parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
    data, scale = parts["weight._data"], parts["weight._scale"]
    element = FLOATS.get(data.dtype)
    if element is None and data.dtype != np.int8:
        raise UnsupportedError(
            f"{where}: weights of {data.dtype} are not read; expected int8, "
            f"{', '.join(map(str, FLOATS))}"
        )
    cols, rows = data.shape
    if scale.size not in (1, cols):
        raise FormatError(
            f"{where}: {scale.size} scales for {cols} outputs, expected one each"
        )
    codes, scale = transposed(data), scale.reshape(1, -1)
    whole = "channel" if scale.size == cols else "tensor"
    dtype = scale.dtype.name
    if element is None:
        fmt = Int(8, whole, scale_dtype=dtype)
        return AffineTensor(codes, scale, None, fmt, (rows, cols), dtype)
    fmt = FP8(element, whole, scale_dtype=dtype)
    return MinifloatTensor(codes, scale, None, fmt, (rows, cols), dtype)


class QuantoWriter:
    """Writes the layers of one checkpoint; see `qjax.converters.gptq.GPTQWriter`.

    The library that reads them needs `map()` as `quanto_qmap.json`.
    """

    kind = "quanto"
    fallback = Int(8, "channel", scale_dtype="float16")

    def __init__(self):
        self._kinds: dict[str, str] = {}

    def write(self, q: QuantizedTensor, where: str) -> dict[str, np.ndarray]:
        """The tensors of a weight, named after it.

        Raises:
          UnsupportedError: quanto does not hold it exactly.
        """
        if isinstance(q, MinifloatTensor):
            kind, made = _write_floats(q, where)
        else:
            kind, made = _write_integers(q, where)
        scale = made["weight._scale"]
        if scale.dtype.name not in FLOAT_SCALES:
            raise UnsupportedError(f"{where}: has scales of {scale.dtype}, not floats")
        self._kinds[layer_name(where)] = kind
        one = np.ones((), scale.dtype)
        return {**made, "input_scale": one, "output_scale": one}

    def settings(self, kept: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of the layers written so far; see also `map`."""
        common = usual(self._kinds.values())
        return {
            "quant_method": "quanto",
            "weights": common.removeprefix("q").partition("_")[0],
            "activations": None,
            "modules_to_not_convert": list(kept) or None,
        }

    def map(self) -> dict[str, dict[str, str]]:
        """What `quanto_qmap.json` has to say of the layers written so far."""
        return {
            name: {"weights": kind, "activations": "none"}
            for name, kind in self._kinds.items()
        }


def _write_floats(q: MinifloatTensor, where: str):
    kind = FLOATS.get(np.dtype(q.codes.dtype))
    if kind is None or q.grouping.kind not in ("channel", "tensor"):
        raise UnsupportedError(
            f"{where}: is {q!r}; quanto holds FP8 with a scale per output"
        )
    scale = np.broadcast_to(np.asarray(q.scale), (1, q.matrix[1]))
    made = {
        "weight._data": transposed(np.asarray(q.codes)),
        "weight._scale": np.ascontiguousarray(scale.T),
    }
    return f"q{q.codes.dtype}", made


def _write_integers(q: QuantizedTensor, where: str):
    x = integers(q, where)
    rows = len(x.codes)
    group = rows if x.bits == 8 else group_size(rows)
    single = x.bits == 8 and not x.symmetric
    if x.bits not in (2, 4, 8) or single or x.group != group or x.index is not None:
        raise UnsupportedError(
            f"{where}: has {x.bits} bits in groups of {x.group}; quanto holds 8 bits "
            f"with a scale per output and no zero-point, and 2 or 4 bits in groups of "
            f"{group_size(rows)} for {rows} inputs, in order"
        )
    codes, scale = transposed(x.codes), np.ascontiguousarray(x.scale.T)
    scale = scale.reshape(-1, 1)
    if x.bits == 8:
        made = {"weight._data": (codes ^ np.uint8(128)).view(np.int8)}
        return "qint8", made | {"weight._scale": scale}
    whole = x.zero.dtype == np.int32 and 0 <= x.zero.min() <= x.zero.max() < 128
    # The library keeps such weights in another layout, which takes no integers
    if whole and not (x.bits == 4 and group == 128 and scale.dtype.name == "bfloat16"):
        shift = x.zero.astype(np.uint8)
    else:
        bias = bias_of_zero(x.scale, x.zero.astype(np.float32))
        if bias is None:
            raise UnsupportedError(
                f"{where}: has zero-points that are no quotients of {x.scale.dtype} "
                "shifts and scales, as quanto stores them"
            )
        shift = -bias
    return f"qint{x.bits}", {
        "weight._data._data": run_words(
            codes.reshape(-1, group), range(0, 8, x.bits), np.uint8
        ),
        "weight._scale": scale,
        "weight._shift": np.ascontiguousarray(shift.T).reshape(-1, 1),
    }

"""Quark checkpoints (AMD): FP8, integers of 4 and 8 bits, and MXFP4.

* FP8: `weight` float8_e4m3fn or float8_e5m2 `[out, in]`, `weight_scale` one number or
  `[out]`. int8: `weight` int8, `weight_scale` likewise, `weight_zero_point`.
* MXFP4: `weight` uint8 `[out, in / 2]`, the first of two E2M1 codes in the low nibble;
  `weight_scale` uint8 E8M0 `[out, in / 32]`.
* Other integers: see `qjax.converters.quark_integers`.

`input_scale` is the static scale of activations. MXFP6 has no format here, integers of
2 and 3 bits and weights with several quantizers are rare: they are refused.

Reference: AMD Quark 0.13; vLLM `quantization/quark/`.
"""

import fnmatch
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.activations import Activations
from qjax.converters.compressed_parts import weight_of
from qjax.converters.floats import fp4, fp8, shape_of
from qjax.converters.overrides import layer_name, object_of
from qjax.converters.quark_integers import KINDS, ORDERS, integer_shape, read_integers
from qjax.errors import FormatError, UnsupportedError
from qjax.tensor import QuantizedTensor

_ROUNDED = {"fp8_e4m3": "float8_e4m3fn", "int8": "int8"}


class Quark:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks = "quark", ("weight_scale",)
    parts: Mapping[str, tuple[str, int | None]] = {
        "weight": ("any", 2),
        "weight_scale": ("any", None),
        "weight_zero_point": ("any", None),
        "input_scale": ("floating", None),
        "input_zero_point": ("any", None),
        "output_scale": ("floating", None),
        "bias_scale": ("floating", None),
    }
    stated = ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        self._whole = object_of(settings, "global_quant_config", where)
        own = object_of(settings, "layer_quant_config", where)
        self._own = {text: object_of(own, text, where) for text in own}
        export = object_of(settings, "export", where)
        self._order = export.get("pack_method", "reorder")
        self._activations = Activations(where)

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        weight = parts["weight"]
        return integer_shape(weight, parts["weight_scale"]) or shape_of(weight)

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, in `RoundedInputs` where activations are rounded."""
        weight, scale = parts["weight"], parts["weight_scale"]
        self._activations.outputs(parts, where)
        scheme = self._scheme(layer_name(where))
        kind, _ = _tensor(scheme, "weight")
        name = weight.dtype.name
        if name == "uint8" and scale.dtype == np.uint8 and kind in (None, "fp4"):
            made = fp4(weight, scale, None, where)
        elif name.startswith("float8") and kind in (None, "fp8_e4m3", "fp8_e5m2"):
            made = fp8(weight, scale, where, dtype="bfloat16")
        elif name == "int8" and kind in (None, "int8"):
            integers = {
                part: _integer(leaf, where) if part == "weight_zero_point" else leaf
                for part, leaf in parts.items()
            }
            made = weight_of(integers, {"num_bits": 8}, where)
        elif name in ("int32", "int8", "uint8") and kind in KINDS:
            if self._order not in (*ORDERS,):
                raise UnsupportedError(
                    f"{where}: pack_method {self._order!r:.100} is not read; expected "
                    f"{' or '.join(ORDERS)}"
                )
            made = read_integers(parts, kind, self._order, where)
        else:
            raise UnsupportedError(
                f"{where}: Quark's {kind or 'weights'} in {weight.dtype} with scales "
                f"of {scale.dtype} are not read; expected FP8, MXFP4 or integers of 4 "
                "or 8 bits"
            )
        return self._inputs(made, scheme, parts.get("input_scale"), where)

    def _scheme(self, name: str) -> Mapping[str, Any]:
        for text, own in self._own.items():
            if fnmatch.fnmatchcase(name, text):
                return own
        return self._whole

    def _inputs(self, made, scheme, scale: Any, where: str) -> QuantizedTensor:
        kind, dynamic = _tensor(scheme, "input_tensors")
        if kind is None:
            return made
        activation = _ROUNDED.get(kind)
        if activation is None or not (dynamic or scale is not None):
            return self._activations.left(made, kind)
        scale = None if dynamic else scale
        return self._activations.rounded(made, activation, scale, where)


def _tensor(scheme: Mapping[str, Any], which: str) -> tuple[str | None, bool]:
    """What a tensor is rounded to, and whether its scales are dynamic."""
    found = scheme.get(which)
    if isinstance(found, list) and len(found) > 1:
        return f"chain of {len(found)} quantizers", False
    found = found[0] if isinstance(found, list) and found else found
    if not isinstance(found, Mapping) or not isinstance(found.get("dtype"), str):
        return None, False
    kind = found["dtype"].rpartition(".")[2]
    groups = found.get("qscheme") == "per_group" and kind != "fp4"
    axis = found.get("ch_axis")
    if which == "weight" and "int" in kind:
        if axis not in ((None, 1, -1) if groups else (None, 0)):
            kind += f" along axis {axis!r:.20}"
    return (f"{kind} per group" if groups else kind), found.get("is_dynamic") is True


def _integer(zero: np.ndarray, where: str) -> np.ndarray:
    """Zero-points that are stored as floats, as the integers that they are."""
    if np.issubdtype(zero.dtype, np.integer):
        return zero
    with np.errstate(invalid="ignore"):
        made = zero.astype(np.int32)
    if not np.array_equal(made, zero):
        raise FormatError(f"{where}.weight_zero_point: expected whole numbers")
    return made

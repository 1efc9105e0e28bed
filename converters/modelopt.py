"""ModelOpt checkpoints (TensorRT Model Optimizer): FP8, NVFP4, MXFP8, MXFP4.

* FP8: `weight` float8_e4m3fn `[out, in]` with `weight_scale`: one number, `[out]`, or
  per tile of 128 x 128, `[out / 128, 1, in / 128, 1]`; `input_scale`, one number.
* NVFP4: `weight` uint8 `[out, in / 2]`, the first of two E2M1 codes in the low nibble;
  `weight_scale` float8_e4m3fn `[out, in / 16]`; `weight_scale_2`, which multiplies.
  Here the divisor is its reciprocal: a scale differs from theirs by at most two units
  of float32's last place.
* MXFP8 and MXFP4: `weight_scale` uint8 E8M0 `[out, in / 32]`.
* `pre_quant_scale` `[in]` multiplies activations before they are rounded (AWQ).

What a layer is follows from its tensors, so that mixed precision needs no settings.
Static FP8 activations are rounded; those in FP4 and MX are not, a warning says so.

Reference: ModelOpt `torch/export/quant_utils.py`,
`torch/quantization/qtensor/nvfp4_tensor.py`.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.converters.activations import Activations
from qjax.converters.floats import fp4, fp8, mxfp8, shape_of
from qjax.converters.overrides import layer_name, object_of
from qjax.errors import FormatError, UnsupportedError
from qjax.tensor import MinifloatTensor, QuantizedTensor
from qjax.wrappers import InputScaled

_REFUSED = ("INT4_AWQ", "W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ", "INT8_SQ")


class ModelOpt:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks = "modelopt", ("weight_scale",)
    parts: Mapping[str, tuple[str, int | None]] = {
        "weight": ("any", 2),
        "weight_scale": ("any", None),
        "weight_scale_2": ("floating", None),
        "input_scale": ("floating", None),
        "pre_quant_scale": ("floating", None),
    }
    stated = ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        settings = settings.get("quantization", settings)
        if not isinstance(settings, Mapping):
            raise FormatError(f"{where}: quantization is {settings!r:.200}")
        algorithm = settings.get("quant_algo")
        if not isinstance(algorithm, str | None):
            raise FormatError(f"{where}: quant_algo is {algorithm!r:.200}, not a name")
        self._algorithm = str(algorithm)
        if self._algorithm.startswith(_REFUSED):
            raise UnsupportedError(
                f"{where}: ModelOpt's {self._algorithm:.100} is not read; expected "
                "FP8, NVFP4, MXFP8, MXFP4 or a mixture of these"
            )
        layers = object_of(settings, "quantized_layers", where)
        self._layers = {name: object_of(layers, name, where) for name in layers}
        self._activations = Activations(where)

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        return shape_of(parts["weight"])

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, in the wrappers that its activations need."""
        weight, scale = parts["weight"], parts["weight_scale"]
        second = parts.get("weight_scale_2")
        if weight.dtype == np.uint8:
            made = self._four(weight, scale, second, "input_scale" in parts, where)
        elif scale.dtype == np.uint8:
            made = mxfp8(weight, scale, where)
            made = self._activations.left(made, "MXFP8")
        elif weight.dtype.name == "float8_e4m3fn" and second is None:
            if scale.ndim == 4 and scale.shape[1] == scale.shape[3] == 1:
                scale = scale[:, 0, :, 0]
            made = fp8(weight, scale, where, dtype="bfloat16")
            made = self._eight(made, parts.get("input_scale"), where)
        else:
            raise UnsupportedError(
                f"{where}: parts {sorted(parts)} with weights in {weight.dtype} are "
                "not those of FP8, NVFP4, MXFP8 or MXFP4, which are read"
            )
        factors = parts.get("pre_quant_scale")
        if factors is None:
            return made
        if factors.size != made.matrix[0]:
            raise FormatError(
                f"{where}.pre_quant_scale: has {factors.size} numbers, expected "
                f"{made.matrix[0]}"
            )
        return InputScaled(made, factors.reshape(-1).astype(np.float32))

    def _four(self, weight, scale, second, rounds: bool, where: str) -> QuantizedTensor:
        if second is None:
            made = fp4(weight, scale, None, where)
            return self._activations.left(made, "MX") if rounds else made
        made = fp4(weight, scale, reciprocal(second, where), where)
        return self._activations.left(made, "FP4") if rounds else made

    def _eight(self, made: MinifloatTensor, scale: Any, where: str) -> QuantizedTensor:
        algorithm = self._layers.get(layer_name(where), {}).get("quant_algo")
        dynamic = "PER_TOKEN" in str(algorithm or self._algorithm)
        if scale is None and not dynamic:
            return made
        scale = None if dynamic else scale
        return self._activations.rounded(made, "float8_e4m3fn", scale, where)


def reciprocal(scale: np.ndarray, where: str) -> np.ndarray:
    """The divisor for a scale that multiplies.

    Raises:
      FormatError: it is not one positive number, whose reciprocal is finite.
    """
    with np.errstate(all="ignore"):
        wide = np.asarray(scale).astype(np.float32)
        made = np.float32(1) / wide
    if wide.size != 1 or not (jnp.isfinite(made).all() and (made > 0).all()):
        raise FormatError(
            f"{where}: the scale of all scales is {wide.reshape(-1)[:4]}, expected one "
            "positive number"
        )
    return made

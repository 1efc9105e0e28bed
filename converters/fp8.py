"""FP8 checkpoints: DeepSeek's blocks, one scale per tensor, and FBGEMM's outputs.

* `fp8`: `weight` float8_e4m3fn `[out, in]`. With `weight_block_size`,
  `weight_scale_inv` `[out / 128, in / 128]`, which multiplies in spite of its name
  (float32, or E8M0); without, `weight_scale_inv` or `weight_scale`, one number. Static
  scales of activations are `activation_scale` or `input_scale`. Newer files hold layers
  with a uint8 E8M0 scale per 32 inputs (MXFP8), or E2M1 codes, two to an int8, the
  first in the low nibble (MXFP4).
* `fbgemm_fp8`: `weight` float8_e4m3fn `[out, in]`, `weight_scale` float32 `[out, 1]`.

Activations are rounded per token, or with the static scale. DeepSeek's own runtime uses
one scale per token and 128 inputs, which is not computed: such a layer, and one with
MX scales, is its weight alone. FBGEMM bounds the scale of a token by
`activation_scale_ub`, which matters only for activations beyond it, and is not done.

Reference: DeepSeek-V3 `README_WEIGHTS.md`; transformers
`integrations/finegrained_fp8.py`, `integrations/fbgemm_fp8.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.activations import Activations
from qjax.converters.floats import fp4, fp8, mxfp8
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import FP8
from qjax.tensor import MinifloatTensor, QuantizedTensor
from qjax.wrappers import RoundedInputs

_FLOAT8 = "float8_e4m3fn"


class BlockFP8:
    """Reads the layers of one `fp8` checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks = "fp8", ("weight_scale_inv", "weight_scale")
    parts: Mapping[str, tuple[str, int | None]] = {
        "weight": ("any", 2),
        "weight_scale_inv": ("any", None),
        "weight_scale": ("any", None),
        "activation_scale": ("floating", None),
        "input_scale": ("floating", None),
    }
    stated = ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        block = settings.get("weight_block_size")
        if block not in (None, [128, 128], [1, 32]):
            raise UnsupportedError(
                f"{where}: FP8 with weight_block_size {block!r:.100} is not read; "
                "expected [128, 128] or one scale per tensor"
            )
        self._scheme = settings.get("activation_scheme")
        if self._scheme not in (None, "static", "dynamic"):
            raise FormatError(
                f"{where}: activation_scheme is {self._scheme!r:.100}, expected static "
                "or dynamic"
            )
        self._blocks = block is not None
        self._activations = Activations(where)

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        rows, cols = parts["weight"].shape
        double = np.issubdtype(parts["weight"].dtype, np.integer)
        return rows, cols * (2 if double else 1)

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, in `RoundedInputs` where activations are rounded."""
        plain = "weight_scale" in parts
        if plain and "weight_scale_inv" in parts:
            raise FormatError(
                f"{where}: has both weight_scale and weight_scale_inv, expected one"
            )
        scale = parts["weight_scale"] if plain else parts["weight_scale_inv"]
        weight = parts["weight"]
        if np.issubdtype(weight.dtype, np.integer):
            made = fp4(weight, scale, None, where)
        elif scale.dtype == np.uint8:
            made = mxfp8(weight, scale, where)
        else:
            made = fp8(weight, scale, where, dtype="bfloat16")
        if self._scheme is None:
            return made
        tiles = isinstance(made.format, FP8) and made.format.granularity == "block"
        if self._blocks or tiles:
            what = f"{_FLOAT8}, one scale per token and block of inputs"
            return self._activations.left(made, what)
        static = None
        if self._scheme == "static":
            other = parts.get("activation_scale")
            static = parts["input_scale"] if other is None else other
        return self._activations.rounded(made, _FLOAT8, static, where)


class FbgemmFP8:
    """Reads the layers of one `fbgemm_fp8` checkpoint; see `BlockFP8`."""

    kind, marks = "fbgemm_fp8", ("weight_scale",)
    parts: Mapping[str, tuple[str, int | None]] = {
        "weight": ("float8_e4m3fn", 2),
        "weight_scale": ("floating", 2),
        "input_scale_ub": ("floating", None),
    }
    stated = ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        del settings, where  # a bound of the activations' scales, which is not used

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        return tuple(parts["weight"].shape)

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, in `RoundedInputs`."""
        made = fp8(parts["weight"], parts["weight_scale"], where, "channel", "bfloat16")
        return RoundedInputs(made, _FLOAT8)


def fbgemm_experts(
    weight: np.ndarray, scale: np.ndarray, where: str
) -> MinifloatTensor:
    """The weights of all experts of a Llama 4 layer.

    Args:
      weight: float8 `[experts, in, out]`: `gate_up_proj` or `down_proj`.
      scale: a number for each output, `[experts, 1, out]` as `gate_up_proj_scale` has
        them, or `[experts, out, 1]` as `down_proj_scale`.
      where: what errors call it.

    Returns:
      A weight `[experts, in, out]`.

    Raises:
      FormatError: scales are not one for each output of each expert.
    """
    if weight.ndim != 3 or sorted(scale.shape) != sorted(
        (weight.shape[0], 1, weight.shape[2])
    ):
        raise FormatError(
            f"{where}: weights {list(weight.shape)} with scales {list(scale.shape)}, "
            "expected [experts, in, out] with a scale for each output"
        )
    scale = scale.reshape(weight.shape[0], weight.shape[2], 1)
    return fp8(np.swapaxes(weight, -1, -2), scale, where, "channel", "bfloat16")

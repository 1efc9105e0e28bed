"""GPTQ checkpoints: v1 (`gptq`) and v2 (`gptq_v2`), 2, 3, 4 and 8 bits.

Per linear layer: `qweight` int32 `[in * bits / 32, out]`, a bit string along `in`;
`qzeros` int32 `[groups, out * bits / 32]`, one along `out`; `scales` `[groups, out]`;
`g_idx` int32 `[in]`, the group of each input, which is out of order with `desc_act`.
v1 stores zero-points minus one.

Reference: AutoGPTQ `nn_modules/qlinear/qlinear_cuda.py`; GPTQModel
`nn_modules/qlinear/__init__.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.affine import affine, group_of
from qjax.converters.words import codes_of, stream
from qjax.errors import FormatError, UnsupportedError
from qjax.tensor import QuantizedTensor

PARTS = {
    "qweight": ("integer", 2),
    "qzeros": ("integer", 2),
    "scales": ("floating", 2),
    "g_idx": ("integer", 1),
}
FORMATS = ("gptq", "gptq_v2")


class GPTQ:
    """Reads the layers of one checkpoint.

    Args:
      settings: `quantization_config`.
      where: what errors call the checkpoint.

    Raises:
      UnsupportedError: a layout that is not read.
      FormatError: `bits` is missing or not a width.
    """

    kind, marks, parts, stated = "gptq", ("qweight",), PARTS, ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        layout = settings.get("checkpoint_format") or settings.get("format")
        self.layout = layout or "gptq"
        if self.layout not in FORMATS:
            raise UnsupportedError(
                f"{where}: GPTQ layout {self.layout!r} is not read; expected one of "
                f"{', '.join(FORMATS)}. Save it with GPTQModel in one of them first"
            )
        self.group = group_of(settings)
        self.bits = settings.get("bits", settings.get("w_bit"))
        if self.bits not in (2, 3, 4, 8):
            raise FormatError(
                f"{where}: quantization_config bits is {self.bits!r}, expected 2, 3, 4 "
                "or 8"
            )

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        rows, cols = parts["qweight"].shape
        return cols, rows * 32 // self.bits

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`; see `affine`."""
        words, scales = parts["qweight"], parts["scales"]
        rows, cols = words.shape[0] * 32 // self.bits, words.shape[1]
        packed = stream(np.ascontiguousarray(parts["qzeros"].T))
        if len(packed) * 8 < cols * self.bits:
            raise FormatError(
                f"{where}.qzeros: shape {list(parts['qzeros'].shape)} holds fewer than "
                f"{cols} zero-points of {self.bits} bits"
            )
        zeros = codes_of(packed, self.bits, cols).T.astype(np.int32)
        if self.layout == "gptq":
            zeros = zeros + 1
        return affine(
            stream(words),
            np.asarray(scales),
            zeros,
            bits=self.bits,
            matrix=(rows, cols),
            where=where,
            group=self.group,
            index=parts.get("g_idx"),
        )

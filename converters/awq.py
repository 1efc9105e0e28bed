"""AWQ checkpoints in the GEMM layout of AutoAWQ, 4 bits.

Per linear layer: `qweight` int32 `[in, out / 8]` and `qzeros` int32 `[groups, out / 8]`
with eight neighbouring outputs in a word, nibble `p` holding output `ORDER[p]`;
`scales` `[groups, out]`. Input scales are folded into other tensors already.

Reference: AutoAWQ `modules/linear/gemm.py`, `utils/packing_utils.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.affine import affine, group_of
from qjax.converters.words import codes_of, stream
from qjax.errors import UnsupportedError
from qjax.tensor import QuantizedTensor

PARTS = {
    "qweight": ("integer", 2),
    "qzeros": ("integer", 2),
    "scales": ("floating", 2),
}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AWQ:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks, parts, stated = "awq", ("qweight",), PARTS, ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        version = str(settings.get("version", "gemm")).lower()
        bits = settings.get("bits", settings.get("w_bit", 4))
        self.group = group_of(settings)
        if version != "gemm" or bits != 4:
            raise UnsupportedError(
                f"{where}: AWQ version {version!r} with {bits} bits is not read; "
                "expected 'gemm' with 4 bits"
            )

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        rows, words = parts["qweight"].shape
        return words * 8, rows

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`; see `affine`."""
        codes, zeros = _columns(parts["qweight"]), _columns(parts["qzeros"])
        return affine(
            codes,
            np.asarray(parts["scales"]),
            zeros,
            bits=4,
            matrix=codes.shape,
            where=where,
            unpacked=True,
            group=self.group,
        )


def _columns(words: np.ndarray) -> np.ndarray:
    """Codes `[rows, out]` of words `[rows, out / 8]`."""
    nibbles = codes_of(stream(np.ascontiguousarray(words.T)), 4, words.shape[1] * 8).T
    made = np.empty_like(nibbles).reshape(len(words), -1, 8)
    made[..., ORDER] = nibbles.reshape(made.shape)
    return made.reshape(nibbles.shape)

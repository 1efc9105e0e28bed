"""FP-Quant checkpoints (MR-GPTQ): NVFP4 and MXFP4 behind blockwise Hadamard transforms.

`qweight` uint8 `[out, in / 2]`, the first of two E2M1 codes in the low nibble; `scales`
uint8: the bits of E4M3, `[out, in / 16]` (NVFP4), or E8M0, `[out, in / 32]` (MXFP4);
`weight_global_scale`, which divides all scales; `forward_hadamard_matrix` `[h, h]`, by
which blocks of `h` activations are multiplied first. `act_global_scale` and
`backward_hadamard_matrix` are not used: activations stay as they are, and nothing is
trained.

The matrix has to be Sylvester's Hadamard matrix over the square root of `h`, up to its
rounding to 16 bits, or the identity; it is applied exactly, not as rounded.

Reference: transformers `integrations/fp_quant.py`; Egiazarian et al., Bridging the Gap
Between Promise and Performance for Microscaling FP4 Quantization, arXiv 2509.23202.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.converters.activations import Activations
from qjax.converters.floats import fp4
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import MXFP4
from qjax.tensor import QuantizedTensor
from qjax.trellis import Incoherent, sign_bytes
from qjax.wrappers import InputScaled, hadamard

_LARGEST = 1024
"""Rows of a matrix that is compared with Hadamard's."""


class FPQuant:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks = "fp_quant", ("qweight",)
    parts: Mapping[str, tuple[str, int | None]] = {
        "qweight": ("uint8", 2),
        "scales": ("uint8", 2),
        "weight_global_scale": ("floating", None),
        "act_global_scale": ("floating", None),
        "forward_hadamard_matrix": ("floating", 2),
        "backward_hadamard_matrix": ("floating", 2),
    }
    stated = ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        self._kind = settings.get("forward_dtype")
        if self._kind not in (None, "mxfp4", "nvfp4"):
            raise UnsupportedError(
                f"{where}: FP-Quant's forward_dtype {self._kind!r:.100} is not read; "
                "expected mxfp4 or nvfp4"
            )
        if settings.get("pseudoquantization") is True:
            raise UnsupportedError(
                f"{where}: FP-Quant's pseudoquantization holds rounded dense weights "
                "('dqweight'); save the model without it"
            )
        self._activations = Activations(where)

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        rows, half = parts["qweight"].shape
        return rows, half * 2

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, in the transform of its activations."""
        packed, scales = parts["qweight"], parts["scales"]
        with np.errstate(over="ignore", divide="ignore"):
            divisor = np.asarray(parts["weight_global_scale"]).astype(np.float32)
            factor = np.float32(1) / divisor
        if divisor.size != 1 or not 0 < float(factor.reshape(())) < np.inf:
            raise FormatError(
                f"{where}.weight_global_scale: is {divisor.reshape(-1)[:4]}, expected "
                "one positive number"
            )
        nv = scales.shape[1] * 16 == packed.shape[1] * 2
        kind = self._kind or ("nvfp4" if nv else "mxfp4")
        if kind == "nvfp4":
            made = fp4(packed, scales.view(jnp.float8_e4m3fn), divisor, where)
        else:
            made = fp4(packed, scales, None, where)
        if "act_global_scale" in parts or self._kind is not None:
            self._activations.left(made, kind.upper())
        block = _block(parts["forward_hadamard_matrix"], made.matrix[0], where)
        rest = float(factor.reshape(())) if isinstance(made.format, MXFP4) else 1.0
        return _transformed(made, block, rest)


@functools.lru_cache(maxsize=4)
def _sylvester(size: int) -> np.ndarray:
    return np.asarray(hadamard(jnp.eye(size)))


def _transformed(made, block: int, factor: float) -> QuantizedTensor:
    """The transform of the inputs, which takes a factor of MXFP4 along."""
    rows = made.matrix[0]
    factors = np.full(rows, factor, np.float32)
    if block == 1:
        return made if factor == 1 else InputScaled(made, factors)
    signs = np.zeros(sign_bytes(rows), np.uint8)  # all of them +1
    return Incoherent(made, signs if factor == 1 else factors, None, block)


def _block(matrix: np.ndarray, rows: int, where: str) -> int:
    """The size of the Hadamard blocks; 1 for the identity.

    Raises:
      UnsupportedError: it is another matrix.
    """
    size = matrix.shape[0]
    wide = matrix.astype(np.float32)
    name = f"{where}.forward_hadamard_matrix"
    if matrix.shape != (size, size) or size > _LARGEST or rows % size:
        raise FormatError(
            f"{name}: has shape {list(matrix.shape)}, expected [h, h] with h a divisor "
            f"of {rows}, at most {_LARGEST}"
        )
    if np.array_equal(wide, np.eye(size, dtype=np.float32)):
        return 1
    if size & (size - 1) == 0 and np.allclose(wide, _sylvester(size), 2**-8, 0):
        return size
    raise UnsupportedError(
        f"{name}: is neither Sylvester's Hadamard matrix over the root of its size nor "
        "the identity; random and trained transforms are not read"
    )

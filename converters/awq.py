"""AWQ checkpoints of 4 bits, read and written: GEMM, GEMV and GEMV-FAST layouts.

Input scales are folded into other tensors already. Per linear layer:

* `gemm`: `qweight` int32 `[in, out / 8]` and `qzeros` int32 `[groups, out / 8]` with
  eight neighbouring outputs in a word, nibble `p` holding output `ORDER[p]`; `scales`
  `[groups, out]`.
* `gemv`: `qweight` int32 `[out, in / 8]` and `qzeros` int32 `[out, words]`, nibbles in
  order; `scales` `[out, 8 words]`. Groups beyond `in` are padding.
* `gemv_fast`, `llm-awq`: `qweight` int16 `[out / 4, in]`: tiles of 4 outputs and 64
  inputs, in each output runs of 32 inputs in the order of `_fast`; `scales
  [groups, out]`; `qzeros` or `scaled_zeros` like them: `-zero * scale`, in half.

Reference: AutoAWQ `modules/linear/{gemm,gemv,gemv_fast}.py`,
`utils/packing_utils.py`; llm-awq `quantize/qmodule.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.converters.affine import affine, group_of, integers, zero_of_bias
from qjax.converters.checks import finite
from qjax.converters.gptq import check_integers
from qjax.converters.halves import halves
from qjax.converters.words import codes_of, copied, stream, transposed, words_of
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import Int
from qjax.tensor import QuantizedTensor

PARTS = {
    "qweight": ("integer", 2),  # int32, int16 in GEMV-FAST
    "qzeros": ("any", 2),
    "scaled_zeros": ("floating", 2),
    "scales": ("floating", 2),
}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")


class AWQ:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks, parts, stated = "awq", ("qweight",), PARTS, ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        self.version = str(settings.get("version", "gemm")).lower()
        bits = settings.get("bits", settings.get("w_bit", 4))
        self.group = group_of(settings)
        if self.version not in VERSIONS or bits != 4:
            raise UnsupportedError(
                f"{where}: AWQ version {self.version!r:.100} with {bits!r:.100} bits "
                f"is not read; expected 4 bits in one of {', '.join(VERSIONS)}"
            )

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        rows, cols = parts["qweight"].shape
        if self.version == "gemm":
            return cols * 8, rows
        return (rows, cols * 8) if self.version == "gemv" else (rows * 4, cols)

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`; see `affine`."""
        cols, rows = self.shape(parts)
        scales = np.asarray(parts["scales"])
        packed = ("qweight", "qzeros") if self.version in ("gemm", "gemv") else ()
        for part in packed:
            if parts[part].dtype != np.int32:
                raise FormatError(
                    f"{where}.{part}: is {parts[part].dtype}, expected int32"
                )
        if self.version == "gemm":
            data = _rows(parts["qweight"].view(np.uint32))
            zeros = _columns(parts["qzeros"])
        elif self.version == "gemv":
            data = stream(transposed(parts["qweight"]))
            words = parts["qzeros"]
            zeros = codes_of(stream(words.T), 4, words.shape[1] * 8)
            scales = np.ascontiguousarray(scales.T)
        else:
            data = _fast(parts["qweight"], where)
            zeros = _unscaled(parts, scales, where)
        if self.version != "gemm":
            groups = -(-rows // (self.group or rows))
            scales, zeros = scales[:groups], zeros[:groups]
        return affine(
            data,
            scales,
            zeros,
            bits=4,
            matrix=(rows, cols),
            where=where,
            group=self.group,
        )


@jax.jit
def _rows(words):
    """Codes of words `[in, out / 8]`, two rows to a byte, `[ceil(in / 2), out]`."""
    rows, width = words.shape
    pairs = jnp.pad(words, [(0, rows % 2), (0, 0)]).reshape(-1, 2, width)
    fields = []
    for place in np.argsort(ORDER):
        nibbles = (pairs >> jnp.uint32(4 * place)) & jnp.uint32(15)
        fields.append(nibbles[:, 0] | (nibbles[:, 1] << jnp.uint32(4)))
    made = jnp.stack(fields, -1).astype(jnp.uint8)
    return made.reshape(-1, width * 8)


def _columns(words: np.ndarray) -> np.ndarray:
    """Codes `[rows, out]` of words `[rows, out / 8]`."""
    nibbles = codes_of(stream(np.ascontiguousarray(words.T)), 4, words.shape[1] * 8).T
    made = np.empty_like(nibbles).reshape(len(words), -1, 8)
    made[..., ORDER] = nibbles.reshape(made.shape)
    return made.reshape(nibbles.shape)


def _fast(words: np.ndarray, where: str) -> np.ndarray:
    """Packed codes `[in / 2, out]` of the GEMV-FAST layout.

    Nibble `a` of the low half of word `b` of a run is input `8 a + 2 b`, and that of
    the high half the one behind it: nibbles of both halves make up packed bytes.
    """
    slabs, rows = words.shape
    if words.dtype.itemsize != 2 or rows % 64:
        raise FormatError(
            f"{where}.qweight: is {words.dtype} {list(words.shape)}, expected int16 "
            "[out / 4, in] with in a multiple of 64"
        )
    # tile, output, run, word, nibble
    fields = halves(words).reshape(slabs, rows // 64, 4, 2, 4, 4)
    return copied(fields.transpose(1, 3, 5, 4, 0, 2)).reshape(rows // 2, slabs * 4)


def _unscaled(parts, scales: np.ndarray, where: str) -> np.ndarray:
    """Zero-points of `-zero * scale`: whole numbers wherever these give that."""
    name = "qzeros" if "qzeros" in parts else "scaled_zeros"
    shift = parts[name]
    if shift.shape != scales.shape or not jnp.issubdtype(shift.dtype, jnp.floating):
        raise FormatError(
            f"{where}.{name}: is {shift.dtype} {list(shift.shape)}, expected floats "
            f"{list(scales.shape)} as the scales"
        )
    finite(scales, f"{where}.scales")
    finite(shift, f"{where}.{name}")
    zero = zero_of_bias(scales, shift)
    whole = np.rint(zero)
    same = (-whole * scales.astype(np.float32)).astype(shift.dtype) == shift
    return np.where(same, whole, zero)


class AWQWriter:
    """Writes the layers of one checkpoint; see `qjax.converters.gptq.GPTQWriter`."""

    kind = "awq"
    fallback = Int(4, 128, symmetric=False, scale_dtype="float16", zero_dtype="uint8")

    def __init__(self):
        self._groups: set[int] = set()
        self._whole: set[int] = set()

    def write(self, q: QuantizedTensor, where: str) -> dict[str, np.ndarray]:
        """`qweight`, `qzeros` and `scales` of a weight, in the GEMM layout.

        Raises:
          UnsupportedError: the layout does not hold it exactly.
        """
        x = integers(q, where)
        rows, cols = x.codes.shape
        check_integers(x, (4,), 0, where)
        if x.index is not None or cols % 8:
            raise UnsupportedError(
                f"{where}: AWQ holds groups of neighbouring inputs and multiples of 8 "
                f"outputs; got {cols} outputs"
                + ("" if x.index is None else " and groups out of order")
            )
        (self._groups if x.group < rows else self._whole).add(x.group)
        # One scale per output is also one group of all inputs.
        if len(self._groups | (self._whole if self._groups else set())) > 1:
            sizes = ", ".join(map(str, sorted(self._groups | self._whole)))
            raise UnsupportedError(
                f"{where}: has groups of {x.group}, which makes groups of {sizes} in "
                "all; AWQ has one group size for all layers"
            )
        return {
            "qweight": _words(x.codes),
            "qzeros": _words(x.zero.astype(np.uint8)),
            "scales": np.ascontiguousarray(x.scale),
        }

    def settings(self, kept: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of the layers written so far."""
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": next(iter(self._groups), -1),
            "zero_point": True,
            "modules_to_not_convert": list(kept) or None,
        }


def _words(codes: np.ndarray) -> np.ndarray:
    """int32 words `[rows, out / 8]` of codes `[rows, out]`."""
    placed = codes.reshape(len(codes), -1, 8)[..., ORDER].reshape(codes.shape)
    return np.ascontiguousarray(words_of(np.ascontiguousarray(placed.T), 4).T)

"""GPTQ checkpoints, read and written: v1, v2, planar and Marlin layouts.

Per linear layer: `qweight` int32 `[in * bits / 32, out]`, a bit string along `in`;
`qzeros` int32 `[groups, out * bits / 32]`, one along `out`; `scales` `[groups, out]`;
`g_idx` int32 `[in]`, the group of each input, which is out of order with `desc_act`.

* v1 (`gptq`) stores zero-points minus one, v2 (`gptq_v2`) as they are; 2, 3, 4, 8 bits.
* Planar (`gptq_p`): 2 to 8 bits, zero-points as in v2. 32 codes of 3, 5, 6 or 7 bits
  are cut into fields of 4, 2 and 1 bits (3 = 2 + 1, 7 = 4 + 2 + 1), low bits in the
  widest; the words of each field follow one another, a bit string each.
* Marlin (`marlin`): 4 bits without zero-points. `B` int32 `[in / 16, 2 out]` and
  `s [groups, out]`, permuted for tensor cores (see `qjax.converters.marlin`).

A word of zero-points in v1 that is all ones stands for a zero-point of -1: AutoGPTQ
wrote 0 - 1 over its neighbours, which are lost. Such layers are read, with a warning.

Reference: AutoGPTQ `nn_modules/qlinear/qlinear_cuda.py`; GPTQModel
`nn_modules/qlinear/__init__.py`, `docs/gptq_planar.md`; Marlin `marlin/__init__.py`.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.converters.affine import Integers, affine, group_of, integers
from qjax.converters.marlin import marlin_codes, marlin_scales
from qjax.converters.overrides import Overrides, layer_name, usual
from qjax.converters.words import codes_of, planar, stream, words_of
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import Int
from qjax.tensor import QuantizedTensor

_log = logging.getLogger(__name__)

PARTS = {
    "qweight": ("int32", 2),
    "qzeros": ("int32", 2),
    "scales": ("floating", 2),
    "g_idx": ("integer", 1),
    "B": ("int32", 2),
    "s": ("floating", 2),
    "workspace": ("integer", 1),
}
WIDTHS = {
    "gptq": (2, 3, 4, 5, 6, 7, 8),  # 5, 6 and 7 by AutoRound only
    "gptq_v2": (2, 3, 4, 5, 6, 7, 8),
    "gptq_p": (2, 3, 4, 5, 6, 7, 8),
    "marlin": (4,),
}


class GPTQ:
    """Reads the layers of one checkpoint.

    Args:
      settings: `quantization_config`.
      where: what errors call the checkpoint.

    Raises:
      UnsupportedError: a layout that is not read.
      FormatError: `bits` is missing or not a width.
    """

    kind, marks, parts, stated = "gptq", ("qweight", "B"), PARTS, ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if settings.get("is_marlin_format") is True:
            layout = "marlin"
        if not isinstance(layout, str) or layout not in WIDTHS:
            raise UnsupportedError(
                f"{where}: GPTQ layout {layout!r} is not read; expected one of "
                f"{', '.join(WIDTHS)}. Save it with GPTQModel in one of them first"
            )
        if settings.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise UnsupportedError(
                f"{where}: GPTQ words of {settings['pack_dtype']!r} are not read; "
                "expected int32"
            )
        self.layout = layout
        self._inferred = settings.get("inferred") is True
        self._overrides = Overrides.of_gptq(settings, where)
        self._check_bits(self._overrides.whole, where)
        old = layout == "gptq" and settings.get("sym") is False
        if old and "gptqmodel" not in str(settings.get("meta")).lower():
            _log.warning(
                "%s: asymmetric weights in GPTQ's first layout, not written by "
                "GPTQModel; files of some old tools have wrong zero-points",
                where,
            )

    def _check_bits(self, settings: Mapping[str, Any], where: str) -> int:
        bits = settings.get("bits", settings.get("w_bit"))
        if type(bits) is not int or bits not in WIDTHS[self.layout]:
            *most, last = map(str, WIDTHS[self.layout])
            expected = f"{', '.join(most)} or {last}" if most else last
            raise FormatError(
                f"{where}: quantization_config bits is {bits!r}, expected {expected}"
            )
        return bits

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        if "B" in parts:
            rows, words = parts["B"].shape
            return words // 2, rows * 16
        rows, cols = parts["qweight"].shape
        bits = parts["qzeros"].shape[1] * 32 // cols  # layers differ in width
        return cols, rows * 32 // max(bits, 1)

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`; see `affine`."""
        settings = self._overrides.of(layer_name(where))
        if "B" in parts:
            return _marlin(parts, group_of(settings), where)
        bits = self._check_bits(settings, where)
        words, scales = parts["qweight"], parts["scales"]
        rows, cols = words.shape[0] * 32 // bits, words.shape[1]
        if parts["qzeros"].shape[1] != -(-cols * bits // 32):
            raise FormatError(
                f"{where}.qzeros: shape {list(parts['qzeros'].shape)} holds fewer than "
                f"{cols} zero-points of {bits} bits, or more"
            )
        planes = bool(self.layout == "gptq_p" and 8 % bits)
        if planes and (words.shape[0] % bits or cols % 32):
            raise FormatError(
                f"{where}.qweight: shape {list(words.shape)} holds no whole blocks of "
                f"32 codes of {bits} bits along both axes, as the layout gptq_p has"
            )
        zeros = np.ascontiguousarray(parts["qzeros"].T)
        if self.layout == "gptq" and (zeros == -1).any():
            _log.warning(
                "%s.qzeros: holds words of -1, as old AutoGPTQ wrote for a zero-point "
                "of 0, over its neighbours; the weights of these columns are wrong",
                where,
            )
        data, zeros = (planar(x, bits) if planes else stream(x) for x in (words, zeros))
        zeros = codes_of(zeros, bits, cols, "planes" if planes else "string")
        zeros = zeros.T.astype(np.int32) + self._shift(zeros, bits, where)
        return affine(
            data,
            np.asarray(scales),
            zeros,
            bits=bits,
            matrix=(rows, cols),
            where=where,
            group=group_of(settings),
            index=parts.get("g_idx"),
            planes=planes,
        )

    def _shift(self, zeros: np.ndarray, bits: int, where: str) -> int:
        """What stored zero-points lack; guessed where nothing says the layout."""
        if not self._inferred or (zeros == 2 ** (bits - 1) - 1).all():
            return int(self.layout == "gptq")
        if (zeros == 2 ** (bits - 1)).all():
            return 0
        _log.warning(
            "%s: nothing says whether zero-points are stored minus one; assuming "
            "GPTQ's first layout, in which they are",
            where,
        )
        return 1


def _marlin(parts, group: int | None, where: str) -> QuantizedTensor:
    codes = marlin_codes(parts["B"], where)
    scales = marlin_scales(parts["s"], where)
    matrix = len(codes) * 2, codes.shape[1]
    return affine(codes, scales, None, bits=4, matrix=matrix, where=where, group=group)


class GPTQWriter:
    """Writes the layers of one checkpoint; see `qjax.converters.packed_write.Writer`.

    Args:
      layout: `gptq` or `gptq_v2`.
    """

    kind = "gptq"
    fallback = Int(4, 128, scale_dtype="float16")

    def __init__(self, layout: str = "gptq"):
        self.layout = layout
        self._facts: dict[str, tuple[int, int, bool, bool]] = {}

    def write(self, q: QuantizedTensor, where: str) -> dict[str, np.ndarray]:
        """`qweight`, `qzeros`, `scales` and `g_idx` of a weight.

        Raises:
          UnsupportedError: the layout does not hold it exactly.
        """
        x = integers(q, where)
        rows, cols = x.codes.shape
        shift = int(self.layout == "gptq")
        check_integers(x, (2, 3, 4, 8), shift, where)
        if rows * x.bits % 32 or cols * x.bits % 32:
            raise UnsupportedError(
                f"{where}: [in={rows}, out={cols}] with {x.bits} bits does not fill "
                "whole 32-bit words, as GPTQ needs"
            )
        index = x.index
        trivial = np.arange(rows, dtype=np.int32) // x.group
        group = -1 if x.group >= rows else x.group
        self._facts[layer_name(where)] = x.bits, group, x.symmetric, index is not None
        zeros = (x.zero - shift).astype(np.uint8)
        return {
            "qweight": words_of(x.codes, x.bits),
            "qzeros": np.ascontiguousarray(
                words_of(np.ascontiguousarray(zeros.T), x.bits).T
            ),
            "scales": np.ascontiguousarray(x.scale),
            "g_idx": trivial if index is None else index,
        }

    def settings(self, kept: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of the layers written so far."""
        facts = list(self._facts.values())
        common = usual(facts)
        dynamic: dict[str, Any] = {
            f"+:^{re.escape(name)}$": _override(own)
            for name, own in self._facts.items()
            if own[:2] != common[:2]
        }
        dynamic |= {f"-:^{re.escape(name)}$": {} for name in kept}
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.layout,
            "bits": common[0],
            "group_size": common[1],
            "sym": all(symmetric for _, _, symmetric, _ in facts),
            "desc_act": any(ordered for _, _, _, ordered in facts),
            "lm_head": "lm_head" in self._facts,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }


def _override(facts: tuple[int, int, bool, bool]) -> dict[str, Any]:
    return {"bits": facts[0], "group_size": facts[1], "sym": facts[2]}


def check_integers(x: Integers, widths: Sequence[int], lowest: int, where: str) -> None:
    """Refuses what GPTQ and AWQ cannot hold exactly.

    Args:
      x: the weight.
      widths: code widths of the layout.
      lowest: smallest zero-point; the largest is `2**bits - 1 + lowest`.
      where: what errors call it.

    Raises:
      UnsupportedError: other widths, zero-points or scales.
    """
    if x.bits not in widths:
        raise UnsupportedError(
            f"{where}: has {x.bits} bits; this layout holds "
            f"{', '.join(map(str, widths))}"
        )
    if x.scale.dtype.name not in ("float16", "bfloat16"):
        raise UnsupportedError(
            f"{where}: has scales of {x.scale.dtype}; this layout holds float16 and "
            "bfloat16"
        )
    top = 2**x.bits - 1 + lowest
    whole = x.zero.dtype == np.int32
    if not whole or int(x.zero.min()) < lowest or int(x.zero.max()) > top:
        raise UnsupportedError(
            f"{where}: has zero-points from {x.zero.min():g} to {x.zero.max():g}; this "
            f"layout holds whole numbers from {lowest} to {top}"
        )

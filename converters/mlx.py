"""MLX checkpoints, read and written: integers of 1 to 8 bits, MXFP4, MXFP8 and NVFP4.

`weight` uint32 `[out, in * bits / 32]` is a little-endian bit string of codes along
`in`; `scales` `[out, groups]` and, for integers, `biases` like them.

* `affine`: `code * scale + bias`, 1, 2, 3, 4, 5, 6 or 8 bits, groups of 32, 64 or 128.
* `mxfp4`, `mxfp8`: E2M1 or E4M3 codes, E8M0 scales of 32 inputs as uint8.
* `nvfp4`: E2M1 codes, E4M3 scales of 16 inputs as uint8.

config.json says `group_size`, `bits` and `mode` under `quantization`. What it says
under a layer's name stands alone: 4 bits in groups of 64 where that leaves something
out. Of layers without an entry, what differs is seen from the model's shape, as mlx-lm
does. Embeddings are quantized as linear layers are.

Reference: MLX 0.32 `mlx.core.quantize`, `nn.quantize`; mlx-lm 0.32 `utils.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from qjax.converters.affine import integers
from qjax.converters.biases import affine_of_bias, bias_of_zero
from qjax.converters.overrides import layer_name, usual
from qjax.converters.words import transposed, words_of
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import MXFP4, MXFP8, NVFP4, Int
from qjax.formats.base import FLOAT_SCALES
from qjax.tensor import MinifloatTensor, QuantizedTensor

PARTS = {
    "weight": ("uint32", 2),
    "scales": ("any", 2),
    "biases": ("floating", 2),
    "expected_shape": ("integer", 1),
}
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
USUAL = {"bits": 4, "group_size": 64}
FLOATS: dict[str, Any] = {"mxfp4": MXFP4(), "mxfp8": MXFP8(), "nvfp4": NVFP4()}


class MLX:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`.

    Args:
      settings: `quantization` of config.json.
      where: what errors call the checkpoint.
    """

    kind, marks, parts, stated = "mlx", ("scales",), PARTS, ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        self._where = where
        whole = {k: USUAL.get(k) if v is None else v for k, v in settings.items()}
        self._usual = self._kind(whole)
        self._own = {
            name: self._kind(USUAL | {k: v for k, v in value.items() if v is not None})
            for name, value in settings.items()
            if isinstance(value, Mapping)
        }

    def _kind(self, said: Mapping[str, Any]) -> tuple[str, int, int] | None:
        """Mode, bits and group; None where the settings do not say them."""
        mode = said.get("mode", "affine")
        if isinstance(mode, str) and mode in FLOATS:
            fmt = FLOATS[mode]
            return mode, fmt.code_bits, fmt.group_size
        bits, group = said.get("bits"), said.get("group_size")
        if mode != "affine" or bits not in (None, *WIDTHS):
            raise UnsupportedError(
                f"{self._where}: mode {mode!r:.100} with {bits!r:.100} bits is not "
                f"read; expected affine with one of {', '.join(map(str, WIDTHS))}, or "
                f"{', '.join(FLOATS)}"
            )
        if not isinstance(bits, int) or not isinstance(group, int) or group < 1:
            return None
        return mode, bits, group

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`.

        Raises:
          FormatError: nothing says the width of codes.
        """
        cols, words = parts["weight"].shape
        rate, rest = divmod(words * 32, parts["scales"].shape[1])
        kinds = (self._usual, *self._own.values(), _floats(parts))
        found = [kind for kind in (self._told(parts), *kinds) if kind is not None]
        sizes = [words * 32 // bits for _, bits, group in found if bits * group == rate]
        if "expected_shape" in parts:
            wanted = [int(size) for size in parts["expected_shape"][1:]]
            sizes = wanted if set(wanted) & set(sizes) else sizes
        if rest or not sizes:
            raise FormatError(
                f"{self._where}: weight {list(parts['weight'].shape)} and scales "
                f"{list(parts['scales'].shape)} fit no bits and group_size that "
                "config.json says under quantization"
            )
        return cols, sizes[0]

    def _told(self, parts: Mapping[str, Any]) -> tuple[str, int, int] | None:
        """What integers a layer is that is not as most are, by the model's shape."""
        if "biases" not in parts or len(parts.get("expected_shape", ())) != 2:
            return None
        rows = int(parts["expected_shape"][1])
        groups, total = parts["scales"].shape[1], parts["weight"].shape[1] * 32
        if self._usual and self._usual[1] * self._usual[2] * groups == total:
            return None
        if rows < 1 or rows % groups or total % rows or total // rows not in WIDTHS:
            return None
        return "affine", total // rows, rows // groups

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, packed."""
        own = self._own.get(layer_name(where))
        kind = _floats(parts) or own or self._told(parts) or self._usual
        words, scales = parts["weight"], parts["scales"]
        if kind is None:
            raise FormatError(f"{where}: config.json does not say bits and group_size")
        mode, bits, group = kind
        cols, rows = len(words), scales.shape[1] * group
        if words.shape[1] * 32 != rows * bits or len(scales) != cols:
            raise FormatError(
                f"{where}: weight {list(words.shape)} and scales {list(scales.shape)}, "
                f"which are no {mode} layer of {bits} bits in groups of {group}"
            )
        little = np.ascontiguousarray(words).astype("<u4", copy=False)
        codes = transposed(little.view(np.uint8))
        scale = np.ascontiguousarray(scales.T)
        if mode in FLOATS and (scale.dtype != np.uint8 or "biases" in parts):
            raise FormatError(
                f"{where}: scales of {scale.dtype} for {mode}, expected uint8 and no "
                "biases"
            )
        if mode in FLOATS:
            return _minifloats(codes, scale, FLOATS[mode], (rows, cols))
        bias = parts["biases"]
        if bias.shape != scales.shape or scales.dtype.name not in FLOAT_SCALES:
            raise FormatError(
                f"{where}: scales {scales.dtype} {list(scales.shape)} and biases "
                f"{list(bias.shape)}, expected floats of one shape"
            )
        return affine_of_bias(
            codes,
            scale,
            np.ascontiguousarray(bias.T),
            bits=bits,
            matrix=(rows, cols),
            where=where,
            group=group,
        )


def _floats(parts: Mapping[str, Any]) -> tuple[str, int, int] | None:
    """The mode of a layer of small floats, which its shapes alone show."""
    scales = parts["scales"]
    if "biases" in parts or np.dtype(scales.dtype) != np.uint8:
        return None
    for mode, fmt in FLOATS.items():
        rate = fmt.code_bits * fmt.group_size
        if parts["weight"].shape[1] * 32 == rate * scales.shape[1]:
            return mode, fmt.code_bits, fmt.group_size
    return None


def _minifloats(codes, scale, fmt, matrix) -> MinifloatTensor:
    if fmt.code_bits == 8:
        codes = codes.view(ml_dtypes.float8_e4m3fn)
    whole = None
    if isinstance(fmt, NVFP4):
        scale = scale.view(ml_dtypes.float8_e4m3fn)
        whole = np.ones((1, 1), np.float32)
    return MinifloatTensor(codes, scale, whole, fmt, matrix, "bfloat16")


class MLXWriter:
    """Writes the layers of one checkpoint; see `qjax.converters.gptq.GPTQWriter`.

    Biases that scales of 16 bits cannot have exactly make scales and biases float32.
    What `settings` gives belongs under `quantization` and `quantization_config`.
    """

    kind = "mlx"
    fallback = Int(4, 64, scale_dtype="bfloat16")

    def __init__(self):
        self._facts: dict[str, tuple[str, int, int]] = {}

    def write(self, q: QuantizedTensor, where: str) -> dict[str, np.ndarray]:
        """`weight`, `scales` and, of integers, `biases`.

        Raises:
          UnsupportedError: MLX does not hold it exactly.
        """
        if isinstance(q, MinifloatTensor):
            facts, made = _write_floats(q, where)
        else:
            facts, made = _write_integers(q, where)
        self._facts[layer_name(where)] = facts
        return made

    def settings(self, kept: Sequence[str]) -> dict[str, Any]:
        """`quantization` of config.json, of the layers written so far."""
        common = usual(self._facts.values())
        return {
            **_settings(common),
            **{
                name: _settings(own)
                for name, own in self._facts.items()
                if own != common
            },
            **dict.fromkeys(kept, False),
        }


def _settings(facts: tuple[str, int, int]) -> dict[str, Any]:
    mode, bits, group = facts
    return {"group_size": group, "bits": bits, "mode": mode}


def _write_integers(q: QuantizedTensor, where: str):
    x = integers(q, where)
    rows = len(x.codes)
    fits = x.bits in WIDTHS and x.group in GROUPS and rows % x.group == 0
    if not fits or x.index is not None or x.scale.dtype.name not in FLOAT_SCALES:
        raise UnsupportedError(
            f"{where}: has {x.bits} bits in groups of {x.group} over {rows} inputs, "
            f"scales of {x.scale.dtype}; MLX holds {', '.join(map(str, WIDTHS))} bits "
            f"in groups of {', '.join(map(str, GROUPS))} that divide, in order"
        )
    scale, zero = x.scale, x.zero.astype(np.float32)
    bias = bias_of_zero(scale, zero)
    if bias is None:
        scale = scale.astype(np.float32)
        bias = bias_of_zero(scale, zero)
    if bias is None:
        raise UnsupportedError(
            f"{where}: has zero-points that are no quotients of float32 biases and "
            "scales, as MLX stores them"
        )
    made = {
        "weight": transposed(words_of(x.codes, x.bits)).view(np.uint32),
        "scales": np.ascontiguousarray(scale.T),
        "biases": np.ascontiguousarray(bias.T),
    }
    return ("affine", x.bits, x.group), made


def _write_floats(q: MinifloatTensor, where: str):
    mode = next((name for name, fmt in FLOATS.items() if fmt == q.format), None)
    whole = q.global_scale
    single = whole is None or bool(np.all(np.asarray(whole) == 1))
    if mode is None or not single or q.matrix[0] % 32:
        raise UnsupportedError(
            f"{where}: is {q!r}; MLX holds MXFP4, MXFP8 of E4M3, and NVFP4 without a "
            "scale of the whole weight, for multiples of 32 inputs"
        )
    codes, scale = np.asarray(q.codes), np.asarray(q.scale)
    made = {
        "weight": transposed(codes.view(np.uint8)).view("<u4").astype(np.uint32),
        "scales": transposed(scale.view(np.uint8)),
    }
    return (mode, q.format.code_bits, FLOATS[mode].group_size), made

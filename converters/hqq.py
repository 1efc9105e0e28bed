"""HQQ checkpoints, read and written: 1 to 6 and 8 bits, groups along either axis.

The weight `[out, in]` is cut, in row-major order, into a matrix whose rows (axis 1,
`[groups, group]`) or columns (axis 0, `[group, groups]`) share a scale and a real
zero-point: `w = (code - zero) * scale`. Groups of axis 1 are neighbouring inputs;
those of axis 0 every `out / group`-th output of one input.

`W_q` packs this matrix along its rows, cut into as many equal runs as a word has codes;
the first run lies in the highest bits: `4bit_u8` (2 runs), `2bit_u8` (4), `1bit_u8` (8)
and `8bit_u8` (also for 5 and 6 bits) in bytes, `3bit_32` (10 runs, rows padded) in
int32. `view_as_float` reinterprets the words as floats. `scale` and `zero` have one
value per group. `nbits`, `axis` and `group_size` are numbers, `shape` is int64 `[2]`;
booleans, and the text of `packing`, `compute_dtype` and `unpack_view_dtype`, are uint8.

Reference: hqq 0.2.8 `core/quantize.py`, `core/bitpack.py`, `core/utils.py`.
"""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.converters.affine import Integers, affine, integers
from qjax.converters.hqq_parts import (
    DTYPES,
    PACKINGS,
    USUAL,
    compute_dtype,
    number,
    packed,
    statistic,
)
from qjax.converters.overrides import layer_name
from qjax.converters.runs import run_words
from qjax.converters.words import transposed
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import Int
from qjax.tensor import QuantizedTensor
from qjax.wrappers import Transposed

_OWN = {
    "scale": ("floating", None),
    "zero": ("floating", None),
    "nbits": ("any", None),
    "axis": ("integer", None),
    "shape": ("integer", 1),
    "packing": ("integer", 1),
    "compute_dtype": ("integer", 1),
    "unpack_view_dtype": ("integer", 1),
    "group_size": ("integer", None),
    "view_as_float": ("any", None),
}
PARTS = {
    "W_q": ("any", 2),
    **_OWN,
    **dict.fromkeys(("channel_wise", "optimize", "round_zero"), ("any", None)),
    **dict.fromkeys(("quant_scale", "quant_zero", "offload_meta"), ("any", None)),
    **dict.fromkeys(("encoded_state_dict", "stores_quant_config"), ("any", None)),
    **dict.fromkeys(("scale_q", "zero_q"), ("any", 2)),
    "zero_scale": ("any", 3),
    **{f"meta_scale.{name}": rule for name, rule in _OWN.items()},
    **{f"meta_zero.{name}": rule for name, rule in _OWN.items()},
}


class HQQ:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks, parts, stated = "hqq", ("W_q",), PARTS, ("shape",)

    def __init__(self, settings: Mapping[str, Any], where: str):
        del settings, where  # every layer says what it is

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        cols, rows = (int(size) for size in parts["shape"])
        return cols, rows

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`; `Transposed` with groups along the outputs."""
        stored = packed(parts["W_q"], parts, where)
        scale, zero = (statistic(parts, name, where) for name in ("scale", "zero"))
        axis = number(parts, "axis", where)
        groups = stored.shape[1 - int(axis)] if axis in (0, 1) else 0
        if not groups or {scale.size, zero.size} - {1, groups}:
            raise FormatError(
                f"{where}: {scale.size} scales and {zero.size} zero-points for codes "
                f"{list(stored.shape)} along axis {axis:g}, expected axis 0 or 1 and "
                "one for each row (1) or column (0)"
            )
        cols, rows = self.shape(parts)
        along, length = ("out", cols) if axis == 0 else ("in", rows)
        group, form = stored.shape[int(axis)], (1, 1)
        if scale.size == zero.size == 1:  # one for the whole weight
            group = length
        elif length % group:
            raise UnsupportedError(
                f"{where}: groups of {group} do not divide {along}={length}, so that "
                "they are no groups along it; quantize it again with a group_size "
                "that divides it"
            )
        else:
            count = length // group
            form = (count, rows) if along == "out" else (cols, count)

        def placed(flat: np.ndarray) -> np.ndarray:
            leaf = np.broadcast_to(flat.reshape(-1), math.prod(form)).reshape(form)
            return np.ascontiguousarray(leaf if along == "out" else leaf.T)

        matrix, index, planes = (rows, cols), None, along == "in"
        if planes:
            codes = stored.columns(matrix)
        else:
            matrix, index = (cols, rows), np.arange(cols) % (cols // group)
            codes = stored.codes().reshape(matrix)
        made = affine(
            codes,
            placed(scale),
            placed(zero).astype(np.float32),
            bits=stored.bits,
            matrix=matrix,
            where=where,
            group=group,
            index=index,
            unpacked=not planes,
            planes=planes,
            dtype=compute_dtype(parts, scale.dtype.name, where),
        )
        return Transposed(made) if along == "out" else made


class HQQWriter:
    """Writes the layers of one checkpoint; see `qjax.converters.gptq.GPTQWriter`."""

    kind = "hqq"
    fallback = Int(4, 64, symmetric=False, scale_dtype="float16", zero_dtype="float16")

    def __init__(self):
        self._facts: dict[str, tuple[int, int, int]] = {}

    def write(self, q: QuantizedTensor, where: str) -> dict[str, np.ndarray]:
        """`W_q`, `scale`, `zero` and what describes them.

        Raises:
          UnsupportedError: HQQ does not hold it exactly.
        """
        axis = 0 if isinstance(q, Transposed) else 1
        x = integers(q.base if isinstance(q, Transposed) else q, where)
        scale, zero = _statistics(x, axis, where)
        natural = x.codes if axis == 0 else transposed(x.codes)
        form = (x.group, -1) if axis == 0 else (-1, x.group)
        matrix, packing = natural.reshape(form), USUAL[x.bits]
        word, _, places = PACKINGS[packing]
        if packing != "3bit_32" and len(matrix) % len(places):
            raise UnsupportedError(
                f"{where}: {len(matrix)} rows of codes; {packing} of HQQ holds "
                f"multiples of {len(places)}"
            )
        self._facts[layer_name(where)] = x.bits, x.group, axis
        flags = {"view_as_float": 0, "quant_scale": 0, "quant_zero": 0}
        flags |= {"offload_meta": 0, "encoded_state_dict": 1, "stores_quant_config": 1}
        flags |= {"channel_wise": 1, "optimize": 1, "round_zero": int(x.bits == 4)}
        numbers = {"nbits": x.bits, "group_size": x.group, "axis": axis}
        texts = {"packing": packing, "compute_dtype": f"torch.{scale.dtype}"}
        texts["unpack_view_dtype"] = f"torch.{np.dtype(word)}"
        return {
            "W_q": run_words(matrix, places, word),
            "scale": scale,
            "zero": zero,
            "shape": np.array(natural.shape, np.int64),
            **{name: np.array(n, np.int32) for name, n in numbers.items()},
            **{name: np.array(n, np.uint8) for name, n in flags.items()},
            **{name: np.frombuffer(t.encode(), np.uint8) for name, t in texts.items()},
        }

    def settings(self, kept: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of the layers written so far.

        Raises:
          UnsupportedError: HQQ names layers without their number; those of one name are
            quantized, or they are not.
        """
        tags = collections.defaultdict(collections.Counter)
        for name, facts in self._facts.items():
            tags[_tag(name)][facts] += 1
        skipped = sorted({_tag(name) for name in kept})
        if both := sorted(set(skipped) & set(tags)):
            raise UnsupportedError(
                f"{both[0]}: some layers of this name are quantized and some are not, "
                "which HQQ's settings cannot say"
            )
        own = {tag: _config(*c.most_common(1)[0][0]) for tag, c in tags.items()}
        first = next(iter(own.values()))
        same = all(config == first for config in own.values())
        return {
            "quant_method": "hqq",
            "quant_config": first if same else own,
            "skip_modules": skipped,
        }


def _statistics(x: Integers, axis: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero-points in HQQ's order, or a refusal of what it does not hold."""
    length = len(x.codes)
    order = np.arange(length) % (length // x.group)
    index = np.arange(length) // x.group if x.index is None else x.index
    if x.bits not in USUAL or length % x.group or x.scale.dtype.name not in DTYPES:
        raise UnsupportedError(
            f"{where}: has {x.bits} bits in groups of {x.group} over {length} with "
            f"scales of {x.scale.dtype}; HQQ holds "
            f"{', '.join(map(str, sorted(USUAL)))} bits, groups that divide and scales "
            f"of {', '.join(DTYPES)}"
        )
    if not np.array_equal(index, order if axis == 0 else np.arange(length) // x.group):
        raise UnsupportedError(
            f"{where}: has groups in an order that HQQ does not hold"
        )
    zero = x.zero.astype(x.scale.dtype)
    if not np.array_equal(zero.astype(np.float32), x.zero):
        raise UnsupportedError(
            f"{where}: its zero-points do not fit {x.scale.dtype}, the dtype of its "
            "scales, as HQQ needs"
        )
    form = (1, -1) if axis == 0 else (-1, 1)
    scale, zero = (a if axis == 0 else a.T for a in (x.scale, zero))
    return (
        np.ascontiguousarray(scale).reshape(form),
        np.ascontiguousarray(zero).reshape(form),
    )


def _tag(name: str) -> str:
    """A layer's name without `model`, `layers` and numbers, as HQQ's settings have."""
    parts = name.split(".")
    return ".".join(
        part for part in parts if part not in ("model", "layers") and not part.isdigit()
    )


def _config(bits: int, group: int, axis: int) -> dict[str, Any]:
    return {
        "weight_quant_params": {
            "nbits": bits,
            "channel_wise": True,
            "group_size": group,
            "optimize": True,
            "round_zero": bits == 4,
            "axis": axis,
            "view_as_float": False,
        },
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }

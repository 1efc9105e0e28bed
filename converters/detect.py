"""How a checkpoint is quantized: what it says, and what its tensors look like.

`stated` looks into config.json and the side files of older tools. `guess` goes by the
names, dtypes and shapes of the tensors of one layer, for layers that the settings do
not explain: their format then comes from the tensors alone.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.converters.huggingface import SETTINGS, Checkpoint
from qjax.converters.shards import contained
from qjax.errors import FormatError
from qjax.io.files import shown
from qjax.io.json import read_object

SIDE_FILES = {
    "quantization_config.json": "auto-round",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "quanto",
}
"""Files beside config.json that older tools wrote, and the method they speak of."""

ALIASES = {
    "intel/auto-round": "auto-round",
    "intel/auto_round": "auto-round",
    "auto_round": "auto-round",
    "modelopt_fp4": "modelopt",
}


@dataclasses.dataclass(frozen=True)
class Stated:
    """What a checkpoint says of its quantization.

    Attributes:
      kind: `quant_method`, under its usual name; None when it is not said.
      settings: everything else that is said.
      source: where it is said.
    """

    kind: str | None
    settings: Mapping[str, Any]
    source: str


def stated(checkpoint: Checkpoint) -> Stated | None:
    """What a checkpoint says of its quantization, or None.

    Raises:
      FormatError: the settings are not an object.
    """
    config = checkpoint.config
    text = config.get("text_config")
    owners = {"": config, "text_config.": text if isinstance(text, Mapping) else {}}
    for prefix, owner in owners.items():
        for key in SETTINGS:
            if owner.get(key) is not None:
                return _stated(owner[key], f"config.json: {prefix}{key}", checkpoint)
    own = config.get("quantization")
    if isinstance(own, Mapping) and "group_size" in own:
        return _stated({**own, "quant_method": "mlx"}, "config.json", checkpoint)
    for name, kind in SIDE_FILES.items():
        if os.path.lexists(checkpoint.directory / name):
            path = contained(checkpoint.directory, name)
            settings = read_object(path)
            settings = settings.get("quantization", settings)
            if isinstance(settings, Mapping):
                settings = {"quant_method": kind, **settings}
            return _stated(settings, name, checkpoint)
    return None


def _stated(settings: Any, source: str, checkpoint: Checkpoint) -> Stated:
    if not isinstance(settings, Mapping):
        raise FormatError(
            f"{shown(checkpoint.directory)}: {source.rpartition(' ')[2]} is "
            f"{settings!r:.200}, expected an object"
        )
    kind = settings.get("quant_method")
    if kind is None and "group_size" in settings and "config.json" in source:
        kind, settings = "mlx", {**settings, "quant_method": "mlx"}  # mlx-lm names none
    if kind is not None and not isinstance(kind, str):
        raise FormatError(
            f"{shown(checkpoint.directory)}: quant_method is {kind!r:.200}, expected a "
            "name"
        )
    return Stated(None if kind is None else ALIASES.get(kind, kind), settings, source)


Parts = Mapping[str, Any]
Guess = Callable[[Parts], Mapping[str, Any] | None]


def guess(
    readers: Mapping[str, Any],
    names: set[str],
    header: Callable[[str], Any],
    read: Callable[[str], Any],
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Quantized layers that the tensors alone show.

    Args:
      readers: reader classes by kind.
      names: tensors that nothing explains yet.
      header: gives shape and dtype of a tensor.
      read: gives a tensor.

    Returns:
      Kind and settings by layer.
    """
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    marks = {
        mark for kind in GUESSES if kind in readers for mark in readers[kind].marks
    }
    ends = {mark.rpartition(".")[2] for mark in marks}
    for name in sorted(names):
        if name.rpartition(".")[2] not in ends:
            continue
        for mark in marks:
            start = name.removesuffix(f".{mark}")
            if start != name and start not in found:
                made = _guess(readers, start, names, header, read)
                if made is not None:
                    found[start] = made
    return found


def _guess(readers, start: str, names: set[str], header, read):
    for kind, settings_of in GUESSES.items():
        if kind not in readers:
            continue
        own = (p for p in readers[kind].parts if f"{start}.{p}" in names)
        whole = readers[kind].stated
        parts = {
            part: (read if part in whole else header)(f"{start}.{part}") for part in own
        }
        if any(mark in parts for mark in readers[kind].marks):
            settings = settings_of(parts)
            if settings is not None:
                return kind, settings
    return None


def _has(*wanted: str, without: tuple[str, ...] = ()) -> Guess:
    def look(parts: Parts) -> Mapping[str, Any] | None:
        there = all(name in parts for name in wanted)
        return {} if there and not any(name in parts for name in without) else None

    return look


def _is(leaf: Any, *dtypes: Any) -> bool:
    return leaf is not None and any(np.dtype(leaf.dtype) == d for d in dtypes)


def _gptq(parts: Parts) -> Mapping[str, Any] | None:
    words, zeros, scales = (parts.get(n) for n in ("qweight", "qzeros", "scales"))
    if "B" in parts and "s" in parts:
        return {"checkpoint_format": "marlin", "bits": 4}
    if words is None or zeros is None or scales is None or len(words.shape) != 2:
        return None
    if words.shape[1] != scales.shape[-1] or len(zeros.shape) != 2:
        return None
    bits, rest = divmod(zeros.shape[1] * 32, words.shape[1] or 1)
    return None if rest else {"bits": bits, "inferred": True}


def _awq(parts: Parts) -> Mapping[str, Any] | None:
    words, scales = parts.get("qweight"), parts.get("scales")
    if words is None or scales is None or len(words.shape) != 2:
        return None
    if _is(words, np.int16):
        return {"version": "gemv_fast", "bits": 4}
    if words.shape[1] * 8 == scales.shape[-1]:
        return {"version": "gemm", "bits": 4}
    return {"version": "gemv", "bits": 4} if words.shape[0] == scales.shape[0] else None


def _compressed(parts: Parts) -> Mapping[str, Any] | None:
    packed, weight = parts.get("weight_packed"), parts.get("weight")
    scale = parts.get("weight_scale")
    if scale is None:
        return None
    groups: dict[str, Any] = {"targets": ["Linear"]}
    shape = parts.get("weight_shape")
    if packed is not None and shape is not None and np.size(shape) == 2:
        wide = max(int(shape[1]), 1)
        groups["weights"] = {
            "num_bits": packed.shape[-1] * 32 // wide,
            "type": "int",
            "group_size": -(-wide // scale.shape[-1]),
        }
        layout = "pack-quantized"
    elif packed is not None and _is(packed, np.uint8):
        mx = _is(scale, np.uint8)
        groups["weights"] = {
            "num_bits": 4,
            "type": "float",
            "group_size": 32 if mx else 16,
        }
        layout = "mxfp4-pack-quantized" if mx else "nvfp4-pack-quantized"
    elif weight is not None and _is(weight, np.int8):
        groups["weights"] = {"num_bits": 8, "type": "int"}
        layout = "int-quantized"
    elif weight is not None and _is(weight, jnp.float8_e4m3fn):
        groups["weights"] = {"num_bits": 8, "type": "float"}
        mx = _is(scale, np.uint8)
        layout = "mxfp8-quantized" if mx else "float-quantized"
    else:
        return None
    return {"format": layout, "config_groups": {"inferred": groups}}


def _bytes(parts: Parts) -> bool:
    return _is(parts.get("weight"), np.uint8)


def _modelopt(parts: Parts) -> Mapping[str, Any] | None:
    return {} if _bytes(parts) and "weight_scale_2" in parts else None


def _quark(parts: Parts) -> Mapping[str, Any] | None:
    scale = parts.get("weight_scale")
    return {} if _bytes(parts) and _is(scale, np.uint8) else None


def _bitnet(parts: Parts) -> Mapping[str, Any] | None:
    scale = parts.get("weight_scale")
    single = scale is not None and tuple(scale.shape) in ((), (1,))
    return {} if _bytes(parts) and single and not _is(scale, np.uint8) else None


def _mlx(parts: Parts) -> Mapping[str, Any] | None:
    weight = parts.get("weight")
    return {} if _is(weight, np.uint32) and "scales" in parts else None


GUESSES: dict[str, Guess] = {
    "bitsandbytes": lambda parts: (
        {} if "SCB" in parts or "weight.absmax" in parts else None
    ),
    "hqq": _has("W_q", "scale"),
    "aqlm": _has("codebooks", "codes", "scales"),
    "exl3": _has("trellis"),
    "exl2": _has("q_weight", "q_scale"),
    "vptq": _has("indices", "centroids.weight"),
    "spqr": _has("dense_weights", "row_offsets"),
    "squeezellm": _has("qweight", "lookup_table"),
    "fp_quant": _has("qweight", "forward_hadamard_matrix"),
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _has("weight", "weight_scale_inv"),
    "modelopt": _modelopt,
    "quark": _quark,
    "bitnet": _bitnet,
    "quanto": lambda parts: (
        {} if {"weight._data", "weight._data._data"} & set(parts) else None
    ),
    "torchao": _has("_weight_qdata"),
    "mlx": _mlx,
    "compressed-tensors": _compressed,
}
"""What the tensors of a layer have to look like: the settings of the format, or None.

The most particular comes first.
"""

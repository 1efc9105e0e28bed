"""compressed-tensors checkpoints: integers, FP8, MXFP4, MXFP8, NVFP4, sparse weights.

* `pack-quantized`: `weight_packed` int32 `[out, words]`, a bit string along `in` of
  codes plus `2**(bits - 1)`; `weight_scale` `[out, groups]` or `[out, 1]`;
  `weight_shape` int64 `[2]`; `weight_zero_point`, packed the same way along `out`, or
  plain int8; `weight_g_idx` int32 `[in]`. Files up to 2025 fill a word with
  `32 // bits` whole codes; which of the two a file does follows from its width.
* `int-quantized`, `float-quantized`, `naive-quantized`: `weight` int8 or float8_e4m3fn
  `[out, in]` with `weight_scale` per tensor, output, group (int8) or 128 x 128 block.
* `nvfp4-pack-quantized`: `weight_packed` uint8 `[out, in / 2]`, the first of two E2M1
  codes in the low nibble; `weight_scale` float8_e4m3fn `[out, in / 16]`;
  `weight_global_scale` float32 `[1]`, which divides.
* `mxfp4-pack-quantized`: the same without the divisor, `weight_scale` uint8 E8M0
  `[out, in / 32]`. `mxfp8-quantized`: `weight` float8_e4m3fn with these scales.
* `mixed-precision`: the groups of layers have formats of their own.
* `marlin-24`: 2:4 sparse integers; see `qjax.converters.marlin_24`.
* `sparse-bitmask`, `sparse-24-bitmask`: `compressed`, the weights that are kept, row by
  row; `bitmask` uint8 `[out, in / 8]`, where they belong, lowest bit first; `shape`.
  They stand for `weight`, quantized or not.

Where the settings round activations, the weight becomes `RoundedInputs`: one scale per
token when they are dynamic, `input_scale` when static. Other activations (FP4, MX, one
scale per 128 inputs, asymmetric) are not rounded; a warning says so.

Reference: compressed-tensors 0.20 `compressors/`, `quantization/quant_args.py`; for the
sparse formats 0.12.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.activations import Activations
from qjax.converters.checks import fits, pattern
from qjax.converters.compressed_parts import dense, weight_of
from qjax.converters.overrides import layer_name, object_of
from qjax.errors import FormatError, UnsupportedError
from qjax.tensor import QuantizedTensor

PARTS = {
    "weight_packed": ("integer", 2),
    "weight": ("any", 2),
    "weight_scale": ("any", None),
    "weight_global_scale": ("floating", None),
    "weight_zero_point": ("integer", None),
    "weight_shape": ("integer", 1),
    "weight_g_idx": ("integer", 1),
    "input_scale": ("floating", None),
    "input_zero_point": ("any", None),
    "input_global_scale": ("floating", None),
    "output_scale": ("floating", None),
    "output_zero_point": ("any", None),
    "scale_packed": ("floating", 2),
    "meta": ("integer", 2),
    "compressed": ("any", None),
    "bitmask": ("integer", 2),
    "shape": ("integer", None),
    "row_offsets": ("integer", None),
}
FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "marlin-24",
)
SPARSE = ("dense", "sparse-bitmask", "sparse-24-bitmask")
_ROUNDED = {("int", 8): "int8", ("float", 8): "float8_e4m3fn"}
_CLASS = re.compile(r"[A-Z]\w*")


class CompressedTensors:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, parts = "compressed-tensors", PARTS
    marks = ("weight_scale", "scale_packed", "bitmask")
    stated = ("weight_shape", "shape")

    def __init__(self, settings: Mapping[str, Any], where: str):
        groups = settings.get("config_groups") or {}
        sparsity = object_of(settings, "sparsity_config", where)
        if not isinstance(groups, Mapping) or not (groups or sparsity):
            raise FormatError(f"{where}: quantization_config has no config_groups")
        for name, scheme in groups.items():
            _check_scheme(scheme, f"{where}: config_groups.{name}")
        default = settings.get("format")
        if not (default is None or isinstance(default, str)):
            raise FormatError(f"{where}: format is {default!r:.200}, expected a name")
        found = {scheme.get("format") or default for scheme in groups.values()}
        known = {*FORMATS, "mixed-precision", "dense"}
        if unknown := sorted(map(str, found - known)):
            raise UnsupportedError(
                f"{where}: compressed-tensors format {', '.join(unknown)} is not read; "
                f"expected {', '.join(FORMATS)}"
            )
        if sparsity and sparsity.get("format") not in SPARSE:
            raise UnsupportedError(
                f"{where}: sparsity of compressed-tensors in the format "
                f"{sparsity.get('format')!r} is not read; expected {', '.join(SPARSE)}"
            )
        transforms = object_of(settings, "transform_config", where)
        if transforms.get("config_groups", transforms):
            raise UnsupportedError(
                f"{where}: transforms of compressed-tensors are not read; save the "
                "model with transforms fused into its weights"
            )
        self._groups = [dict(scheme) for scheme in groups.values()]
        self._targets = [
            _targets(scheme, "targets", where) if scheme.get("weights") else []
            for scheme in self._groups
        ]
        self._ignored = _targets(settings, "ignore", where)
        self._activations = Activations(where)

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        if "bitmask" in parts:
            return tuple(int(size) for size in np.reshape(parts["shape"], -1))
        if "weight_shape" in parts:
            return tuple(int(size) for size in parts["weight_shape"])
        if "scale_packed" in parts:
            return parts["scale_packed"].shape[1], parts["weight_packed"].shape[0] * 32
        if "weight_packed" in parts:
            rows, half = parts["weight_packed"].shape
            return rows, half * 2
        return tuple(parts["weight"].shape)

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, in `RoundedInputs` where activations are rounded."""
        name = layer_name(where)
        if "bitmask" in parts:
            parts = {**parts, "weight": dense(parts, where)}
            if "weight_scale" not in parts:
                return weight_of(parts, {}, where)
        if any(_rank(target, name) in (0, 1) for target in self._ignored):
            self._activations.once(
                f"the settings say that {name} is not quantized ('ignore'), but it is; "
                "it is read as the other layers",
                "ignore",
            )
        self._activations.outputs(parts, where)
        scheme = self._scheme(name, where)
        made = weight_of(parts, scheme["weights"], where)
        return self._inputs(made, scheme.get("input_activations"), parts, where)

    def _scheme(self, name: str, where: str) -> dict[str, Any]:
        """The scheme of a layer: by its name, by a pattern, or of all layers."""
        found = [
            (rank, i)
            for i, targets in enumerate(self._targets)
            for target in targets
            if (rank := _rank(target, name)) is not None
        ]
        if not found:
            raise FormatError(f"{where}: no target of config_groups names it")
        return self._groups[min(found)[1]]

    def _inputs(self, made, scheme, parts, where: str) -> QuantizedTensor:
        """Rounded activations, where the settings ask for them."""
        if not scheme:
            return made
        stated = (str(scheme.get("type", "int")), scheme.get("num_bits", 8))
        activation = _ROUNDED.get(stated)  # pyright: ignore[reportArgumentType, reportCallIssue]
        whole = scheme.get("strategy") not in ("group", "tensor_group", "block")
        if activation is None or not whole or not scheme.get("symmetric", True):
            what = (
                f"{scheme.get('type', 'int')}, {scheme.get('num_bits', 8)} bits, "
                f"strategy {scheme.get('strategy')}, symmetric "
                f"{scheme.get('symmetric', True)}"
            )
            return self._activations.left(made, what)
        scale = None if scheme.get("dynamic", False) else parts.get("input_scale")
        return self._activations.rounded(made, activation, scale, where)


def _rank(target: str | re.Pattern[str], name: str) -> int | None:
    """How closely a target names a layer, 0 closest; None when it does not.

    Nothing says the class of a layer: `Embedding` is taken for tables of embeddings and
    `Linear` for all others before any other class.
    """
    if isinstance(target, re.Pattern):
        return 1 if fits(target, name) else None
    if name == target or name.endswith(f".{target}"):
        return 0
    if not _CLASS.fullmatch(target):
        return None
    likely = "Embedding" if "embed" in name.rpartition(".")[2] else "Linear"
    return 2 if target == likely else 3


def _check_scheme(scheme: Any, where: str) -> None:
    """Raises FormatError unless a scheme has the fields that are read."""
    kinds = {"weights": Mapping, "input_activations": Mapping, "format": str}
    objects = isinstance(scheme, Mapping)
    for field, kind in kinds.items():
        value = scheme.get(field) if objects else scheme
        if not objects or not (value is None or isinstance(value, kind)):
            raise FormatError(f"{where}: {field} is {value!r:.200}")


def _targets(
    settings: Mapping[str, Any], key: str, where: str
) -> list[str | re.Pattern[str]]:
    """Names, classes and patterns of layers."""
    found = settings.get(key) or ()
    if not isinstance(found, list | tuple) or not all(type(t) is str for t in found):
        raise FormatError(f"{where}: {key} is {found!r:.200}, expected names")
    return [
        pattern(target[3:], f"{where}: {key}") if target.startswith("re:") else target
        for target in found
    ]

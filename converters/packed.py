"""Quantized checkpoints as if every weight were one tensor.

A layer of a quantized checkpoint is several tensors under one name. `PackedCheckpoint`
shows each such layer as a tensor `NAME.weight` with the shape of the dense weight, and
reads it as a `QuantizedTensor` `[in, out]`, packed. Everything else is passed through.

Layers are read as the settings say; those that do not look like it, and all of them
where nothing is said, as their tensors look (`qjax.converters.detect`).
"""

import collections
import json
import logging
import re
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from qjax.converters.aqlm import AQLM
from qjax.converters.auto_round import AutoRound
from qjax.converters.awq import AWQ
from qjax.converters.bitnet import BitNet
from qjax.converters.bitsandbytes import BitsAndBytes
from qjax.converters.checks import check_parts, finite
from qjax.converters.compressed_tensors import CompressedTensors
from qjax.converters.detect import guess, stated
from qjax.converters.exl2 import EXL2
from qjax.converters.exl3 import EXL3
from qjax.converters.floats import ELEMENTS
from qjax.converters.fp8 import BlockFP8, FbgemmFP8
from qjax.converters.fp_quant import FPQuant
from qjax.converters.gptq import GPTQ
from qjax.converters.hqq import HQQ
from qjax.converters.huggingface import Checkpoint
from qjax.converters.mlx import MLX
from qjax.converters.modelopt import ModelOpt
from qjax.converters.mxfp4 import GptOss
from qjax.converters.quanto import Quanto
from qjax.converters.quark import Quark
from qjax.converters.spqr import SpQR
from qjax.converters.squeezellm import SqueezeLLM
from qjax.converters.torchao import TorchAO
from qjax.converters.vptq import VPTQ
from qjax.errors import FormatError, SpecError, UnsupportedError
from qjax.io.files import shown
from qjax.models.layouts import turned
from qjax.tensor import QuantizedTensor

_log = logging.getLogger(__name__)


class Reader(Protocol):
    """How one foreign format stores layers.

    Attributes:
      kind: what `quant_method` calls it.
      marks: parts of which every quantized layer has one.
      parts: names of the tensors that may belong to a layer, after its own name, and
        what they must be: `"integer"`, `"floating"`, `"any"` or a dtype, and the rank
        or None. `expected_shape` is no tensor: the model's own `(out, in)`, for
        formats whose files do not tell it.
      stated: parts that `shape` needs whole, not only their shape.

    A reader may also have `empty`, parts that may have no elements, and `joint`, what
    stands between the name of a layer and a part, `"."` by default.
    """

    kind: str
    marks: tuple[str, ...]
    parts: Mapping[str, tuple[str, int | None]]
    stated: tuple[str, ...]

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)` from headers of the parts, or whole ones where `stated`."""
        ...

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, packed."""
        ...


READERS: dict[str, Any] = {
    reader.kind: reader
    for reader in (
        *(AutoRound, GPTQ, AWQ, BitsAndBytes, HQQ, CompressedTensors, Quanto, TorchAO),
        *(MLX, BlockFP8, FbgemmFP8, ModelOpt, Quark, FPQuant, GptOss, BitNet),
        *(SpQR, AQLM, VPTQ, SqueezeLLM, EXL2, EXL3),
    )
}
"""Readers by `quant_method`: called with the settings and what errors say."""

_CACHE_SCALES = re.compile(
    r"\.([qkv]_(scale|zero_point|global_scale)"
    r"|[kv]_proj\.output_(scale|zero_point)|prob_output_scale)$"
)


class PackedCheckpoint:
    """A Hugging Face checkpoint, quantized or not, with the methods of `Checkpoint`.

    Args:
      source: the open checkpoint.
      expected: shapes of the model's dense tensors by name, where they are known.

    Attributes:
      found: how layers are quantized and how that is known, one line for each kind.
      kind: the method of most layers, None for a dense checkpoint.

    Raises:
      UnsupportedError: its format is not read.
      FormatError: its settings or tensors do not fit the format.
    """

    def __init__(
        self,
        source: Checkpoint,
        expected: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self._expected = expected or {}
        self._turned = turned(source.config.get("model_type"))
        self.directory, self.config = source.directory, source.config
        self._source, self.where = source, shown(source.directory)
        self._made: dict[str, Reader] = {}
        self._readers: dict[str, Reader] = {}
        self._layers: dict[str, dict[str, str]] = {}
        self.found: tuple[str, ...] = ()
        left = set(source.names())
        said = stated(source)
        if said is not None and said.kind is not None:
            if said.kind not in READERS:
                raise UnsupportedError(
                    f"{self.where}: is quantized with {said.kind!r:.100}, which is not "
                    f"read; expected a dense checkpoint or one of {', '.join(READERS)}"
                )
            reader = self._reader(said.kind, said.settings)
            for start in self._starts(reader, left):
                left -= self._add(start, reader, left)
            self._note(f"as {said.source} says")
        explained = set(self._layers)
        guessed = guess(READERS, left, self._header, source.read)
        for start, (kind, settings) in guessed.items():
            left -= self._add(start, self._reader(kind, settings), left)
        inferred = self._layers.keys() - explained
        if inferred:
            self._note("as their tensors look", inferred)
            _log.warning(
                "%s: %s %d layers are read as their tensors look: %s",
                self.where,
                "config.json does not explain how" if said else "nothing says how",
                len(inferred),
                "; ".join(self.found[1 if explained else 0 :]),
            )
        if said is not None and not self._layers:
            _log.warning(
                "%s: %s speaks of quantization (%s), but no tensor is quantized; "
                "reading it as a dense checkpoint",
                self.where,
                said.source,
                said.kind,
            )
        ends = (n for n in left if n.endswith(".weight"))
        bare = sorted(n for n in ends if source.dtype(n).name in ELEMENTS)
        if said is not None and said.kind is not None and bare:
            raise FormatError(
                f"{self.where}: {bare[0]} is {source.dtype(bare[0])} without a scale, "
                f"which every layer quantized with {said.kind} has"
            )
        caches = sorted(name for name in left if _CACHE_SCALES.search(name))
        if caches:
            left -= set(caches)
            _log.warning(
                "%s: static scales of the key and value cache are not used, for "
                "example %s (%d in all); the cache finds its own scales",
                self.where,
                caches[0],
                len(caches),
            )
        self._names = [name for name in source.names() if name in left]
        self._names += self._layers
        self._shapes = {name: self._shape(name) for name in self._layers}
        kinds = collections.Counter(r.kind for r in self._readers.values())
        self.kind = kinds.most_common(1)[0][0] if kinds else None

    def _reader(self, kind: str, settings: Mapping[str, Any]) -> Reader:
        key = kind + json.dumps(settings, sort_keys=True, default=str)
        if key not in self._made:
            self._made[key] = READERS[kind](settings, self.where)
        return self._made[key]

    def _starts(self, reader: Reader, names: set[str]) -> list[str]:
        """Names of the layers that have a part every quantized layer has."""
        joint = getattr(reader, "joint", ".")
        ends = tuple(joint + mark for mark in reader.marks)
        found = (name for name in names if name.endswith(ends))
        starts = {n.removesuffix(e) for n in found for e in ends if n.endswith(e)}
        return sorted(starts)

    def _add(self, start: str, reader: Reader, names: set[str]) -> set[str]:
        """Notes the tensors of a layer, and returns them."""
        start_of = start + getattr(reader, "joint", ".")
        parts = {p: start_of + p for p in reader.parts if start_of + p in names}
        parts.pop("expected_shape", None)
        self._layers[f"{start}.weight"] = parts
        self._readers[f"{start}.weight"] = reader
        return set(parts.values())

    def _note(self, how: str, names: Any = None) -> None:
        names = self._layers if names is None else names
        kinds = collections.Counter(self._readers[name].kind for name in names)
        for kind, count in kinds.most_common():
            first = next(n for n in sorted(names) if self._readers[n].kind == kind)
            parts = ", ".join(self._layers[first])
            self.found += (f"{count} layers {kind} ({parts}), {how}",)

    def _shape(self, name: str) -> tuple[int, ...]:
        names, reader = self._layers[name], self._readers[name]
        parts: dict[str, Any] = {p: self._header(n) for p, n in names.items()}
        check_parts(reader, parts, f"{self.where}: {name.removesuffix('.weight')}")
        for part in set(names) & set(reader.stated):
            parts[part] = self._source.read(names[part])
        parts |= self._told(name)
        try:
            return reader.shape(parts)
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise FormatError(
                f"{self.where}: {name}: parts {sorted(parts)} are not those of a "
                f"{reader.kind} layer ({error})"
            ) from None

    def _told(self, name: str) -> dict[str, np.ndarray]:
        """The model's own shape, for readers that ask for it."""
        shape = self._expected.get(name)
        if shape is None or "expected_shape" not in self._readers[name].parts:
            return {}
        return {"expected_shape": np.array(self._laid(name, shape))}

    def _laid(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`(out, in)` from the shape of a dense weight, and the reverse."""
        return shape[::-1] if name.endswith(self._turned) else shape

    def _header(self, name: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self._source.shape(name), self._source.dtype(name))

    def names(self) -> list[str]:
        """Names of dense tensors, and of quantized weights as one tensor each."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; of a quantized weight as if it were dense."""
        own = self._shapes.get(name)
        return self._source.shape(name) if own is None else self._laid(name, own)

    def dtype(self, name: str) -> Any:
        """Dtype of a tensor; some float for a quantized weight."""
        if name in self._layers:
            return np.dtype(np.float16)
        return self._source.dtype(name)

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """A dense tensor as stored, or a quantized weight `[in, out]`, packed.

        Raises:
          FormatError: a part is missing or does not fit the others.
        """
        if name not in self._layers:
            return self._source.read(name)
        parts = {p: self._source.read(n) for p, n in self._layers[name].items()}
        parts |= self._told(name)
        where = f"{self.where}: {name.removesuffix('.weight')}"
        try:
            made = self._readers[name].read(parts, where)
        except KeyError as error:
            raise FormatError(f"{where}: has no tensor {error.args[0]!r}") from None
        except SpecError as error:  # of a format, which no argument asked for
            raise FormatError(f"{where}: {error}") from None
        expected = (*self._shapes[name][:-2], *self._shapes[name][:-3:-1])
        if made.shape != expected:
            raise FormatError(
                f"{where}: its parts are those of [in, out] {list(made.shape)}, "
                f"expected {list(expected)}"
            )
        finite(made, where)
        return made

    def release(self) -> None:
        """See `Checkpoint.release`."""
        self._source.release()

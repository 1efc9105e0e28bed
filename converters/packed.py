"""Quantized checkpoints as if every weight were one tensor.

A layer of a quantized checkpoint is several tensors under one name. `PackedCheckpoint`
shows each such layer as a tensor `NAME.weight` with the shape of the dense weight, and
reads it as a `QuantizedTensor` `[in, out]`, packed. Everything else is passed through.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qjax.converters.awq import AWQ
from qjax.converters.bitsandbytes import BitsAndBytes
from qjax.converters.compressed_tensors import CompressedTensors
from qjax.converters.gptq import GPTQ
from qjax.converters.huggingface import Checkpoint
from qjax.errors import FormatError, UnsupportedError
from qjax.io.files import shown
from qjax.tensor import QuantizedTensor


class Reader(Protocol):
    """How one foreign format stores layers.

    Attributes:
      kind: what `quant_method` calls it.
      marks: parts of which every quantized layer has one.
      parts: names of the tensors that may belong to a layer, after its own name, and
        what they must be: `"integer"`, `"floating"` or `"any"`, and the rank or None.
      stated: parts that `shape` needs whole, not only their shape.
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
    reader.kind: reader for reader in (GPTQ, AWQ, BitsAndBytes, CompressedTensors)
}
"""Readers by `quant_method`: called with the settings and what errors say."""

SETTINGS = ("quantization_config", "compression_config")
"""Keys of config.json under which a checkpoint says how it is quantized."""


def settings_of(config: Mapping[str, Any]) -> Any:
    """What config.json says of quantization, or None for a dense checkpoint."""
    text = config.get("text_config")
    owners = [config, *([text] if isinstance(text, Mapping) else [])]
    found = (owner.get(key) for owner in owners for key in SETTINGS)
    return next((settings for settings in found if settings is not None), None)


def check_parts(reader: Reader, parts: Mapping[str, Any], where: str) -> None:
    """Raises FormatError unless parts have the dtypes and ranks that a reader takes."""
    for part, leaf in parts.items():
        kind, rank = reader.parts[part]
        fits = kind == "any" or jnp.issubdtype(leaf.dtype, getattr(jnp, kind))
        if not fits or rank not in (None, len(leaf.shape)) or 0 in leaf.shape:
            what = "numbers" if kind == "any" else f"{kind} numbers"
            raise FormatError(
                f"{where}.{part}: is {leaf.dtype} {list(leaf.shape)}, expected {what}"
                f"{'' if rank is None else f' of rank {rank}'}, not empty"
            )


class PackedCheckpoint:
    """A quantized Hugging Face checkpoint, with the methods of `Checkpoint`.

    Args:
      source: the open checkpoint.

    Raises:
      UnsupportedError: its format is not read.
      FormatError: its settings or tensors do not fit the format.
    """

    def __init__(self, source: Checkpoint):
        self.directory, self.config = source.directory, source.config
        self._source, self.where = source, shown(source.directory)
        settings = settings_of(source.config)
        if not isinstance(settings, Mapping):
            raise FormatError(
                f"{self.where}: quantization_config is {settings!r}, expected an object"
            )
        kind = settings.get("quant_method")
        if not isinstance(kind, str) or kind not in READERS:
            raise UnsupportedError(
                f"{self.where}: is quantized with {kind!r}, which is not read; "
                f"expected a dense checkpoint or one of {', '.join(READERS)}"
            )
        self.kind = kind
        self._reader: Reader = READERS[kind](settings, self.where)
        self._layers = self._find(set(source.names()))
        parts = {name for parts in self._layers.values() for name in parts.values()}
        self._names = [name for name in source.names() if name not in parts]
        self._names += self._layers
        self._shapes = {name: self._shape(name) for name in self._layers}

    def _find(self, names: set[str]) -> dict[str, dict[str, str]]:
        """Tensors of each quantized weight by part."""
        found: dict[str, dict[str, str]] = {}
        for mark in self._reader.marks:
            ends = [n for n in sorted(names) if n.endswith(f".{mark}")]
            for start in (name.removesuffix(f".{mark}") for name in ends):
                parts = {p: f"{start}.{p}" for p in self._reader.parts}
                found[f"{start}.weight"] = {
                    p: n for p, n in parts.items() if n in names
                }
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        names = self._layers[name]
        parts: dict[str, Any] = {p: self._header(n) for p, n in names.items()}
        check_parts(
            self._reader, parts, f"{self.where}: {name.removesuffix('.weight')}"
        )
        for part in set(names) & set(self._reader.stated):
            parts[part] = self._source.read(names[part])
        try:
            return self._reader.shape(parts)
        except (KeyError, ValueError) as error:
            raise FormatError(
                f"{self.where}: {name}: parts {sorted(parts)} are not those of a "
                f"{self.kind} layer ({error})"
            ) from None

    def _header(self, name: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self._source.shape(name), self._source.dtype(name))

    def names(self) -> list[str]:
        """Names of dense tensors, and of quantized weights as one tensor each."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; of a quantized weight as if it were dense."""
        return self._shapes[name] if name in self._shapes else self._source.shape(name)

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
        where = f"{self.where}: {name.removesuffix('.weight')}"
        try:
            return self._reader.read(parts, where)
        except KeyError as error:
            raise FormatError(f"{where}: has no tensor {error.args[0]!r}") from None

    def release(self) -> None:
        """See `Checkpoint.release`."""
        self._source.release()

"""Metadata of GGUF files: look-ups that check types, and values of one type."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.gguf_layout import Value
from qjax.errors import FormatError, UnsupportedError


class Metadata:
    """Typed look-ups in the metadata of one file.

    `ARCH.` in front of a key stands for the architecture.

    Args:
      values: metadata by key.
      where: what errors call the file.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.get("general.architecture", str)

    def key(self, key: str) -> str:
        """A key as it is in the file."""
        start, found, rest = key.partition("ARCH.")
        return f"{self.architecture}.{rest}" if found and not start else key

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value.

        Raises:
          FormatError: it is missing without a default, or of another type.
        """
        key = self.key(key)
        value = self.values.get(key, default)
        if value is None:
            raise FormatError(f"{self.where}: has no metadata {key!r}")
        whole = kind is float and type(value) is int
        if type(value) is not kind and not whole:
            raise FormatError(
                f"{self.where}: metadata {key!r} is {value!r:.100}, expected "
                f"{kind.__name__}"
            )
        return kind(value)

    def number(self, key: str, default: Any = None) -> int:
        """An integer that may be a list with one entry per layer, all alike.

        Raises:
          FormatError: see `get`.
          UnsupportedError: layers differ.
        """
        full = self.key(key)
        value = self.values.get(full)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:
            different = sorted({int(v) for v in value})
            if len(different) != 1:
                raise UnsupportedError(
                    f"{self.where}: {full} differs from layer to layer "
                    f"({different[:8]}); models here have equal layers"
                )
            return different[0]
        return self.get(key, int, default)

    def has(self, key: str) -> bool:
        """Whether there is such a value."""
        return self.key(key) in self.values


def u32(number: Any) -> Value:
    """A size or a count."""
    return Value("u32", int(number))


def f32(number: Any) -> Value:
    """A real number."""
    return Value("f32", float(number))

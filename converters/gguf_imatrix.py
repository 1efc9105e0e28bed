"""Importance matrices of llama.cpp: mean squares of the inputs of every matrix.

A GGUF file of `general.type` "imatrix" has for each weight NAME two float32 tensors,
`NAME.in_sum2 [experts, in]`, sums of squares, and `NAME.counts [experts, 1]`, how many
inputs were summed. The older form is little-endian: i32 entries; each i32 length and
bytes of the name, i32 calls, i32 numbers, float32 numbers, mean squares times calls;
then i32 chunks, i32 length and bytes of the text's name.

Reference: ggml-org/llama.cpp, `tools/imatrix/imatrix.cpp`.
"""

import dataclasses
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax.converters.gguf_file import GGUFFile
from qjax.converters.gguf_layout import MAGIC, MAX_NAME, Value
from qjax.converters.gguf_recipe import is_matrix, tensors
from qjax.converters.gguf_write import write_gguf
from qjax.errors import FormatError, SpecError
from qjax.io.files import read_small, shown
from qjax.models import ModelConfig

MAX_BYTES = 1 << 30
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclasses.dataclass(frozen=True)
class Imatrix:
    """Importances of the inputs of weights.

    Attributes:
      means: mean square of every input, float32 `[in]`, by the weight's name in GGUF.
      counts: inputs that were averaged, by the same names.
      chunks: windows of text.
      chunk_size: tokens of a window.
      datasets: names of texts.
    """

    means: Mapping[str, np.ndarray]
    counts: Mapping[str, int]
    chunks: int = 0
    chunk_size: int = 512
    datasets: Sequence[str] = ()

    def by_path(self, config: ModelConfig) -> dict[str, tuple[np.ndarray, int]]:
        """Means and counts by the path of the parameter in a model.

        Raises:
          FormatError: a weight has another number of inputs.
        """
        found: dict[str, tuple[np.ndarray, int]] = {}
        for entry, place, shape in tensors(config):
            mean = self.means.get(place.name)
            if mean is None or not is_matrix(place, shape):
                continue
            if mean.shape != (shape[-1],):
                raise FormatError(
                    f"importance matrix: {place.name} has {mean.size} inputs, the "
                    f"model's has {shape[-1]}; it belongs to another model"
                )
            own = mean, self.counts[place.name]
            found |= dict.fromkeys(entry.paths, own)
        return found


def is_imatrix(path: Any) -> bool:
    """Whether a file is an importance matrix, by its first bytes."""
    if not isinstance(path, str | os.PathLike) or not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(4)
    if start == MAGIC:
        with GGUFFile(path) as found:
            return found.metadata.get("general.type") == "imatrix"
    return os.fspath(path).endswith((".dat", ".imatrix"))


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Reads an importance matrix in either form.

    Raises:
      FormatError: it is damaged, or has numbers that are negative or not finite.
      SpecError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        new = file.read(4) == MAGIC
    return _read_gguf(path) if new else _read_binary(path)


def _read_gguf(path: str | os.PathLike[str]) -> Imatrix:
    where = shown(path)
    means, counts = {}, {}
    with GGUFFile(path) as file:
        if file.metadata.get("general.type") != "imatrix":
            raise FormatError(
                f"{where}: is a GGUF file of another kind, expected general.type "
                "'imatrix'"
            )
        for full in file.tensors:
            if not full.endswith(_SUMS):
                continue
            name = full.removesuffix(_SUMS)
            if name + _COUNTS not in file.tensors:
                raise FormatError(f"{where}: has {full} without {name + _COUNTS}")
            sums, count = file.read(full), file.read(name + _COUNTS)
            if sums.dtype != np.float32 or count.dtype != np.float32:
                raise FormatError(f"{where}: {full} is {sums.dtype}, expected float32")
            if count.size != 1:  # one per expert: no model here has any
                continue
            number = float(count.reshape(-1)[0])
            mean = sums.reshape(-1) / number if number > 0 else np.ones_like(sums)
            means[name] = _checked(mean.reshape(-1), f"{where}: {full}")
            counts[name] = int(number)
        keys = file.metadata
        texts = keys.get("imatrix.datasets", [])
        chunks, size = (
            keys.get(f"imatrix.{key}", default)
            for key, default in (("chunk_count", 0), ("chunk_size", 512))
        )
    texts = texts if isinstance(texts, list) else []
    return Imatrix(means, counts, chunks, size, texts)


def _read_binary(path: str | os.PathLike[str]) -> Imatrix:
    where, data = shown(path), read_small(path, MAX_BYTES)
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        if size < 0 or at + size > len(data):
            raise FormatError(
                f"{where}: ends at byte {len(data):,}, inside of an entry; expected an "
                "importance matrix of llama.cpp"
            )
        at += size
        return data[at - size : at]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    means, counts = {}, {}
    for _ in range(number()):
        length = number()
        if not 0 < length <= 4 * MAX_NAME:
            raise FormatError(f"{where}: a name of {length} bytes at byte {at - 4:,}")
        name = take(length).decode("utf-8", "replace")
        calls, size = number(), number()
        values = np.frombuffer(take(4 * size), "<f4")
        means[name] = _checked(values / np.float32(max(calls, 1)), f"{where}: {name}")
        counts[name] = max(calls, 1)
    chunks, text = 0, ()
    if at < len(data):
        chunks = number()
        text = (take(number()).decode("utf-8", "replace"),)
    return Imatrix(means, counts, chunks, datasets=text)


def _checked(mean: np.ndarray, where: str) -> np.ndarray:
    if not mean.size or not np.isfinite(mean).all() or mean.min() < 0:
        raise FormatError(f"{where}: mean squares must be finite and not negative")
    return np.asarray(mean, np.float32)


def write_imatrix(
    path: str | os.PathLike[str], imatrix: Imatrix, *, overwrite: bool = False
) -> None:
    """Writes an importance matrix that llama.cpp reads, atomically.

    Raises:
      SpecError: the file exists, or there is nothing to write.
    """
    if not imatrix.means:
        raise SpecError(f"{shown(path)}: an importance matrix of no weights")
    made: list[tuple[str, str, tuple[int, ...], Any]] = []
    for name in sorted(imatrix.means):
        mean, count = imatrix.means[name], imatrix.counts[name]
        sums = np.asarray(mean, np.float32)[None] * np.float32(count)
        made.append((name + _SUMS, "f32", sums.shape, sums))
        one = np.full((1, 1), count, np.float32)
        made.append((name + _COUNTS, "f32", one.shape, one))
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": Value("string", list(imatrix.datasets)),
        "imatrix.chunk_count": Value("u32", imatrix.chunks),
        "imatrix.chunk_size": Value("u32", imatrix.chunk_size),
    }
    write_gguf(path, metadata, made, overwrite=overwrite)

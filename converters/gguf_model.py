"""Writing a whole model as one GGUF file, one part of it in memory.

The header names types and shapes of all tensors before the first is made, so they are
decided from the plan of the model; data are pulled from the model's parts as the file
is written. Vectors are float32; matrices what `types` says.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.converters.gguf_export import metadata_of
from qjax.converters.gguf_layout import Value
from qjax.converters.gguf_names import Place, is_matrix
from qjax.converters.gguf_recipe import tensors
from qjax.converters.gguf_rope import rope_tensors
from qjax.converters.gguf_vocab import vocabulary
from qjax.converters.gguf_write import write_gguf
from qjax.converters.words import transposed
from qjax.errors import SpecError, UnsupportedError
from qjax.formats.ggml import TYPES
from qjax.ggml import GgmlTensor
from qjax.io.files import content_of, shown
from qjax.models import ModelConfig
from qjax.models.weights import Entry
from qjax.tensor import QuantizedTensor
from qjax.text_files import files_from

MAX_FILE = 256 << 20
VERSION = 2
"""`general.quantization_version`: of the layouts of blocks."""


def write_model(
    path: str | os.PathLike[str],
    config: ModelConfig,
    parts: Iterator[Mapping[str, Any]],
    files: Mapping[str, Any],
    types: Callable[[str, tuple[int, ...]], str],
    *,
    more: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a GGUF file, atomically.

    Args:
      path: the file.
      config: the architecture.
      parts: parameters by path, in the order of the model.
      files: tokenizer files by name: paths or contents.
      types: `(name, shape [out, in])` in the file to the type of a matrix: that of its
        blocks where it is packed, some float where it is not.
      more: further metadata.
      overwrite: replace an existing file.

    Raises:
      UnsupportedError: llama.cpp has no such architecture or tokenizer.
      SpecError: the file exists, or a packed weight is not of its type.
    """
    where = shown(path)
    source = _Parts(parts)
    made: list[tuple[str, str, tuple[int, ...], Any]] = []
    for name, factors in rope_tensors(config).items():
        made.append((name, "f32", factors.shape, factors))
    for entry, place, shape in tensors(config):
        kind = types(place.name, shape) if is_matrix(place, shape) else "f32"
        data = _data(source, entry, place, kind, where)
        made.append((place.name, kind, shape, data))
    *first, (name, kind, shape, data) = made
    made = [*first, (name, kind, shape, itertools.chain(data, source.rest(where)))]
    metadata = metadata_of(config, "") | dict(more or {})
    metadata["general.quantization_version"] = Value("u32", VERSION)
    metadata |= _tokenizer(files, config, where)
    for name, token in (
        ("bos", config.bos_id),
        ("eos", next(iter(config.eos_ids), None)),
    ):
        if token is not None:
            metadata.setdefault(f"tokenizer.ggml.{name}_token_id", Value("u32", token))
    write_gguf(path, metadata, made, overwrite=overwrite)


class _Parts:
    """Parameters by path, pulled from parts in their order."""

    def __init__(self, parts: Iterator[Mapping[str, Any]]):
        self._parts, self._part = parts, {}

    def take(self, paths: tuple[str, ...]) -> dict[str, Any]:
        """Removes and returns parameters of the current or a later part."""
        while not all(path in self._part for path in paths):
            following = next(self._parts, None)
            if following is None:
                raise SpecError(f"the model has no parameter {paths[0]!r}")
            self._part = dict(self._part) | dict(following)
        return {path: self._part.pop(path) for path in paths}

    def rest(self, where: str) -> Iterator[np.ndarray]:
        """Refuses parameters that nothing took; yields nothing."""
        left = [*self._part, *(path for part in self._parts for path in part)]
        if left:
            raise SpecError(
                f"{where}: the model has {', '.join(left[:5])}, for which its "
                "architecture has no place in GGUF"
            )
        yield from ()


def _data(
    source: _Parts,
    entry: Entry,
    place: Place,
    kind: str,
    where: str,
) -> Iterator[np.ndarray]:
    """The bytes of one tensor, made when they are asked for."""
    params = source.take(entry.paths)
    matrix = entry.shape[::-1] if place.turned else entry.shape
    rows = place.rows(matrix[0])
    order = None if rows is None else np.argsort(rows)
    packed = [leaf for leaf in params.values() if isinstance(leaf, QuantizedTensor)]
    if TYPES[kind].dtype is None:
        q: Any = entry.write_packed(params) if len(packed) == len(params) else packed
        if not isinstance(q, GgmlTensor) or q.format.type != kind:
            raise SpecError(
                f"{where}: {place.name} is {q!r}, expected blocks of {kind}"
            )
        rows = transposed(np.asarray(q.codes))
        yield rows if order is None else rows[order]
        return
    plain = {
        path: leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf
        for path, leaf in params.items()
    }
    whole = entry.write(plain)  # as transformers stores it
    whole = whole.T if place.turned else whole
    whole = whole if order is None else whole[order]
    whole = whole.astype(np.float32) + np.float32(place.added) if place.added else whole
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(whole).astype(jnp.dtype(TYPES[kind].dtype))
    if kind == "f16" and bool(np.any(np.isinf(made) & np.isfinite(whole))):
        raise SpecError(
            f"{where}: {place.name} has numbers beyond the largest of float16, "
            f"{np.finfo(np.float16).max:g}; write it as bf16 or f32"
        )
    yield made


def _tokenizer(
    files: Mapping[str, Any], config: ModelConfig, where: str
) -> dict[str, Any]:
    """Metadata of the tokenizer; none where the model has none."""
    contents = {name: content_of(file, MAX_FILE) for name, file in files.items()}
    legacy = contents.keys() & {"tokenizer.model", "vocab.json", "vocab.txt"}
    if "tokenizer.json" not in contents and legacy:
        raise UnsupportedError(
            f"{where}: GGUF: the tokenizer is {min(legacy)}; convert it once with "
            "transformers and add tokenizer.json to the model"
        )
    if "tokenizer.json" not in contents:
        return {"tokenizer.ggml.model": "no_vocab"}
    return vocabulary(files_from(contents, where), config.vocab_size, where)

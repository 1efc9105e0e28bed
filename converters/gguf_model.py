"""Writing a whole model as one GGUF file, one part of it in memory.

The header names types and shapes of all tensors before the first is made, so they are
decided from the plan of the model; data are pulled from the model's parts as the file
is written. Vectors are float32; matrices what `types` says.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.converters.gguf_export import family_of, metadata_of, rope_tensors
from qjax.converters.gguf_layout import Value
from qjax.converters.gguf_names import Place, gguf_names, places
from qjax.converters.gguf_vocab import vocabulary
from qjax.converters.gguf_write import write_gguf
from qjax.converters.words import transposed
from qjax.errors import SpecError
from qjax.formats.ggml import TYPES, Ggml
from qjax.ggml import GgmlTensor
from qjax.io.files import content_of, shown
from qjax.models import ModelConfig, plan
from qjax.models.weights import Entry
from qjax.tensor import QuantizedTensor

MAX_FILE = 256 << 20
VERSION = 2
"""`general.quantization_version`: of the layouts of blocks."""


def write_model(
    path: str | os.PathLike[str],
    config: ModelConfig,
    parts: Iterator[Mapping[str, Any]],
    files: Mapping[str, Any],
    types: Callable[[str, tuple[int, ...]], str],
    pack: Callable[[np.ndarray, str, str], GgmlTensor],
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
      types: `(name, shape [out, in])` in the file to the type of a matrix.
      pack: rounds a kernel `[in, out]` to a type; `(kernel, type, name)`.
      more: further metadata.
      overwrite: replace an existing file.

    Raises:
      UnsupportedError: llama.cpp has no such architecture or tokenizer.
      SpecError: the file exists, or a packed weight is not of its type.
    """
    where = shown(path)
    family = family_of(config)
    own = {"num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads}
    own["head_dim"] = config.head_dim
    found = places(gguf_names(family, config.layers), family, own)
    source = _Parts(parts)
    tensors: list[tuple[str, str, tuple[int, ...], Any]] = []
    for name, factors in rope_tensors(config).items():
        tensors.append((name, "f32", factors.shape, factors))
    for entry in plan(config):
        if entry.optional:
            continue
        place = found[entry.name]
        shape = entry.shape[::-1] if place.turned else entry.shape
        matrix = len(shape) == 2 and place.name != "position_embd.weight"
        kind = types(place.name, shape) if matrix else "f32"
        data = _data(source, entry, place, kind, pack)
        tensors.append((place.name, kind, shape, data))
    metadata = metadata_of(config, "") | dict(more or {})
    metadata["general.quantization_version"] = Value("u32", VERSION)
    metadata |= _tokenizer(files, config, where)
    write_gguf(path, metadata, tensors, overwrite=overwrite)


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


def _data(
    source: _Parts,
    entry: Entry,
    place: Place,
    kind: str,
    pack: Callable[[np.ndarray, str, str], GgmlTensor],
) -> Iterator[np.ndarray]:
    """The bytes of one tensor, made when they are asked for."""
    params = source.take(entry.paths)
    order = None if place.rows is None else np.argsort(place.rows)
    if all(isinstance(leaf, QuantizedTensor) for leaf in params.values()):
        q = entry.write_packed(params)
        if not isinstance(q, GgmlTensor) or q.format.type != kind:
            raise SpecError(f"{place.name}: is {q!r}, cannot be written as {kind}")
        yield _rows(q, order)
        return
    whole = entry.write(params)  # as transformers stores it
    whole = whole.T if place.turned else whole
    whole = whole if order is None else whole[order]
    whole = whole + np.asarray(place.added, whole.dtype) if place.added else whole
    if TYPES[kind].dtype is not None:
        yield np.ascontiguousarray(whole).astype(jnp.dtype(TYPES[kind].dtype))
        return
    kernel = np.ascontiguousarray(np.asarray(whole, np.float32).T)
    yield _rows(pack(kernel, kind, place.name), None)


def _rows(q: GgmlTensor, order: np.ndarray | None) -> np.ndarray:
    """Rows of bytes as a file has them."""
    rows = transposed(np.asarray(q.codes))
    return rows if order is None else rows[order]


def _tokenizer(
    files: Mapping[str, Any], config: ModelConfig, where: str
) -> dict[str, Any]:
    """Metadata of the tokenizer; none where the model has none."""

    def read(name: str) -> dict[str, Any]:
        return json.loads(content_of(files[name], MAX_FILE)) if name in files else {}

    if "tokenizer.json" not in files:
        return {}
    settings = read("special_tokens_map.json") | read("tokenizer_config.json")
    if "chat_template.jinja" in files:
        template = content_of(files["chat_template.jinja"], MAX_FILE).decode()
        settings["chat_template"] = template
    return vocabulary(read("tokenizer.json"), settings, config.vocab_size, where)


def packed_like(kernel: np.ndarray, kind: str, name: str) -> GgmlTensor:
    """Rounds a kernel `[in, out]` with llama.cpp's own search."""
    from qjax.methods import quantize
    from qjax.methods.ggml import GGML

    del name
    made: Any = quantize(jnp.asarray(kernel), Ggml(kind), GGML())
    return made

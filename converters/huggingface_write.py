"""Writing a dense Hugging Face directory: safetensors, config, tokenizer.

The directory appears whole or not at all. At most one shard of arrays is held; values
that are converted on demand (anything with `shape`, `dtype` and `__array__`) are
converted one at a time, so a lazy mapping costs one tensor.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import SpecError
from qjax.io.atomic import atomic_directory, write_bytes
from qjax.io.files import content_of
from qjax.io.json import encode_object
from qjax.io.safetensors import write_safetensors

SHARD_BYTES = 2 << 30
MAX_TOKENIZER_FILE = 256 << 20


def write_checkpoint(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    tokenizer_files: Mapping[str, Any] | None = None,
    *,
    more: Callable[[], Mapping[str, Mapping[str, Any]]] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write a model directory that `transformers` loads.

    Args:
      directory: Target; missing or empty, or with `overwrite` a model directory.
      config: Content of config.json; a function is called after the last tensor.
      tensors: Names as `transformers` knows them, with their arrays.
      tokenizer_files: Name to path, or content, of further files.
      more: Gives further JSON files by name; called after the last tensor.
      shard_bytes: Start a new weight file beyond this size.
      overwrite: Whether an existing model directory may be replaced.

    Returns:
      Tensor name to SHA-256 of the stored bytes.

    Raises:
      SpecError: The target exists, a name is given twice, or there are no tensors.
      QjaxError: No space left; the old state is intact.
    """
    digests: dict[str, str] = {}
    shards: list[list[str]] = []
    total = 0
    with atomic_directory(directory, overwrite=overwrite) as work:
        for name, source in (tokenizer_files or {}).items():
            if name != Path(name).name or name.startswith("."):
                raise SpecError(f"{name!r} is not a plain file name")
            data = content_of(source, MAX_TOKENIZER_FILE)
            write_bytes(work / name, data)
        for shard in _grouped(tensors, shard_bytes):
            path = work / f"part-{len(shards)}.safetensors"
            for name in shard:
                if name in digests:
                    raise SpecError(f"tensor {name!r} is given twice")
            digests |= write_safetensors(path, shard, metadata={"format": "pt"})
            shards.append(list(shard))
            total += sum(_nbytes(array) for array in shard.values())
        if not shards:
            raise SpecError(f"{os.fspath(directory)}: no tensors to write")
        content = config() if callable(config) else config
        if not (work / "config.json").exists():
            write_bytes(work / "config.json", encode_object(dict(content)))
        for name, content in (more() if more else {}).items():
            write_bytes(work / name, encode_object(dict(content)))
        _name_shards(work, shards, total)
    return digests


def _name_shards(work: Path, shards: list[list[str]], total: int) -> None:
    """Give the shards their final names, with an index when there are several."""
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = "model.safetensors"
        if len(shards) > 1:
            final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(work / f"part-{number}.safetensors", work / final)
        weight_map |= dict.fromkeys(names, final)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_bytes(work / "model.safetensors.index.json", encode_object(index))


def _grouped(
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]], shard_bytes: int
) -> Iterator[dict[str, Any]]:
    """Yield the tensors in runs of at most `shard_bytes`, or one larger tensor."""
    shard: dict[str, Any] = {}
    size = 0
    items: Any = tensors.items() if isinstance(tensors, Mapping) else tensors
    for name, array in items:
        nbytes = _nbytes(array)
        if name in shard:
            raise SpecError(f"tensor {name!r} is given twice")
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += nbytes
    if shard:
        yield shard


def _nbytes(array: Any) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize

"""Hugging Face model directories: reading any, writing dense safetensors ones.

`open_checkpoint` takes a local directory or a Hub id and gives every tensor by name,
as views of mapped files, whatever mix of shards and formats lies below. It never runs
anything: `.py` files are not downloaded, and configuration keys that ask for code
(`auto_map`, `trust_remote_code`, names starting with `_`) are dropped and reported.

Trust: an index may only name plain files in its own directory (or, through the links of
the Hub cache, blobs of the same repository). Every tensor must lie in exactly the shard
its index says. `source_digest` is over the full content, `fingerprint` is the cheap
version (sizes, times and headers) for telling whether files changed between two runs.

Cost: headers at opening. Reading keeps at most `WINDOW` bytes resident beyond what the
caller holds: pages of earlier tensors are given back as new ones are read.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from qjax.converters.hub import download, download_gguf, looks_like_hub_id
from qjax.converters.huggingface_write import write_checkpoint
from qjax.converters.shards import contained, find_shards
from qjax.converters.torch_pickle import TorchFile
from qjax.errors import FormatError, SpecError
from qjax.io.files import read_small, shown
from qjax.io.json import MAX_BYTES, parse_object
from qjax.io.safetensors import SafetensorsFile

if TYPE_CHECKING:
    from qjax.converters.gguf import GGUFCheckpoint

__all__ = ["Checkpoint", "open_checkpoint", "write_checkpoint"]

WINDOW = 256 << 20
ARCHITECTURE_KEYS = ("_remove_final_layer_norm",)
"""Keys that start like internal ones but describe the architecture (OPT)."""
SETTINGS = ("quantization_config", "compression_config")
"""Keys under which a checkpoint says how it is quantized."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def open_checkpoint(
    path_or_hub_id: str | os.PathLike[str], revision: str | None = None
) -> "Checkpoint | GGUFCheckpoint":
    """Open a model directory, or a model of the Hugging Face Hub.

    A Hub model is downloaded once into the Hub's cache; with `HF_HUB_OFFLINE=1` only
    the cache is used.

    Args:
      path_or_hub_id: Directory, GGUF file, or on the Hub `owner/name`, or
        `owner/name:Q4_K_M` for one GGUF file of several.
      revision: Branch, tag or commit on the Hub; not allowed with a directory.

    Returns:
      An open `Checkpoint`; close it or use it as a context manager.

    Raises:
      SpecError: No such directory or Hub model, or no config.json or weights in it.
      FormatError: A file is damaged, or an index and its shards disagree.
      UnsupportedError: The weights are of a kind that is not read.
    """
    directory = Path(path_or_hub_id)
    gguf = is_gguf(directory) and directory.exists()
    if revision is not None and (gguf or directory.is_dir()):
        raise SpecError(
            f"{shown(directory)}: is a local {'file' if gguf else 'directory'}, "
            f"revision {revision!r} is for models of the Hub"
        )
    if gguf:
        from qjax.converters.gguf import GGUFCheckpoint

        return GGUFCheckpoint(directory)
    if directory.is_dir():
        return Checkpoint(directory)
    if directory.exists():
        raise SpecError(
            f"{shown(directory)}: is a file, expected the model directory it lies in, "
            "or a .gguf file"
        )
    name = os.fspath(path_or_hub_id)
    repo, colon, end = name.partition(":")
    if colon and end and looks_like_hub_id(repo):
        return open_checkpoint(download_gguf(repo, end, revision))
    if not looks_like_hub_id(name):
        raise SpecError(
            f"{shown(name)}: no such directory, and not a Hub id (owner/name)"
        )
    return Checkpoint(download(name, revision))


class Checkpoint:
    """An open model directory.

    Attributes:
      directory: Where it lies.
      config: config.json without the keys in `ignored_config`.
      ignored_config: Dotted keys that ask for code or are internal; never used.
      files: The weight files, in order.
      unlisted: Tensors that a shard holds but the index does not mention; not readable.
      tokenizer_files: Name to path of the tokenizer's files and generation_config.json.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Open a directory; see `open_checkpoint`."""
        self.directory = Path(directory)
        self._config_bytes = self._read_config()
        where = shown(self.directory / "config.json")
        self.ignored_config: tuple[str, ...] = ()
        self.config = self._without_code(parse_object(self._config_bytes, where), "")
        self.tokenizer_files = {
            name: contained(self.directory, name)
            for name in TOKENIZER_FILES
            if os.path.lexists(self.directory / name)
        }
        self._fresh = 0
        self._digest: str | None = None
        self._open: dict[str, SafetensorsFile | TorchFile] = {}
        try:
            shards, listed = find_shards(self.directory)
            for shard in shards:
                self._open[shard] = _open_weights(self.directory, shard)
            self._place, self.unlisted = self._index(listed)
        except BaseException:
            self.close()
            raise
        self.files = [self.directory / shard for shard in shards]

    def _read_config(self) -> bytes:
        if not os.path.lexists(self.directory / "config.json"):
            raise SpecError(
                f"{shown(self.directory)}: no config.json; expected a Hugging Face "
                "model directory"
            )
        real = contained(self.directory, "config.json")
        return read_small(self.directory / "config.json", MAX_BYTES, real)

    def _without_code(self, config: dict[str, Any], prefix: str) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key, value in config.items():
            if _asks_for_code(key, prefix):
                self.ignored_config += (prefix + key,)
            elif isinstance(value, dict):
                kept[key] = self._without_code(value, f"{prefix}{key}.")
            else:
                kept[key] = value
        return kept

    def _index(
        self, listed: Mapping[str, str] | None
    ) -> tuple[dict[str, str], tuple[str, ...]]:
        """Return (tensor to shard, unlisted tensors), checking the index."""
        held: dict[str, str] = {}
        for shard, file in self._open.items():
            for name in file.names():
                if name in held:
                    raise FormatError(
                        f"{shown(self.directory)}: tensor {name!r} lies in both "
                        f"{held[name]} and {shard}"
                    )
                held[name] = shard
        if listed is None:
            return held, ()
        for name, shard in listed.items():
            if held.get(name) != shard:
                found = f"it lies in {held[name]}" if name in held else "it is nowhere"
                raise FormatError(
                    f"{shown(self.directory)}: the index places tensor {name[:200]!r} "
                    f"in {shard}, but {found}"
                )
        return dict(listed), tuple(sorted(set(held) - set(listed)))

    def assets(self) -> dict[str, Path | bytes]:
        """Return config.json and the tokenizer's files: paths, or contents."""
        return {"config.json": self.directory / "config.json", **self.tokenizer_files}

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._place)

    def __contains__(self, name: object) -> bool:
        return name in self._place

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor."""
        return self._file(name).dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only view of its mapped file.

        Raises:
          SpecError: No such tensor.
          FormatError: The file changed since it was opened.
          IntegrityError: A PyTorch storage is damaged.
        """
        file = self._file(name)
        array = file.read(name)
        if self._fresh > WINDOW:
            self.release()
        self._fresh += array.nbytes
        return array

    def release(self) -> None:
        """Give the pages of tensors read so far back; views stay valid.

        Call it after a layer is done. `read` does so by itself now and then.
        """
        self._fresh = 0
        for file in self._open.values():
            file.release()

    def source_digest(self) -> str:
        """Return a SHA-256 that names the model's content.

        It covers config.json and every weight file: the digest of the lines
        `NAME SIZE SHA256-OF-CONTENT`, sorted by name. Location and times do not enter.
        The first call reads every byte once, in small pieces; the result is kept.
        """
        if self._digest is None:
            lines = [_line("config.json", self._config_bytes)]
            for shard, file in self._open.items():
                lines.append(f"{shard} {file.file.size} {file.file.sha256()}\n")
            self._digest = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
        return self._digest

    def fingerprint(self) -> str:
        """Return a SHA-256 over sizes, modification times, names and shapes.

        Cheap: no tensor is read. Equal fingerprints on one machine mean that nobody
        replaced a file; it is no proof of content, `source_digest` is.
        """
        lines = [_line("config.json", self._config_bytes)]
        for shard, file in self._open.items():
            lines.append(f"{shard} {file.file.stamp()}\n")
            for name in file.names():
                lines.append(f"{name} {file.dtype(name)} {file.shape(name)}\n")
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def close(self) -> None:
        """Close all files; views handed out stay valid until dropped."""
        for file in self._open.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = self.config.get("model_type", "unknown")
        return (
            f"Checkpoint({shown(self.directory)!r}, {kind}, {len(self._place)} "
            f"tensors in {len(self.files)} files)"
        )

    def _file(self, name: str) -> SafetensorsFile | TorchFile:
        try:
            return self._open[self._place[name]]
        except KeyError:
            raise SpecError(
                f"{shown(self.directory)}: no tensor {name!r} in the checkpoint"
            ) from None


def is_gguf(source: Any) -> bool:
    """Whether a source is named like a GGUF file."""
    return os.fspath(source).lower().endswith(".gguf")


def _asks_for_code(key: str, prefix: str) -> bool:
    """Whether a configuration key names code, or is internal to transformers."""
    settings = bool(set(prefix.split(".")) & set(SETTINGS))  # torchao's `_type`
    internal = key.startswith("_") and key not in ARCHITECTURE_KEYS and not settings
    return internal or key == "auto_map" or "remote_code" in key


def _line(name: str, data: bytes) -> str:
    return f"{name} {len(data)} {hashlib.sha256(data).hexdigest()}\n"


def _open_weights(directory: Path, name: str) -> SafetensorsFile | TorchFile:
    kind = SafetensorsFile if name.endswith(".safetensors") else TorchFile
    return kind(directory / name, contained(directory, name))

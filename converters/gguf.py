"""GGUF models: the file of llama.cpp as a checkpoint, packed weights as they are.

`GGUFCheckpoint` shows a file (or the parts of a split one) under the names, shapes and
configuration of transformers, so that everything that reads checkpoints reads it.
Blocks stay bytes: a row of the file is a column of `GgmlTensor`, which is one turn of a
matrix of bytes; rows that llama.cpp moved are moved back whole (`gguf_names`).
"""

import collections
import functools
import hashlib
import os
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from qjax.converters.gguf_config import config_of
from qjax.converters.gguf_file import GGUFFile, open_gguf
from qjax.converters.gguf_names import Place, is_matrix, places
from qjax.converters.gguf_rope import SMALL
from qjax.converters.gguf_tokenizer import tokenizer_files
from qjax.converters.words import transposed
from qjax.errors import FormatError, SpecError, UnsupportedError
from qjax.formats.ggml import TYPES, Ggml
from qjax.ggml import GgmlTensor
from qjax.io.files import shown
from qjax.io.json import encode_object


class GGUFCheckpoint:
    """A GGUF model with the methods of `Checkpoint`; packed weights are read packed.

    Attributes:
      directory: the file.
      config: what `config.json` would say.
      ignored_config: always empty: metadata name no code.
      kind: the block type of most weights, None when all are floats.
      found: how many tensors there are of each type.
      where: what errors call the file.
    """

    ignored_config: tuple[str, ...] = ()

    def __init__(self, path: str | os.PathLike[str]):
        """Opens a file.

        Args:
          path: the file, or the first of several parts.

        Raises:
          FormatError: the file is damaged.
          UnsupportedError: its architecture or a type of tensor is not supported.
        """
        self.directory, self.where = Path(path), shown(path)
        self._file: GGUFFile = open_gguf(path)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        tensors: dict[str, Any] = {n: t.shape for n, t in self._file.tensors.items()}
        if "token_embd.weight" not in tensors:
            raise FormatError(
                f"{self.where}: has no tensor 'token_embd.weight'; expected a language "
                "model, not an adapter, a projector or an importance matrix"
            )
        small = {name: self._file.read(name) for name in SMALL if name in tensors}
        self.config = config_of(self._file.metadata, tensors | small, self.where)
        family = self.config["model_type"]
        self._places = places(tensors, family, self.config)
        used = {place.name for place in self._places.values()}
        self.unlisted = tuple(n for n in tensors if n not in used and n not in SMALL)
        kinds = collections.Counter(t.type for t in self._file.tensors.values())
        blocks = [kind for kind, _ in kinds.most_common() if TYPES[kind].dtype is None]
        self.kind = blocks[0] if blocks else None
        self.found = tuple(
            f"{count} tensors {kind}, as the file says"
            for kind, count in kinds.most_common()
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """All metadata of the file."""
        return self._file.metadata

    def names(self) -> list[str]:
        """Names in transformers, and tensors that belong to no part of the model."""
        return [*self._places, *self.unlisted]

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self.unlisted

    def _place(self, name: str) -> Place:
        if name in self.unlisted:
            return Place(name)
        if name not in self._places:
            raise SpecError(f"{self.where}: no tensor {name!r} in the file")
        return self._places[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as transformers stores it."""
        place = self._place(name)
        shape = tuple(self._file.tensors[place.name].shape)
        return shape[::-1] if place.turned else shape

    def dtype(self, name: str) -> Any:
        """Dtype of a tensor; some float for a packed weight."""
        kind = self._file.tensors[self._place(name).name].type
        own = TYPES[kind].dtype
        return np.dtype(np.float16) if own is None else jnp.dtype(own)

    def read(self, name: str) -> np.ndarray | GgmlTensor:
        """A float tensor in the order of transformers, or a packed weight `[in, out]`.

        Raises:
          UnsupportedError: a vector or a stack is packed.
        """
        place = self._place(name)
        tensor = self._file.tensors[place.name]
        data = self._file.read(place.name)
        rows = place.rows(len(data))
        data = data if rows is None else data[rows]
        if TYPES[tensor.type].dtype is not None:
            data = data - np.asarray(place.added, data.dtype) if place.added else data
            return data.T if place.turned else data
        if not is_matrix(place, tensor.shape):
            raise UnsupportedError(
                f"{self.where}: {place.name} {list(tensor.shape)} is {tensor.type}; "
                "only matrices are read packed"
            )
        out, rows = tensor.shape
        return GgmlTensor(transposed(data), Ggml(tensor.type), (rows, out))

    def release(self) -> None:
        """See `Checkpoint.release`."""
        self._file.release()

    def source_digest(self) -> str:
        """SHA-256 of the content."""
        digests = [file.sha256() for file in self._file.files]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over sizes, times, names and shapes; see `Checkpoint.fingerprint`."""
        lines = [str(file.stamp()) for file in self._file.files]
        lines += [f"{n} {t.type} {t.shape}" for n, t in self._file.tensors.items()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @functools.cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer in the form of transformers: contents of files by name.

        Empty when the file has no tokenizer.

        Raises:
          UnsupportedError: its tokenizer is of a kind that is not supported.
        """
        made = tokenizer_files(self.metadata, self.where)
        return {name: encode_object(content) for name, content in made.items()}

    def assets(self) -> dict[str, bytes]:
        """`config.json` and the tokenizer's files, by name."""
        return {"config.json": encode_object(self.config), **self.tokenizer_files}

    def close(self) -> None:
        """Closes the file; views handed out stay valid until dropped."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

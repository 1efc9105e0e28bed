"""Models part by part: embeddings, each layer, the end, from disk or from memory.

Of a model on disk one part is in memory at a time.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from qjax.artifact import Artifact, is_artifact
from qjax.checkpoint import checkpoint_parts
from qjax.converters.huggingface import TOKENIZER_FILES, open_checkpoint
from qjax.models import Decoder

Path = str | os.PathLike[str]
Part = tuple[Any, Mapping[str, Any]]
"""The number of a layer, or None, and parameters by path."""


class Source(NamedTuple):
    """A model on disk.

    Attributes:
      directory: Where its configuration and tokenizer are.
      config: Its `config.json`.
      files: Tokenizer files by name.
      recipe: JSON of the recipe it was quantized with, or None.
      parts: Its parts.
    """

    directory: str
    config: dict[str, Any]
    files: dict[str, Any]
    recipe: str | None
    parts: Iterator[Part]


def open_source(
    stack: contextlib.ExitStack, source: Path, revision: str | None = None
) -> Source:
    """Opens a model on disk until a stack is left.

    Args:
      stack: Closes it.
      source: qjax artifact, Hugging Face directory, GGUF file or Hub id.
      revision: Of a Hub id.

    Raises:
      SpecError, FormatError, UnsupportedError: See `qjax.load`.
    """
    if is_artifact(source):
        artifact = Artifact(source)
        recipe = artifact.manifest.get("recipe")
        return Source(
            str(artifact.directory),
            artifact.config,
            {n: p for n, p in artifact.files.items() if n in TOKENIZER_FILES},
            None if recipe is None else json.dumps(recipe),
            _numbered(artifact.parts()),
        )
    checkpoint = stack.enter_context(open_checkpoint(source, revision))
    return Source(
        str(checkpoint.directory),
        checkpoint.config,
        checkpoint.tokenizer_files,
        None,
        checkpoint_parts(checkpoint),
    )


def parts_of(stack: contextlib.ExitStack, model: Decoder | Path) -> Iterator[Part]:
    """The parts of a model in memory, or of one on disk until a stack is left."""
    if isinstance(model, Decoder):
        return model.parts()
    return open_source(stack, model).parts


def _numbered(parts: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Part]:
    """Parts of an artifact, by their layer."""
    for name, part in parts:
        number = name.removeprefix("layer-").removesuffix(".safetensors")
        yield int(number) if number.isdigit() else None, part

"""Writing a model in another container: the qjax artifact or dense safetensors.

Works part by part, so memory is one layer. Packed weights are only ever expanded when
a dense format is asked for; going to the artifact keeps dense weights exactly as they
are.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from qjax.artifact import Artifact, is_artifact
from qjax.checkpoint import Assets, checkpoint_parts, write_artifact
from qjax.converters.huggingface import (
    TOKENIZER_FILES,
    open_checkpoint,
    write_checkpoint,
)
from qjax.converters.packed import SETTINGS, settings_of
from qjax.errors import SpecError
from qjax.quantize import quantize_checkpoint
from qjax.recipes import Recipe
from qjax.tensor import QuantizedTensor

FORMATS = ("qjax", "safetensors")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    fmt: str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `source` as `fmt`.

    Args:
      source: qjax artifact, Hugging Face directory or Hub id.
      target: directory to write; missing or empty, or with `overwrite` a model.
      fmt: `qjax` (a checkpoint becomes an artifact, bit for bit; weights of a quantized
        one stay packed) or `safetensors` (a dense Hugging Face directory that
        transformers loads; quantized weights are dequantized to the dtype of the
        original).
      revision: of a Hub id.
      overwrite: replace an existing model directory.

    Raises:
      SpecError: unknown format, or the source is in that format already.
      FormatError, IntegrityError, UnsupportedError: the source cannot be read.
    """
    if fmt not in FORMATS:
        raise SpecError(f"format {fmt!r}: expected one of {', '.join(FORMATS)}")
    if is_artifact(source):
        if fmt == "qjax":
            raise SpecError(f"{os.fspath(source)}: is a qjax artifact already")
        artifact = Artifact(source)
        copied = {n: p for n, p in artifact.files.items() if n in TOKENIZER_FILES}
        parts = (part for _, part in artifact.parts())
        _write_dense(target, artifact.config, parts, copied, overwrite)
        return
    with open_checkpoint(source, revision) as checkpoint:
        if fmt == "safetensors":
            parts = (part for _, part in checkpoint_parts(checkpoint))
            files = checkpoint.tokenizer_files
            _write_dense(target, checkpoint.config, parts, files, overwrite)
            return
        if settings_of(checkpoint.config) is not None:
            parts = checkpoint_parts(checkpoint)
            assets = Assets(str(checkpoint.directory))
            write_artifact(target, parts, assets, overwrite=overwrite)
            return
    quantize_checkpoint(
        source, target, Recipe((), "dense"), revision=revision, overwrite=overwrite
    )


def _write_dense(target, config, parts, files, overwrite: bool) -> None:
    """A dense Hugging Face directory, whose config.json says nothing of packing."""
    plain = {k: v for k, v in config.items() if k not in SETTINGS}
    tensors = _hf_tensors(plain, parts)
    write_checkpoint(target, plain, tensors, files, overwrite=overwrite)


def _hf_tensors(
    config: dict[str, Any], parts: Iterator[dict[str, Any]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and dense array of every Hugging Face tensor, one part in memory."""
    from qjax.models import ModelConfig, plan

    entries = plan(ModelConfig.from_hf(config))
    for part in parts:
        dense = {
            path: np.asarray(leaf.dequantize())
            if isinstance(leaf, QuantizedTensor)
            else np.asarray(leaf)
            for path, leaf in part.items()
        }
        for entry in entries:
            if all(path in dense for path in entry.paths):
                yield entry.name, entry.write(dense)

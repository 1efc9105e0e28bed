"""What a model directory holds, without loading its weights."""

import collections
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from qjax.artifact import Artifact, is_artifact, tensor_report
from qjax.checkpoint import checkpoint_parts, open_packed
from qjax.converters.huggingface import is_gguf, open_checkpoint
from qjax.ops import explain
from qjax.tensor import QuantizedTensor


def inspect(
    source: str | os.PathLike[str], *, revision: str | None = None
) -> dict[str, Any]:
    """Describes a qjax artifact, a Hugging Face directory, a GGUF file or a Hub id.

    Reads headers only; digests are checked when the model is loaded.

    Args:
      source: the model.
      revision: of a Hub id.

    Returns:
      `format, architecture, parameters, bits_per_weight, size_bytes, recipe, found,
      formats, matmul, tensors`, each tensor with `name, shape, format, bits_per_weight,
      nbytes`, sizes in bytes; `recipe` is the method of a quantized directory, `found`
      how its layers are quantized and how that is known, `formats` counts tensors by
      format, `matmul` says by packed format what multiplies one row of activations on
      this machine (`qjax.ops.explain`).

    Raises:
      SpecError: no such model.
      FormatError, IntegrityError, UnsupportedError: it cannot be read.
    """
    tensors: list[dict[str, Any]] = []
    runs: dict[str, str] = {}
    found: tuple[str, ...] = ()

    def add(parts: Iterable[tuple[Any, dict[str, Any]]]) -> None:
        for _, part in parts:
            tensors.extend(_entry(path, leaf) for path, leaf in part.items())
            for leaf in part.values():
                if isinstance(leaf, QuantizedTensor) and leaf.format.name not in runs:
                    runs[leaf.format.name] = explain((1, leaf.shape[0]), leaf)

    if is_artifact(source):
        artifact = Artifact(source, verify=False)
        kind, config = "qjax", artifact.config
        recipe = (artifact.manifest.get("recipe") or {}).get("name")
        add(artifact.parts())
    else:
        with open_checkpoint(source, revision) as checkpoint:
            kind = "gguf" if is_gguf(checkpoint.directory) else "huggingface"
            config = checkpoint.config
            packed = open_packed(checkpoint)
            add(checkpoint_parts(packed))
            recipe, found = packed.kind, packed.found
    size = sum(t["nbytes"] for t in tensors)
    parameters = sum(int(np.prod(t["shape"], dtype=np.int64)) for t in tensors)
    return {
        "format": kind,
        "architecture": config.get("model_type"),
        "parameters": parameters,
        "bits_per_weight": 8 * size / max(parameters, 1),
        "size_bytes": size,
        "recipe": recipe,
        "found": list(found),
        "formats": dict(collections.Counter(t["format"] for t in tensors)),
        "matmul": runs,
        "tensors": tensors,
    }


def _entry(path: str, leaf: Any) -> dict[str, Any]:
    return {"name": path, **tensor_report(path, leaf)}

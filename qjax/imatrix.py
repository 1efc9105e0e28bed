"""Computing llama.cpp's importance matrix: mean squares of the inputs of kernels."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qjax.calibration import BlockStream, calibration_windows
from qjax.converters.gguf_imatrix import Imatrix
from qjax.converters.gguf_recipe import is_matrix, tensors


def imatrix(
    model: Any,
    text: Any,
    *,
    tokenizer: Any = None,
    context: int = 512,
    windows: int | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Imatrix:
    """Mean squares of the inputs of every kernel of the blocks, and of the head.

    Windows follow one another and what is left is dropped; each is opened by BOS where
    the tokenizer adds it, as in `llama-imatrix`.

    Args:
      model: a `Decoder`, dense.
      text: the path of a text, or token ids `[tokens]` or `[windows, time]`.
      tokenizer: the model's, for a text.
      context: tokens of a window.
      windows: use only so many.
      batch: windows per step.
      progress: called with the layers done and their number.

    Returns:
      The matrix; `write_imatrix` stores it.

    Raises:
      SpecError: the text is shorter than a window.
      NonFiniteError: an activation is NaN or infinite; names the layer.
      UnsupportedError: llama.cpp has no such architecture.
    """
    if isinstance(text, str | os.PathLike) and tokenizer is not None:
        text = tokenizer.encode(Path(text).read_text("utf-8"))
    ids = calibration_windows(
        text,
        windows=sys.maxsize if windows is None else windows,
        context=context,
        vocab_size=model.config.vocab_size,
    ).copy()
    if tokenizer is not None and tokenizer.adds_bos:
        ids[:, 0] = tokenizer.bos_id
    names = {
        path: place.name
        for entry, place, shape in tensors(model.config)
        if is_matrix(place, shape)
        for path in entry.paths
    }
    stream = BlockStream(model.config, ids, model.dtype, batch=batch)
    means: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    needs = frozenset({"square"})

    def add(path: str, found: Any) -> None:
        count = float(found.count)
        means[names[path]] = np.asarray(found.square, np.float32) / np.float32(count)
        counts[names[path]] = int(count)

    for index, (layer, part) in enumerate(model.parts()):
        if layer is None and index == 0:
            stream.embed(part, part)
        elif layer is None:
            if "head.kernel" in part:
                norm = {k: v for k, v in part.items() if k.startswith("norm.")}
                add("head.kernel", stream.head(norm, needs))
        else:
            start = f"layers.{layer}."
            own = {path.removeprefix(start): leaf for path, leaf in part.items()}
            for group in stream.groups(layer, own):
                found = stream.collect(layer, group, own, own, needs)
                for path in group:
                    add(start + path, found)
            stream.advance(layer, own, own)
        if progress is not None:
            progress(index + 1, model.config.layers + 2)
    return Imatrix(means, counts, len(ids), ids.shape[1])

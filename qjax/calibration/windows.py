"""Calibration tokens: windows of one length, from token ids or a text file."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import SpecError

WINDOWS, CONTEXT = 128, 512
"""What published results for these methods use, at the context of small models."""


def calibration_windows(
    source: Any,
    tokenizer: Any = None,
    *,
    windows: int = WINDOWS,
    context: int = CONTEXT,
    vocab_size: int | None = None,
) -> np.ndarray:
    """The first windows of a calibration text.

    Args:
      source: token ids `[windows, time]`, taken as they are; token ids `[tokens]`; or
        the path of a UTF-8 text file.
      tokenizer: of the model, for a file; no special tokens are added.
      windows: number of windows taken at most.
      context: tokens in each; ignored for ids that are windows already.
      vocab_size: ids must lie below it.

    Returns:
      Int32 `[windows, context]`, at least one window.

    Raises:
      SpecError: too few tokens for one window, ids outside the vocabulary, or not
        something that can be calibrated on.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if tokenizer is None:
            raise SpecError(f"calibration: {path} is a text; pass its token ids")
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"calibration: cannot read {path}: {error}") from None
        source = tokenizer.encode(text, add_special_tokens=False)
    ids = np.asarray(source)
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise SpecError(
            f"calibration: got {ids.dtype} of shape {list(ids.shape)}; expected "
            "integer token ids [windows, time] or [tokens], or the path of a text file"
        )
    if ids.ndim == 1:
        count = min(windows, len(ids) // context)
        if count < 1:
            raise SpecError(
                f"calibration: {len(ids)} tokens do not fill one window of {context}; "
                "give more text (128 windows of 512 tokens are usual) or a shorter "
                "context"
            )
        ids = ids[: count * context].reshape(count, context)
    if 0 in ids.shape:
        raise SpecError(f"calibration: no tokens in {list(ids.shape)} ids")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise SpecError(
            f"calibration: token ids lie in {low}..{high}; expected 0.."
            f"{'' if vocab_size is None else vocab_size - 1}; use the model's tokenizer"
        )
    return ids.astype(np.int32)

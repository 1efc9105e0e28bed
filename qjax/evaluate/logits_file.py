"""Base files of `llama-perplexity --kl-divergence-base`: a model's log-probabilities.

One file holds the windows that were read and, for every scored token, the
log-probabilities of the whole vocabulary in 16 bits each. Little-endian:

    8 bytes  `_logits_`
    i32      context, vocabulary, windows
    i32      tokens[windows, context], as encoded: BOS is not written over them
    rows     one for each scored token, window by window: positions
             `context // 2 .. context - 2`, which predict the token after them

A row is `f32 scale, f32 lowest` and one u16 code per token of the vocabulary, one more
(unused) where that is odd: `log p = scale * code + lowest`. Codes span the largest
logit down to 16 below it, or the smallest if that is nearer; what lies below has code
0. So steps are at most 16 / 65535, and no entry is below `-16 - ln(vocabulary)`.

Cost: reading maps the file and touches the rows asked for; writing appends rows. One
token of a vocabulary of 128k takes 256 kB.

Refuses: another magic, counts that do not fit the file's size (a run that was cut off),
token ids outside the vocabulary, rows that are no log-probabilities.

Reference:
    llama.cpp `tools/perplexity/perplexity.cpp`.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import FormatError, SpecError
from qjax.io.atomic import atomic_file
from qjax.io.files import MappedFile, open_regular, shown

MAGIC = b"_logits_"
RANGE = 16.0
_STEPS = 65535
_HEADER = 20
_I32, _U16, _F32 = np.dtype("<i4"), np.dtype("<u2"), np.dtype("<f4")
_SLACK = 0.01  # rounding of float32, far below what damage does


def is_logits_file(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a regular file that begins as a base file does."""
    if not os.path.isfile(path):
        return False
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def scored_per_window(context: int) -> int:
    """Return how many tokens of a window are scored: its second half but one."""
    return context - context // 2 - 1


def _row_items(vocab_size: int) -> int:
    """Return how many u16 a row takes."""
    return 4 + vocab_size + vocab_size % 2


class LogitsFile:
    """A base file, open for reading.

    Attributes:
        path: Where it is.
        context: Tokens of a window.
        vocab_size: Log-probabilities of a row.
        tokens: `[windows, context]` int32; a view of the file.
        rows: Number of rows, one for each scored token.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Open `path` and check all of it but the rows.

        Raises:
            SpecError: There is no such file.
            FormatError: See the module's refusals.
        """
        self.path = path
        self._file = MappedFile(path)
        name = shown(path)
        head = self._file.read(0, min(_HEADER, self._file.size))
        if not head.startswith(MAGIC):
            raise FormatError(
                f"{name}: begins with {head[:8]!r}, expected {MAGIC!r}; it is no file "
                "of llama-perplexity --kl-divergence-base"
            )
        if len(head) < _HEADER:
            raise FormatError(
                f"{name}: has {len(head)} bytes, shorter than the header of {_HEADER}"
            )
        counts = np.frombuffer(head, _I32, 3, len(MAGIC))
        self.context, self.vocab_size, windows = (int(count) for count in counts)
        if self.context < 3 or self.vocab_size < 1 or windows < 1:
            raise FormatError(
                f"{name}: its context is {self.context}, its vocabulary "
                f"{self.vocab_size}, its windows {windows}; expected at least 3, 1 and "
                "1; it is damaged"
            )
        self.rows = windows * scored_per_window(self.context)
        self._start = _HEADER + 4 * windows * self.context
        self._check_size(windows)
        self.tokens = self._file.array(_HEADER, _I32, (windows, self.context))
        self._check_tokens()

    def __enter__(self) -> "LogitsFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; arrays handed out stay valid."""
        self._file.close()

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self.tokens)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows `start:stop`: scale and lowest `[n, 2]`, codes `[n, vocab]`.

        Raises:
            FormatError: A row is no distribution, or the file shrank.
        """
        items = _row_items(self.vocab_size)
        where = self._start + start * items * _U16.itemsize
        rows = self._file.array(where, _U16, (stop - start, items))
        line = rows[:, :4].copy().view(_F32)
        self._check_rows(line, start)
        return line, rows[:, 4 : 4 + self.vocab_size]

    def release(self) -> None:
        """Give the memory of rows read so far back to the system."""
        self._file.release()

    def _check_size(self, windows: int) -> None:
        row = _row_items(self.vocab_size) * _U16.itemsize
        size, expected = self._file.size, self._start + self.rows * row
        if size == expected:
            return
        whole = (size - self._start) // (row * scored_per_window(self.context))
        what = (
            f"it holds {max(whole, 0)} of them: its run was cut off, or it is damaged"
            if size < expected
            else "it is damaged"
        )
        raise FormatError(
            f"{shown(self.path)}: has {size} bytes, expected {expected} for {windows} "
            f"windows of {self.context} tokens and a vocabulary of {self.vocab_size}; "
            f"{what}"
        )

    def _check_tokens(self) -> None:
        bad = (self.tokens < 0) | (self.tokens >= self.vocab_size)
        if bad.any():
            window, position = divmod(int(bad.argmax()), self.context)
            raise FormatError(
                f"{shown(self.path)}: window {window}, token {position} has id "
                f"{self.tokens[window, position]}, outside the vocabulary of "
                f"{self.vocab_size}; it is damaged"
            )

    def _check_rows(self, line: np.ndarray, start: int) -> None:
        scale, low = line.astype(np.float64).T
        with np.errstate(invalid="ignore"):
            top = scale * _STEPS + low
            good = (scale >= 0) & (scale * _STEPS <= RANGE + _SLACK)
            good &= (top <= _SLACK) & (top >= -math.log(self.vocab_size) - _SLACK)
        if not good.all():
            at = int(np.argmin(good))
            window, row = divmod(start + at, scored_per_window(self.context))
            raise FormatError(
                f"{shown(self.path)}: window {window}, row {row} has scale "
                f"{scale[at]:.6g} and lowest log-probability {low[at]:.6g}, which is "
                "no distribution; it is damaged, or its model returned NaN"
            )


class LogitsWriter:
    """Appends rows to a base file; see `write_logits`."""

    def __init__(self, file: BinaryIO, vocab_size: int):
        """Append to `file`, which holds the header."""
        self._file = file
        self._vocab_size = vocab_size
        self.rows = 0

    def add(self, logits: Any) -> None:
        """Append the rows of finite logits `[n, vocab]`."""
        line, codes = (np.asarray(x) for x in encode_rows(logits))
        rows = np.zeros((len(codes), _row_items(self._vocab_size)), _U16)
        rows[:, :4] = line.astype(_F32).view(_U16)
        rows[:, 4 : 4 + self._vocab_size] = codes
        self._file.write(rows.data)
        self.rows += len(rows)


@contextmanager
def write_logits(
    path: str | os.PathLike[str],
    tokens: np.ndarray,
    vocab_size: int,
    *,
    overwrite: bool = False,
) -> Iterator[LogitsWriter]:
    """Give a writer of the rows of a base file, which appears once all are written.

    Args:
        path: Where to write.
        tokens: `[windows, context]`, as encoded.
        vocab_size: Logits of a row.
        overwrite: Replace an existing file.

    Raises:
        SpecError: The file exists, or other than every scored token's row was added.
    """
    windows, context = tokens.shape
    with atomic_file(path, overwrite=overwrite) as file:
        counts = np.array([context, vocab_size, windows], _I32)
        file.write(MAGIC + counts.tobytes())
        file.write(np.ascontiguousarray(tokens, _I32).data)
        writer = LogitsWriter(file, vocab_size)
        yield writer
        expected = windows * scored_per_window(context)
        if writer.rows != expected:
            raise SpecError(
                f"{shown(path)}: {writer.rows} rows were added, expected {expected}"
            )


@jax.jit
def encode_rows(logits: Any) -> tuple[Any, Any]:
    """Return scale and lowest log-probability `[n, 2]`, and u16 codes `[n, vocab]`."""
    logits = jnp.asarray(logits, jnp.float32)
    top = logits.max(-1, keepdims=True)
    low = jnp.maximum(logits.min(-1, keepdims=True), top - RANGE)
    total = jnp.log(jnp.sum(jnp.exp(logits - top), -1, keepdims=True))
    scale = (top - low) / _STEPS
    codes = jnp.round((logits - low) / jnp.where(scale > 0, scale, 1.0))
    codes = jnp.where(logits > low, codes, 0.0).astype(jnp.uint16)
    return jnp.concatenate([scale, low - top - total], -1), codes


@jax.jit
def decode_rows(line: Any, codes: Any) -> Any:
    """Return log-probabilities `[n, vocab]` of what `encode_rows` returned."""
    return line[:, :1] * codes.astype(jnp.float32) + line[:, 1:]

"""Scoring against a base file, and writing one: see `qjax.evaluate.logits_file`.

Logits are formed for as many scored tokens at a time as `scoring.LOGITS_BYTES` allows,
and a file's rows are read or written beside them, so neither a window's logits nor the
file is ever held whole.

As in llama.cpp, entries whose stored log-probability is at most -16 add no divergence:
the file keeps nothing of what lies lower.
"""

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import SpecError
from qjax.evaluate import scoring
from qjax.evaluate.logits_file import (
    RANGE,
    LogitsFile,
    LogitsWriter,
    decode_rows,
    write_logits,
)
from qjax.evaluate.scoring import Scorer, TokenScores, distances
from qjax.evaluate.windows import Windows
from qjax.io.files import shown

PROTOCOL = "llama.cpp"


def require_protocol(protocol: str) -> None:
    """Raise SpecError where base files hold no windows of this protocol."""
    if protocol != PROTOCOL:
        raise SpecError(
            f"perplexity: a base file holds windows of protocol {PROTOCOL!r}, got "
            f"protocol {protocol!r}; evaluate with protocol {PROTOCOL!r}"
        )


def windows_of(file: LogitsFile, plan: Windows) -> Windows:
    """Return the windows of `plan` that are in the file.

    Raises:
        SpecError: The file's windows are others: another context, text or tokenizer.
    """
    name = shown(file.path)
    if plan.context != file.context:
        raise SpecError(
            f"perplexity: context is {plan.context}, but {name} holds windows of "
            f"{file.context} tokens; evaluate with context {file.context}"
        )
    if len(plan) < file.windows:
        raise SpecError(
            f"perplexity: the text has {len(plan)} windows of {plan.context} tokens, "
            f"but {name} holds {file.windows}; it was made from another text or "
            "tokenizer"
        )
    tokens = plan.tokens[: file.tokens.size].reshape(file.tokens.shape)
    differs = tokens != file.tokens
    if differs.any():
        at = np.unravel_index(int(differs.argmax()), differs.shape)
        raise SpecError(
            f"perplexity: window {at[0]}, token {at[1]} has id {tokens[at]} in the "
            f"text and {file.tokens[at]} in {name}; it was made from another text or "
            "tokenizer"
        )
    return plan.limit(file.windows)


def score_with_files(
    model: Scorer,
    windows: Windows,
    *,
    baseline: Scorer | LogitsFile | None = None,
    write: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenScores:
    """Score windows as `score_windows` does, with files on one side or both.

    Args:
        model: The model to judge.
        windows: What to read; with a file, of protocol `llama.cpp`, and with that of a
            baseline its first ones.
        baseline: The original, or a file of what it said.
        write: Where to store the model's own log-probabilities.
        overwrite: Replace an existing file there.
        batch: Windows per step.
        progress: Called with the windows done and their number.

    Raises:
        SpecError: Model, baseline and windows do not belong together, or the file to
            write exists.
        FormatError: A row of the baseline's file is no distribution.
        NonFiniteError: The model's output is NaN or infinite; nothing is written.
    """
    if write is None and not isinstance(baseline, LogitsFile):
        return scoring.score_windows(
            model, windows, baseline=baseline, batch=batch, progress=progress
        )
    scoring.check(model, windows, baseline)
    target = nullcontext()
    if write is not None:
        count = len(windows) * windows.context
        tokens = windows.tokens[:count].reshape(-1, windows.context)
        target = write_logits(write, tokens, model.vocab_size, overwrite=overwrite)
    start = 0

    with target as writer:

        def score(tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
            nonlocal start
            found = _score_batch(model, baseline, writer, start, tokens, mask)
            start += len(found["nll"])
            return found

        return scoring.in_batches(windows, score, batch, progress)


def _score_batch(
    model: Scorer,
    baseline: Scorer | LogitsFile | None,
    writer: LogitsWriter | None,
    start: int,
    tokens: np.ndarray,
    mask: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return the scores of one batch, whose first scored token is row `start`."""
    keep = mask[:, 1:]
    targets = tokens[:, 1:][keep]
    first = int(keep[0].argmax())
    rows = min(scoring.rows_at_once(model), len(targets))
    blocks = _Blocks(model, tokens, first, rows)
    others = (
        _Blocks(baseline, tokens, first, rows) if isinstance(baseline, Scorer) else None
    )
    parts = []
    for index, begin in enumerate(range(0, len(targets), rows)):
        target = targets[begin : begin + rows]
        count = len(target)
        logits = blocks.logits(index)
        if writer is not None:
            writer.add(logits[:count])
        logq, floor = None, -np.inf
        if isinstance(baseline, LogitsFile):
            logq = _stored(baseline, start + begin, count, rows)
            floor = -RANGE
        elif others is not None:
            logq = jax.nn.log_softmax(others.logits(index))
        target = np.pad(target, (0, rows - count))
        out = _judge(logits, logq, target, floor)
        parts.append({name: np.asarray(x)[:count] for name, x in out.items()})
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    scoring.require_finite(joined["nll"])
    return joined


class _Blocks:
    """Logits of a batch's scored tokens, `rows` at a time."""

    def __init__(self, model: Scorer, tokens: np.ndarray, first: int, rows: int):
        hidden = scoring.hidden_states(model, tokens)
        self._model, self._hidden = model, _cut(hidden, first, rows)

    def logits(self, index: int) -> Any:
        return _logits(self._model.logits, self._model.params, self._hidden, index)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cut(hidden: Any, first: int, rows: int) -> Any:
    """Return `[blocks, rows, dim]`: positions from `first` on, window by window."""
    flat = hidden[:, first:].reshape(-1, hidden.shape[-1])
    short = -len(flat) % rows
    return jnp.pad(flat, ((0, short), (0, 0))).reshape(-1, rows, hidden.shape[-1])


@functools.partial(jax.jit, static_argnums=0)
def _logits(head: Callable[..., Any], params: Any, blocks: Any, index: Any) -> Any:
    return head(params, blocks[index]).astype(jnp.float32)


@jax.jit
def _judge(logits: Any, logq: Any, target: Any, floor: Any) -> dict[str, Any]:
    logp = jax.nn.log_softmax(logits)
    if logq is None:
        return {"nll": -scoring.pick(logp, target)}
    return distances(logp, logq, target, floor)


def _stored(file: LogitsFile, begin: int, count: int, rows: int) -> Any:
    """Return stored log-probabilities `[rows, vocab]`, zero beyond the `count` read."""
    line, codes = file.read(begin, begin + count)
    if count < rows:
        line, codes = (np.pad(x, ((0, rows - count), (0, 0))) for x in (line, codes))
    logq = decode_rows(line, codes)
    file.release()
    return logq

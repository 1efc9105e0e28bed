"""Perplexity under named protocols, and distance from a baseline.

A perplexity without its protocol means nothing, so every result carries protocol,
window, stride, BOS policy, a hash of the text and the number of scored tokens.

`perplexity = exp(mean nll)` over scored tokens, and `bits_per_byte = sum nll / (ln 2 *
bytes)` over the bytes of the same tokens, which compares models of different
vocabularies.

Refuses: a text shorter than one window; a context longer than the model's; a tokenizer
or a baseline of another vocabulary; a base file of another protocol, context or text.
"""

import hashlib
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from qjax.errors import SpecError
from qjax.evaluate.logits_file import LogitsFile
from qjax.evaluate.scoring import Scorer, as_scorer
from qjax.evaluate.statistics import summarize
from qjax.evaluate.stored import require_protocol, score_with_files, windows_of
from qjax.evaluate.windows import Windows, plan_windows
from qjax.text import Tokenizer


def evaluate(
    model: Any,
    tokenizer: Tokenizer,
    text: str,
    *,
    protocol: str = "gptq",
    context: int = 512,
    stride: int | None = None,
    windows: int | None = None,
    baseline: Any = None,
    write_logits: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a model on a text, and against a baseline where one is given.

    Args:
        model: A `qjax.models.Decoder`, or a `Scorer`.
        tokenizer: The model's tokenizer.
        text: Plain text, used as it is.
        protocol: `gptq`, `stride` or `llama.cpp`; see `plan_windows`.
        context: Window length in tokens.
        stride: For protocol `stride`: step between windows; half the context by
            default.
        windows: Read only this many windows, from the start.
        baseline: The original model, or the path of what it said of the same text:
            a base file of `llama-perplexity --kl-divergence-base` or `write_logits`,
            whose windows are then read. Adds its perplexity, the KL divergence from
            it, how the right tokens' probabilities moved and how often both rank the
            same token first.
        write_logits: Where to store what the model says of every scored token, for
            later runs and for `llama-perplexity --kl-divergence`; see
            `qjax.evaluate.logits_file` for the size.
        overwrite: Replace an existing file there.
        batch: Windows per step; the result does not depend on it.
        progress: Called with the windows done and their number.

    Returns:
        A dict ready for JSON: `protocol, context, stride, windows, bos, text_sha256,
        text_bytes, tokens, perplexity, perplexity_stderr, bits_per_byte, seconds`, and
        with a baseline `baseline_perplexity, perplexity_ratio, perplexity_difference,
        ln_perplexity_ratio, delta_p, delta_p_rms, kl_divergence, top1_agreement`, each
        with its `..._stderr`, and `ln_perplexity_correlation, kl_percentiles,
        delta_p_percentiles`; see `qjax.evaluate.statistics`.

    Raises:
        SpecError: See the module's refusals.
        FormatError: The baseline's file is damaged.
        NonFiniteError: The model returned NaN or infinity.

    Reference:
        llama.cpp `tools/perplexity` for the set of distances and their errors.
    """
    start = time.perf_counter()
    scorer = as_scorer(model)
    original = _original(baseline)
    if write_logits is not None or isinstance(original, LogitsFile):
        require_protocol(protocol)
    tokenizer.check_vocab(scorer.vocab_size)
    if context > scorer.max_context:
        raise SpecError(
            f"perplexity: context {context} is longer than the model's context of "
            f"{scorer.max_context}; use a smaller context"
        )
    tokens, byte_ends = tokenizer.encode_with_bytes(text)
    plan = plan_windows(
        np.asarray(tokens, np.int32),
        protocol,
        context,
        stride=stride,
        bos_id=tokenizer.bos_id if tokenizer.adds_bos else None,
    )
    if isinstance(original, LogitsFile):
        plan = windows_of(original, plan)
    plan = plan.limit(windows)
    scores = score_with_files(
        scorer,
        plan,
        baseline=original,
        write=write_logits,
        overwrite=overwrite,
        batch=batch,
        progress=progress,
    )
    encoded = text.encode()
    return {
        "protocol": protocol,
        "context": context,
        "stride": _stride(protocol, context, stride),
        "windows": len(plan),
        "bos": _bos_policy(protocol, tokenizer),
        "text_sha256": hashlib.sha256(encoded).hexdigest(),
        "text_bytes": len(encoded),
        **summarize(scores, _scored_bytes(plan, np.asarray(byte_ends))),
        "seconds": time.perf_counter() - start,
    }


def _original(baseline: Any) -> Scorer | LogitsFile | None:
    """Return a baseline as what can be compared with."""
    if isinstance(baseline, str | os.PathLike):
        return LogitsFile(baseline)
    return None if baseline is None else as_scorer(baseline)


def _scored_bytes(plan: Windows, byte_ends: np.ndarray) -> int:
    """Return how many bytes of the text the scored tokens spell."""
    ends = np.concatenate([[0], byte_ends])
    index = plan.scored_tokens()
    return int((ends[index + 1] - ends[index]).sum())


def _stride(protocol: str, context: int, stride: int | None) -> int:
    if protocol != "stride":
        return context
    return context // 2 if stride is None else stride


def _bos_policy(protocol: str, tokenizer: Tokenizer) -> str:
    """Return where BOS stands: `none`, `text start` or `every window`."""
    if not tokenizer.adds_bos:
        return "none"
    return "every window" if protocol == "llama.cpp" else "text start"

"""Perplexity under named protocols, and distance from a baseline.

A perplexity without its protocol means nothing, so every result carries protocol,
window, stride, BOS policy, a hash of the text and the number of scored tokens.

`perplexity = exp(mean nll)` over scored tokens, and `bits_per_byte = sum nll / (ln 2 *
bytes)` over the bytes of the same tokens, which compares models of different
vocabularies.

Refuses: a text shorter than one window; a context longer than the model's; a tokenizer
or a baseline of another vocabulary.
"""

import hashlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from qjax.errors import SpecError
from qjax.evaluate.scoring import TokenScores, as_scorer, score_windows
from qjax.evaluate.windows import Windows, plan_windows
from qjax.text import Tokenizer

_PERCENTILES = (1, 5, 50, 95, 99, 99.9)


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
        baseline: The original model; adds its perplexity, the KL divergence from it
            and how often both rank the same token first.
        batch: Windows per step; the result does not depend on it.
        progress: Called with the windows done and their number.

    Returns:
        A dict ready for JSON: `protocol, context, stride, windows, bos, text_sha256,
        text_bytes, tokens, perplexity, perplexity_stderr, bits_per_byte, seconds`, and
        with a baseline `baseline_perplexity, perplexity_ratio, kl_divergence,
        kl_divergence_stderr, kl_percentiles, top1_agreement, top1_agreement_stderr`.

    Raises:
        SpecError: See the module's refusals.
        NonFiniteError: The model returned NaN or infinity.

    Reference:
        llama.cpp `tools/perplexity` for the set of distances and their errors.
    """
    start = time.perf_counter()
    scorer = as_scorer(model)
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
    ).limit(windows)
    scores = score_windows(
        scorer,
        plan,
        baseline=None if baseline is None else as_scorer(baseline),
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


def summarize(scores: TokenScores, scored_bytes: int | None = None) -> dict[str, Any]:
    """Return the numbers of a result from the scores of its tokens.

    Args:
        scores: One number per token.
        scored_bytes: Bytes those tokens spell; None leaves bits per byte out.
    """
    nll = scores.nll.astype(np.float64)
    perplexity = float(np.exp(nll.mean()))
    result: dict[str, Any] = {
        "tokens": len(nll),
        "perplexity": perplexity,
        "perplexity_stderr": perplexity * _standard_error(nll),
    }
    if scored_bytes:
        result["bits_per_byte"] = float(nll.sum() / np.log(2) / scored_bytes)
    if scores.baseline_nll is not None:
        base = float(np.exp(scores.baseline_nll.astype(np.float64).mean()))
        result |= {"baseline_perplexity": base, "perplexity_ratio": perplexity / base}
    if scores.kl is not None:
        kl = scores.kl.astype(np.float64)
        result |= {
            "kl_divergence": float(kl.mean()),
            "kl_divergence_stderr": _standard_error(kl),
            "kl_percentiles": {
                str(p): float(np.percentile(kl, p)) for p in _PERCENTILES
            }
            | {"max": float(kl.max())},
        }
    if scores.agree is not None:
        agree = scores.agree.astype(np.float64)
        result |= {
            "top1_agreement": float(agree.mean()),
            "top1_agreement_stderr": _standard_error(agree),
        }
    return result


def _standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean, tokens taken as independent."""
    if len(values) < 2:
        return 0.0
    return float(values.std(ddof=1) / np.sqrt(len(values)))


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

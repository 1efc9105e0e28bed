"""What the scores of tokens say: perplexity, and distances from a baseline.

`perplexity = exp(mean nll)` over scored tokens. Against a baseline, the statistics are
those that llama.cpp's `llama-perplexity --kl-divergence` prints, each with the standard
error of its mean where tokens are taken as independent; errors of ratio and difference
count that both models are judged on the same tokens. `delta_p` is how much more
probable the model finds the right token than the baseline does; it, its root mean
square and `top1_agreement` are fractions, not percent.

Reference:
    llama.cpp `tools/perplexity/perplexity.cpp`, and the tables of its README.
"""

from typing import Any

import numpy as np

from qjax.evaluate.scoring import TokenScores

_KL_PERCENTILES = (0.1, 1, 5, 10, 50, 90, 95, 99, 99.9)
_DELTA_PERCENTILES = (0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)


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
        base = scores.baseline_nll.astype(np.float64)
        result |= _perplexities(nll, base) | _delta_p(np.exp(-nll) - np.exp(-base))
    if scores.kl is not None:
        kl = scores.kl.astype(np.float64)
        result |= {
            "kl_divergence": float(kl.mean()),
            "kl_divergence_stderr": _standard_error(kl),
            "kl_percentiles": _percentiles(kl, _KL_PERCENTILES),
        }
    if scores.agree is not None:
        agree = scores.agree.astype(np.float64)
        result |= {
            "top1_agreement": float(agree.mean()),
            "top1_agreement_stderr": _standard_error(agree),
        }
    return result


def _perplexities(nll: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """Return how the two models' perplexities compare."""
    perplexity, baseline = (float(np.exp(x.mean())) for x in (nll, base))
    log_ratio, error = float((nll - base).mean()), _standard_error(nll - base)
    ratio = float(np.exp(log_ratio))
    return {
        "baseline_perplexity": baseline,
        "baseline_perplexity_stderr": baseline * _standard_error(base),
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio * error,
        "ln_perplexity_ratio": log_ratio,
        "ln_perplexity_ratio_stderr": error,
        "ln_perplexity_correlation": _correlation(nll, base),
        "perplexity_difference": perplexity - baseline,
        "perplexity_difference_stderr": _standard_error(
            perplexity * nll - baseline * base
        ),
    }


def _delta_p(delta: np.ndarray) -> dict[str, Any]:
    """Return how far the right tokens' probabilities moved."""
    square = delta * delta
    rms = float(np.sqrt(square.mean()))
    return {
        "delta_p": float(delta.mean()),
        "delta_p_stderr": _standard_error(delta),
        "delta_p_rms": rms,
        "delta_p_rms_stderr": _standard_error(square) / (2 * rms) if rms else 0.0,
        "delta_p_percentiles": _percentiles(delta, _DELTA_PERCENTILES),
    }


def _standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean, tokens taken as independent."""
    if len(values) < 2:
        return 0.0
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return Pearson's correlation; None where one of both never changes."""
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread else None


def _percentiles(values: np.ndarray, at: tuple[float, ...]) -> dict[str, float]:
    """Return percentiles by name, between the least and the largest value."""
    found = {str(p): float(np.percentile(values, p)) for p in at}
    return {"min": float(values.min()), **found, "max": float(values.max())}

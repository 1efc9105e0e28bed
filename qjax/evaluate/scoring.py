"""What models say about every token: negative log-likelihood, KL divergence, agreement.

Logits are formed and reduced for a few tokens at a time, so that a vocabulary of 256k
costs `LOGITS_BYTES` of float32 logits per model and not `batch * context * vocab * 4`
bytes (2 GB for one window of 2048). A baseline is read beside the model, batch by
batch; nothing of it is stored but one number per token.

Numerics: log-softmax in float32 whatever the model computes in; sums over tokens in
float64 on the host.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from qjax.errors import NonFiniteError, SpecError
from qjax.evaluate.logits_file import LogitsFile
from qjax.evaluate.windows import Windows
from qjax.models import Decoder

LOGITS_BYTES = 64 * 1024 * 1024
BATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A causal model as two pure functions, cut where its logits would be formed.

    Attributes:
        params: Arrays of the model; any pytree.
        hidden: `(params, tokens[batch, length]) -> [batch, length, dim]`.
        logits: `(params, hidden[n, dim]) -> [n, vocab]`.
        vocab_size: Logits per token.
        max_context: Longest window the model reads.
    """

    params: Any
    hidden: Callable[[Any, Array], Array]
    logits: Callable[[Any, Array], Array]
    vocab_size: int
    max_context: int


@dataclasses.dataclass(frozen=True)
class _Method:
    """A method of a Flax module as a pure function of its arrays; equal if it is."""

    graph: Any
    name: str

    def __call__(self, params: Any, x: Any) -> Any:
        """Return `module.name(x)` for the module with these arrays, without a cache."""
        out = getattr(nnx.merge(self.graph, params), self.name)(x)
        return out[0] if isinstance(out, tuple) else out


def as_scorer(model: Any) -> Scorer:
    """Return `model` as a `Scorer`: itself, or a `qjax.models.Decoder` taken apart."""
    if isinstance(model, Scorer):
        return model
    if not isinstance(model, Decoder):
        raise SpecError(
            f"evaluate: got {type(model).__name__}, expected a qjax.models.Decoder "
            "or a qjax.evaluate.Scorer"
        )
    graph, params = nnx.split(model)
    config = model.config
    return Scorer(
        params=params,
        hidden=_Method(graph, "hidden"),
        logits=_Method(graph, "logits"),
        vocab_size=config.vocab_size,
        max_context=config.max_context,
    )


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """One number per scored token, in window order.

    Attributes:
        nll: `-log p(token)` in nats.
        baseline_nll: The same under the baseline, or None.
        kl: `sum_v p_baseline(v) log(p_baseline(v) / p(v))` in nats, or None.
        agree: Whether both models' most probable tokens are the same, or None.
    """

    nll: np.ndarray
    baseline_nll: np.ndarray | None = None
    kl: np.ndarray | None = None
    agree: np.ndarray | None = None


def score_windows(
    model: Scorer,
    windows: Windows,
    *,
    baseline: Scorer | None = None,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenScores:
    """Score every token the protocol asks for.

    Args:
        model: The model to judge.
        windows: What to read; see `plan_windows`.
        baseline: The original to compare with; same vocabulary.
        batch: Windows per step; by default about `BATCH_TOKENS` tokens.
        progress: Called with the windows done and their number.

    Raises:
        SpecError: The window is longer than a model's context, a token is outside the
            vocabulary, or the vocabularies differ.
        NonFiniteError: The model's output is NaN or infinite.
    """
    check(model, windows, baseline)
    score = functools.partial(_score_batch, model, baseline)
    return in_batches(windows, score, batch, progress)


def in_batches(
    windows: Windows,
    score: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]],
    batch: int | None,
    progress: Callable[[int, int], None] | None,
) -> TokenScores:
    """Return the scores of all windows from those of each batch's tokens and mask."""
    if batch is None:
        batch = max(1, BATCH_TOKENS // windows.context)
    batch = min(batch, len(windows))
    parts: list[dict[str, np.ndarray]] = []
    for tokens, mask in windows.batches(batch):
        parts.append(score(tokens, mask))
        if progress is not None:
            progress(min(len(parts) * batch, len(windows)), len(windows))
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return TokenScores(**joined)


def check(
    model: Scorer, windows: Windows, baseline: Scorer | LogitsFile | None
) -> None:
    """Raise SpecError where model, baseline and windows do not belong together."""
    for name, scorer in (("model", model), ("baseline", baseline)):
        if isinstance(scorer, Scorer) and windows.context > scorer.max_context:
            raise SpecError(
                f"perplexity: context {windows.context} is longer than the {name}'s "
                f"context of {scorer.max_context}; use a smaller context"
            )
    if baseline is not None and baseline.vocab_size != model.vocab_size:
        raise SpecError(
            f"perplexity: the model has {model.vocab_size} tokens in its vocabulary "
            f"and the baseline {baseline.vocab_size}; compare models that share a "
            "tokenizer"
        )
    largest = int(windows.tokens.max())
    if largest >= model.vocab_size:
        raise SpecError(
            f"perplexity: the text has token id {largest}, but the model's vocabulary "
            f"is {model.vocab_size}; this tokenizer belongs to another model"
        )


def _score_batch(
    model: Scorer, baseline: Scorer | None, tokens: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the scores of one batch's scored tokens."""
    rows = rows_at_once(model)
    hidden = hidden_states(model, tokens)
    if baseline is None:
        out = _judge(model.logits, model.params, hidden, tokens, rows)
        out = {"nll": out["nll"]}
    else:
        other = hidden_states(baseline, tokens)
        out = _compare(
            (model.logits, baseline.logits),
            (model.params, baseline.params),
            (hidden, other),
            tokens,
            rows,
        )
    keep = mask[:, 1:]
    result = {name: np.asarray(value)[keep] for name, value in out.items()}
    require_finite(result["nll"])
    return result


def require_finite(nll: np.ndarray) -> None:
    """Raise NonFiniteError where the model's logits gave no number."""
    if not np.isfinite(nll).all():
        raise NonFiniteError(
            "perplexity: the model's logits are NaN or infinite; look for non-finite "
            "weights with `qjax inspect`, or use a wider compute dtype"
        )


def rows_at_once(model: Scorer) -> int:
    """Return how many tokens' logits are formed at once."""
    return max(1, LOGITS_BYTES // (4 * model.vocab_size))


def judge_rows(model: Scorer, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what the model says about every token but the first of each row.

    Args:
        model: The model.
        tokens: `[batch, length + 1]`; right padding changes nothing before it.

    Returns:
        Log-probabilities `[batch, length]`, and whether each token is the most
        probable one.
    """
    hidden = hidden_states(model, tokens)
    out = _judge(model.logits, model.params, hidden, tokens, rows_at_once(model))
    return -np.asarray(out["nll"]), np.asarray(out["greedy"])


def hidden_states(model: Scorer, tokens: np.ndarray) -> Any:
    """Return what precedes the head, for every token but the last of a row."""
    return _hidden(model.hidden, model.params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(function: Callable[..., Any], params: Any, tokens: Any) -> Any:
    return function(params, tokens[:, :-1])


@functools.partial(jax.jit, static_argnums=(0, 4))
def _judge(head: Any, params: Any, hidden: Any, tokens: Any, rows: int) -> Any:
    """Return `-log p(next token)`, and whether it is the first choice, everywhere."""

    def score(block: Any) -> Any:
        h, target = block
        logp = jax.nn.log_softmax(head(params, h).astype(jnp.float32))
        return {"nll": -pick(logp, target), "greedy": logp.argmax(-1) == target}

    return _in_blocks(score, (hidden, tokens[:, 1:]), rows)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _compare(heads: Any, params: Any, hidden: Any, tokens: Any, rows: int) -> Any:
    """Return the scores of `TokenScores` at every position."""

    def score(block: Any) -> Any:
        (h, h_base), target = block
        logp, logq = (
            jax.nn.log_softmax(head(p, x).astype(jnp.float32))
            for head, p, x in zip(heads, params, (h, h_base), strict=True)
        )
        return distances(logp, logq, target)

    return _in_blocks(score, (hidden, tokens[:, 1:]), rows)


def distances(logp: Any, logq: Any, target: Any, floor: float = -math.inf) -> Any:
    """Return the scores of `TokenScores` from log-probabilities `[n, vocab]`.

    Args:
        logp: The model's.
        logq: The baseline's.
        target: The tokens that follow, `[n]`.
        floor: Entries that the baseline holds at most this probable add no divergence.
    """
    terms = jnp.where(logq > floor, jnp.exp(logq) * (logq - logp), 0.0)
    return {
        "nll": -pick(logp, target),
        "baseline_nll": -pick(logq, target),
        "kl": jnp.sum(terms, axis=-1),
        "agree": logp.argmax(-1) == logq.argmax(-1),
    }


def pick(logp: Any, target: Any) -> Any:
    """Return each row's log-probability of its target."""
    return jnp.take_along_axis(logp, target[:, None], axis=-1)[:, 0]


def _in_blocks(function: Callable[[Any], Any], inputs: Any, rows: int) -> Any:
    """Map `function` over `[batch, length, ...]` inputs, `rows` positions at a time."""
    batch, length = jax.tree.leaves(inputs)[0].shape[:2]
    count = batch * length
    rows = min(rows, count)
    blocks = -(-count // rows)

    def cut(x: Any) -> Any:
        x = x.reshape((count, *x.shape[2:]))
        x = jnp.pad(x, [(0, blocks * rows - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape((blocks, rows, *x.shape[1:]))

    out = jax.lax.map(function, jax.tree.map(cut, inputs))
    return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(batch, length), out)

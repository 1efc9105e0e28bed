"""Choosing the next token from logits.

Order, as in transformers: repetition penalty, temperature, top-k, top-p, min-p, then a
draw. Every setting is an array with one number per row, so that no setting compiles
anything anew and rows of one batch may differ.

Costs: a greedy batch is one argmax; the vocabulary is sorted only while some row asks
for top-k or top-p.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from qjax.errors import SpecError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of a batch, one number per row.

    Attributes:
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Keep this many most probable tokens; 0 keeps all.
        top_p: Keep the fewest tokens whose probability reaches this; 1 keeps all.
        min_p: Keep tokens at least this times as probable as the first; 0 keeps all.
        repetition_penalty: Divides positive and multiplies negative logits of tokens
            that already occur in prompt or answer; 1 changes nothing.
    """

    temperature: Float[Array | np.ndarray, " batch"]
    top_k: Int[Array | np.ndarray, " batch"]
    top_p: Float[Array | np.ndarray, " batch"]
    min_p: Float[Array | np.ndarray, " batch"]
    repetition_penalty: Float[Array | np.ndarray, " batch"]


_BOUNDS = {
    "temperature": (0.0, 100.0, "0 (greedy) to 100"),
    "top_k": (0, 2**31 - 1, "0 (all) or more"),
    "top_p": (1e-9, 1.0, "above 0, up to 1 (all)"),
    "min_p": (0.0, 1.0, "0 (all) to 1"),
    "repetition_penalty": (1e-3, 1e3, "0.001 to 1000; 1 changes nothing"),
}


def make_sampling(batch: int, **settings: float | Sequence[float]) -> Sampling:
    """Return checked settings; each is one number, or one per row.

    Raises:
        SpecError: A number is outside its range, or there are not `batch` of them.
    """
    defaults = {name: 1.0 if name in ("top_p", "repetition_penalty") else 0.0
                for name in _BOUNDS}  # fmt: skip
    arrays = {}
    for name, value in {**defaults, **settings}.items():
        low, high, words = _BOUNDS[name]
        array = np.asarray(value, np.float64)
        if array.ndim > 1 or (array.ndim == 1 and len(array) != batch):
            raise SpecError(
                f"{name}: got shape {array.shape}, expected one number or {batch}, one "
                "per prompt"
            )
        if not ((array >= low) & (array <= high)).all():
            raise SpecError(f"{name}={value}: expected {words}")
        dtype = np.int32 if name == "top_k" else np.float32
        if dtype is np.int32 and (array != np.floor(array)).any():
            raise SpecError(f"{name}={value}: expected whole numbers")
        arrays[name] = np.broadcast_to(array, (batch,)).astype(dtype)
    return Sampling(**arrays)


def sample(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    settings: Sampling,
) -> Int[Array, " batch"]:
    """Return one token per row.

    A row's token depends on its own logits, key and settings alone.

    Args:
        logits: Scores of the next token.
        seen: Tokens that occur in prompt or answer.
        keys: One random key per row.
        settings: See `Sampling`.
    """
    logits = penalize(logits, seen, settings.repetition_penalty)
    best = _argmax(logits)
    greedy = settings.temperature <= 0

    def draw() -> Int[Array, " batch"]:
        scaled = logits / jnp.where(greedy, 1.0, settings.temperature)[:, None]
        kept = jnp.where(scaled >= threshold(scaled, settings), scaled, -jnp.inf)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(greedy, best, drawn)

    return jax.lax.cond(jnp.all(greedy), lambda: best, draw)


def _argmax(x: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """Return what `jnp.argmax` does, by two reductions that XLA:CPU vectorizes."""
    places = jnp.arange(x.shape[-1], dtype=jnp.int32)
    best = (x >= x.max(-1, keepdims=True)) | jnp.isnan(x)
    return jnp.where(best, places, x.shape[-1] - 1).min(-1)


def penalize(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    penalty: Float[Array | np.ndarray, " batch"],
) -> Float[Array, "batch vocab"]:
    """Return logits with those of seen tokens moved down by `penalty`.

    Reference:
        Keskar et al. 2019, "CTRL", section 4.1.
    """
    factor = penalty[:, None]
    moved = jnp.where(logits > 0, logits / factor, logits * factor)
    return jnp.where(seen, moved, logits)


def threshold(
    logits: Float[Array, "batch vocab"], settings: Sampling
) -> Float[Array, "batch 1"]:
    """Return the least logit that top-k, top-p and min-p together keep.

    Tokens that tie with the last one kept are kept too.
    """
    top = logits.max(-1, keepdims=True)
    floor = top + jnp.log(settings.min_p)[:, None]
    sorting = jnp.any((settings.top_k > 0) | (settings.top_p < 1))
    sorted_floor = jax.lax.cond(
        sorting,
        lambda: _sorted_threshold(logits, settings),
        lambda: jnp.full_like(top, -jnp.inf),
    )
    return jnp.maximum(floor, sorted_floor)


def _sorted_threshold(
    logits: Float[Array, "batch vocab"], settings: Sampling
) -> Float[Array, "batch 1"]:
    """Return the least logit that top-k and then top-p keep."""
    vocab = logits.shape[-1]
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    count = jnp.where(settings.top_k > 0, settings.top_k, vocab)
    last = jnp.clip(count - 1, 0, vocab - 1)[:, None]
    ordered = jnp.where(
        ordered >= jnp.take_along_axis(ordered, last, axis=-1), ordered, -jnp.inf
    )
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    top_p = settings.top_p[:, None]
    kept = ((before < top_p) | (top_p >= 1)) & (ordered > -jnp.inf)
    kept = kept.at[:, 0].set(True)
    return jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)

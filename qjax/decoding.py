"""The compiled half of generation: one prefill and one decode program per shape.

Decides: prompts are padded on the right and told apart by positions, so one program
serves every prompt length; cache lengths come in few sizes (`cache_bucket`), so a pair
(batch, bucket) compiles once, whatever the prompts and the sampling settings. Prefill
reads prompts in chunks inside one loop and forms logits of the last token only. Decode
runs up to `STEPS` steps per dispatch and stops when all rows have ended.

Costs: the cache, `batch * bucket` slots, updated in place; `batch * vocab` bytes for
the repetition penalty.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, Key, UInt32

from qjax.models import Decoder, KVCache
from qjax.sampling import Sampling, make_sampling, sample

STEPS = 32
STOP_IDS = 16
_SMALLEST_BUCKET = 64
_LARGEST_POWER = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts and settings of one batch.

    Attributes:
        tokens: Prompts, padded on the right to the cache length.
        lengths: Tokens of each prompt; at least 1.
        seeds: One seed per row.
        stop_ids: Ids that end a row, filled with -1.
        settings: Sampling settings.
    """

    tokens: Int[Array | np.ndarray, "batch length"]
    lengths: Int[Array | np.ndarray, " batch"]
    seeds: UInt32[Array | np.ndarray, " batch"]
    stop_ids: Int[Array | np.ndarray, " stops"]
    settings: Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What one decode program hands to the next; donated, so updated in place.

    Attributes:
        cache: Keys and values of everything read so far.
        token: Last token drawn, not yet read.
        position: Position of that token.
        finished: Rows that drew an end token.
        seen: Tokens that occur in each row.
        keys: Random key of each row; step `n` folds in `n`.
        step: Tokens drawn so far.
    """

    cache: KVCache
    token: Int[Array, " batch"]
    position: Int[Array, " batch"]
    finished: Bool[Array, " batch"]
    seen: Bool[Array, "batch vocab"]
    keys: Key[Array, " batch"]
    step: Int[Array, ""]


def cache_bucket(tokens: int, max_context: int) -> int:
    """Return the cache length that serves `tokens`: few values, little waste.

    Powers of two from 64 to 1024, then multiples of 1024; never above the context.
    """
    if tokens <= _LARGEST_POWER:
        bucket = max(_SMALLEST_BUCKET, 1 << (tokens - 1).bit_length())
    else:
        bucket = -(-tokens // _LARGEST_POWER) * _LARGEST_POWER
    return min(bucket, max_context)


def programs(
    model: Decoder,
    batch: int,
    length: int,
    cache_dtype: Any = None,
    cache_rotate: str = "none",
) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """Return compiled prefill and decode, and the arrays they take first.

    `prefill(params, batch) -> state, tokens[batch]` and `decode(params, state, batch,
    steps) -> state, tokens[batch, STEPS], steps done`. Both are compiled here, ahead of
    their first call, and kept for models of the same structure and shapes.

    Args:
        model: The model.
        batch: Rows.
        length: Slots of the cache; see `cache_bucket`.
        cache_dtype: Dtype of the cache; see `Decoder.init_cache`.
        cache_rotate: The same.
    """
    graph, params = nnx.split(model)
    leaves, tree = jax.tree.flatten(params)
    shapes = tuple(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
        for x in leaves
    )
    cache = (cache_dtype, cache_rotate)
    return (*_compile(graph, tree, shapes, batch, length, cache), params)


@functools.lru_cache(maxsize=32)
def _compile(
    graph: Any,
    tree: Any,
    shapes: tuple[Any, ...],
    batch: int,
    length: int,
    cache: tuple[Any, str],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compile prefill and decode for one structure and shape."""
    params = jax.tree.unflatten(tree, shapes)
    inputs = Batch(
        tokens=np.zeros((batch, length), np.int32),
        lengths=np.zeros(batch, np.int32),
        seeds=np.zeros(batch, np.uint32),
        stop_ids=np.zeros(STOP_IDS, np.int32),
        settings=make_sampling(batch),
    )
    lowered = jax.jit(functools.partial(_prefill, graph, cache)).lower(params, inputs)
    prefill = lowered.compile()
    # Decode takes the state as prefill leaves it on the devices, and leaves it so.
    placed, _ = prefill.output_shardings
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        lowered.out_info[0],
        placed,
    )
    decode = jax.jit(
        functools.partial(_decode, graph),
        donate_argnums=1,
        out_shardings=(placed, None, None),
    )
    steps = np.int32(0)
    return prefill, decode.lower(params, state, inputs, steps).compile()


def _prefill_chunk(length: int) -> int:
    """Return how many tokens prefill reads at once: a divisor of `length`."""
    aim = min(max(length // 4, 32), 512)
    return min(length & -length, 1 << (aim.bit_length() - 1))


def _prefill(
    graph: Any, kind: tuple[Any, str], params: Any, batch: Batch
) -> tuple[State, Any]:
    """Read the prompts and draw the first token of every row."""
    model: Decoder = nnx.merge(graph, params)
    rows, length = batch.tokens.shape
    chunk = _prefill_chunk(length)
    tokens, lengths = jnp.asarray(batch.tokens), jnp.asarray(batch.lengths)
    offsets = jnp.arange(chunk, dtype=jnp.int32)

    def read(i: Any, carry: Any) -> Any:
        cache, last = carry
        start = i * chunk
        positions = jnp.broadcast_to(start + offsets, (rows, chunk))
        positions = jnp.where(positions < lengths[:, None], positions, -1)
        part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        x, cache = nnx.merge(graph, params).hidden(part, cache, positions=positions)
        at = jnp.clip(lengths - 1 - start, 0, chunk - 1)
        here = (lengths > start) & (lengths <= start + chunk)
        found = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
        return cache, jnp.where(here[:, None], found, last)

    longest = lengths.max()
    cache = model.init_cache(rows, length, kind[0], rotate=kind[1])
    last = jnp.zeros((rows, model.config.dim), model.dtype)
    cache, last = jax.lax.fori_loop(
        jnp.int32(0), (longest + chunk - 1) // chunk, read, (cache, last)
    )
    # The last chunk's padding is written over: no row has a token in those slots.
    cache = dataclasses.replace(cache, index=longest)
    seen = jnp.zeros((rows, model.config.vocab_size), bool)
    given = jnp.arange(length, dtype=jnp.int32) < lengths[:, None]
    seen = seen.at[jnp.arange(rows)[:, None], tokens].max(given)
    state = State(
        cache=cache,
        token=jnp.zeros(rows, jnp.int32),
        position=lengths - 1,
        finished=jnp.zeros(rows, bool),
        seen=seen,
        keys=jax.vmap(jax.random.key)(jnp.asarray(batch.seeds)),
        step=jnp.int32(0),
    )
    state = _draw(state, model.logits(last), batch)
    return state, state.token


def _draw(state: State, logits: Any, batch: Batch) -> State:
    """Return the state after drawing one token per row from `logits`."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.step)
    token = sample(logits, state.seen, keys, batch.settings)
    ended = (token[:, None] == batch.stop_ids).any(-1)
    return dataclasses.replace(
        state,
        token=token,
        position=state.position + 1,
        finished=state.finished | ended,
        seen=state.seen.at[jnp.arange(len(token)), token].set(True),
        step=state.step + 1,
    )


def _decode(
    graph: Any, params: Any, state: State, batch: Batch, steps: Any
) -> tuple[State, Any, Any]:
    """Draw up to `steps` tokens per row, fewer once every row has ended."""

    def unfinished(carry: Any) -> Any:
        state, _, done = carry
        return (done < steps) & ~state.finished.all()

    def step(carry: Any) -> Any:
        state, drawn, done = carry
        model: Decoder = nnx.merge(graph, params)
        x, cache = model.hidden(
            state.token[:, None], state.cache, positions=state.position[:, None]
        )
        state = dataclasses.replace(state, cache=cache)
        state = _draw(state, model.logits(x[:, 0]), batch)
        return state, drawn.at[:, done].set(state.token), done + 1

    drawn = jnp.zeros((len(state.token), STEPS), jnp.int32)
    return jax.lax.while_loop(unfinished, step, (state, drawn, jnp.int32(0)))

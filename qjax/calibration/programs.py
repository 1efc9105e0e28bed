"""The compiled functions that touch a decoder's activations while it is calibrated.

Blocks that compute alike share them: a layer is named by the first one of its kind.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qjax.calibration.capture import capture
from qjax.methods import Statistics
from qjax.models.attention import layer_numbers
from qjax.models.block import Block
from qjax.models.config import ModelConfig
from qjax.models.decoder import positions_of
from qjax.models.layers import Embedding, Norm, below
from qjax.ops.inputs import rounded_input

Leaves = Mapping[str, Any]
"""Parameters by path."""


def first_alike(config: ModelConfig, layer: int) -> int:
    """The first layer with the window, rotary table and scale of this one."""

    def numbers(i: int) -> tuple[Any, ...]:
        window = config.windows[i] if config.windows else None
        rope = config.rope_layers[i] if config.rope_layers else None
        return window, rope, i if config.attention_scale_by_layer else None

    return next(i for i in range(layer + 1) if numbers(i) == numbers(layer))


def run(
    config: ModelConfig, layer: int, leaves: Leaves, x: Array, known: Any = None
) -> tuple[Any, Any]:
    """One block on whole windows, and what entered its layers."""
    shape = x.shape[:2]
    places = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    where = positions_of(config, places, places, jnp.zeros((), jnp.int32))
    numbers = jax.tree.map(lambda a: a[0], layer_numbers(config, layer, layer + 1))
    (y, _), seen = capture(Block(config, leaves), x, where, numbers, given=known)
    return y, seen


@functools.cache
def block_function(config: ModelConfig, layer: int) -> Any:
    """The block as `(weights, x, rest)` to its output; one object per block."""
    return lambda weights, x, rest: run(config, layer, {**rest, **weights}, x)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def embed(config: ModelConfig, dtype: str, leaves: Leaves, tokens: Array) -> Array:
    """What enters the first block, `[windows, time, dim]`."""
    places = jnp.broadcast_to(
        jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
    )
    tables = jax.tree.map(jnp.asarray, below(leaves, "embed"))
    return Embedding(tables, config, np.dtype(dtype))(tokens, places)


@functools.partial(jax.jit, static_argnums=(0, 1))
def block(config: ModelConfig, layer: int, leaves: Leaves, x: Array, known: Leaves):
    """What leaves a block; `known` are inputs of its layers, by path."""
    return run(config, layer, leaves, x, known)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def collect(
    config, layer, path, total, packed, dense, x, r, known, known_r, weight
) -> tuple[Statistics, Array, Array | None]:
    """Statistics with a batch added, and what entered the layer, own and other."""

    def entering(leaves: Leaves, x: Array, known: Leaves) -> Array:
        seen = run(config, layer, leaves, x, known)[1]
        return next(one.x for one in seen if one.path == path)

    own = entering(packed, x, known)
    other = None if r is None else entering(dense, r, known_r)
    return total.add(own, other, weight), own, other


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def observe(config, layer, observer, states, leaves, x, weight) -> dict[str, Any]:
    """States of an observer, by path, with a batch added."""
    done = dict(states)
    for one in run(config, layer, leaves, x)[1]:
        if one.path in done:
            entering = rounded_input(one.x, leaves[one.path])
            done[one.path] = observer.update(done[one.path], entering, weight)
    return done


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def collect_head(config, total, leaves, x, weight) -> Statistics:
    """Statistics of the head's input with a batch added."""
    norm = Norm(below(leaves, "norm"), config) if config.final_norm else None
    return total.add(x if norm is None else norm(x), None, weight)

"""Key-value cache of static shape, and the positions that decide what attends to what.

Decides that a token's position is the whole truth about masking: a query at position p
sees the keys at positions 0..p of its row (or the last `window` of them), and position
-1 marks padding and empty slots, which nobody sees. So rows of different lengths,
padded left or right, need no other mask, and slots may hold tokens in any layout.

Costs: `layers * batch * length * 2 * kv_heads * head_dim` numbers, allocated once and
updated in place inside `jax.lax` loops.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer; a pytree whose shapes never change.

    Attributes:
        keys: One array `[layers, batch, kv_heads, length, head_dim]` per run of layers.
        values: The same for values.
        positions: Position of the token in every slot, -1 where there is none.
        index: Number of slots written so far, the same for all rows.
    """

    keys: tuple[Float[Array, "layers batch kv_heads length head_dim"], ...]
    values: tuple[Float[Array, "layers batch kv_heads length head_dim"], ...]
    positions: Int[Array, "batch length"]
    index: Int[Array, ""]

    @property
    def length(self) -> int:
        """Number of slots per row."""
        return self.positions.shape[1]

    @property
    def next_positions(self) -> Int[Array, " batch"]:
        """Position that the next token of every row takes."""
        return jnp.max(self.positions, axis=1) + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's view of a run's stacked cache.

    Attributes:
        keys: `[layers, batch, kv_heads, length, head_dim]`.
        values: The same shape.
        layer: Index of this layer within the run.
    """

    keys: Float[Array, "layers batch kv_heads length head_dim"]
    values: Float[Array, "layers batch kv_heads length head_dim"]
    layer: Int[Array, ""]

    def write(
        self,
        k: Float[Array, "batch kv_heads time head_dim"],
        v: Float[Array, "batch kv_heads time head_dim"],
        index: Int[Array, ""],
    ) -> "LayerCache":
        """Returns the cache with `time` slots from `index` on replaced."""
        zero = jnp.zeros((), jnp.int32)
        start = (self.layer, zero, zero, index, zero)
        place = jax.lax.dynamic_update_slice
        return LayerCache(
            place(self.keys, k[None].astype(self.keys.dtype), start),
            place(self.values, v[None].astype(self.values.dtype), start),
            self.layer,
        )

    def read(
        self,
    ) -> tuple[
        Float[Array, "batch kv_heads length head_dim"],
        Float[Array, "batch kv_heads length head_dim"],
    ]:
        """Returns this layer's keys and values."""
        take = jax.lax.dynamic_index_in_dim
        return (
            take(self.keys, self.layer, keepdims=False),
            take(self.values, self.layer, keepdims=False),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """What all layers of one call share: where queries and keys stand.

    Attributes:
        queries: Positions of this call's tokens; -1 for padding.
        keys: Positions of everything that can be attended to.
        cos: Rotary cosines `[tables, batch, time, half]`; None without rotary.
        sin: Rotary sines.
        index: First cache slot this call writes.
    """

    queries: Int[Array, "batch time"]
    keys: Int[Array, "batch length"]
    cos: Float[Array, "tables batch time half"] | None
    sin: Float[Array, "tables batch time half"] | None
    index: Int[Array, ""]


def positions_from_mask(mask: Bool[Array, "batch time"]) -> Int[Array, "batch time"]:
    """Returns 0, 1, 2, ... over the true entries of every row and -1 elsewhere.

    Serves left padding, right padding and holes alike.
    """
    counted = jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1
    return jnp.where(mask, counted, -1)

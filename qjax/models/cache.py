"""Key-value cache of static shape, and the positions that decide what attends to what.

Decides that a token's position is the whole truth about masking: a query at position p
sees the keys at positions 0..p of its row (or the last `window` of them), and position
-1 marks padding and empty slots, which nobody sees. So rows of different lengths,
padded left or right, need no other mask, and slots may hold tokens in any layout.

A quantized cache holds every key and value as int8, fp8 or int4 codes with one float32
scale; attention reads the codes (`qjax.ops.attention`).

Costs: `layers * batch * length * 2 * kv_heads * head_dim` numbers, allocated once and
updated in place inside `jax.lax` loops; quantized, 4 bytes per key and value more.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qjax.errors import SpecError
from qjax.ops.attention import write_kv
from qjax.pallas_kernels.attention.reference import KV, ROTATE, empty

CACHE_DTYPES = {
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "float8_e4m3fn": "float8_e4m3fn",
    "int4": "int4",
}
"""Names of quantized caches, and what is stored."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FloatKV:
    """Keys and values of a run of layers as floats.

    Attributes:
        keys: `[layers, batch, kv_heads, length, head_dim]`.
        values: The same shape.
    """

    keys: Float[Array, "layers batch kv_heads length head_dim"]
    values: Float[Array, "layers batch kv_heads length head_dim"]

    def write(self, k: Array, v: Array, index: Array, layer: Array) -> "FloatKV":
        """Returns the run with slots from `index` on of one layer replaced."""
        zero = jnp.zeros((), jnp.int32)
        start = (layer, zero, zero, index, zero)
        place = jax.lax.dynamic_update_slice
        return FloatKV(
            place(self.keys, k[None].astype(self.keys.dtype), start),
            place(self.values, v[None].astype(self.values.dtype), start),
        )

    def read(self, layer: Array) -> tuple[Array, Array]:
        """Returns the keys and values of one layer."""
        take = jax.lax.dynamic_index_in_dim
        return take(self.keys, layer, keepdims=False), take(
            self.values, layer, keepdims=False
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kv"],
    meta_fields=["rotate"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedKV:
    """Keys and values of a run of layers as codes with a scale per token and head.

    Attributes:
        kv: Codes and scales with a leading layer axis; see
            `qjax.pallas_kernels.attention.reference`.
        rotate: What a Hadamard matrix mixes before rounding: `"none"`, `"keys"` or
            `"both"`.
    """

    kv: KV
    rotate: str = "none"

    def write(self, k: Array, v: Array, index: Array, layer: Array) -> "QuantizedKV":
        """Returns the run with slots from `index` on of one layer replaced."""
        kv = write_kv(k, v, self.kv, index, layer=layer, rotate=self.rotate)
        return QuantizedKV(kv, self.rotate)


def empty_kv(
    shape: tuple[int, int, int, int, int], dtype: Any, rotate: str = "none"
) -> FloatKV | QuantizedKV:
    """Returns an empty run of layers.

    Args:
        shape: `[layers, batch, kv_heads, length, head_dim]`.
        dtype: A float dtype, or one of `CACHE_DTYPES` to quantize.
        rotate: See `QuantizedKV`; only for quantized caches.

    Raises:
        SpecError: The dtype is neither, or there is nothing to rotate.
    """
    name = CACHE_DTYPES.get(dtype if isinstance(dtype, str) else jnp.dtype(dtype).name)
    if rotate not in ROTATE:
        raise SpecError(f"cache rotate={rotate!r}; expected one of {ROTATE}")
    if name is not None:
        if rotate != "none" and shape[-1] % 2:
            raise SpecError(f"cache rotate={rotate!r}: heads of {shape[-1]} are odd")
        return QuantizedKV(empty(*shape[1:], name, layers=shape[:1]), rotate)
    if rotate != "none":
        raise SpecError(f"cache rotate={rotate!r} is for quantized caches")
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or not jnp.issubdtype(kind, jnp.floating):
        raise SpecError(
            f"cache dtype {dtype!r}; expected a float dtype or one of "
            f"{', '.join(CACHE_DTYPES)}"
        )
    return FloatKV(jnp.zeros(shape, kind), jnp.zeros(shape, kind))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer; a pytree whose shapes never change.

    Attributes:
        runs: Keys and values per run of layers.
        positions: Position of the token in every slot, -1 where there is none.
        index: Number of slots written so far, the same for all rows.
    """

    runs: tuple[FloatKV | QuantizedKV, ...]
    positions: Int[Array, "batch length"]
    index: Int[Array, ""]

    @property
    def length(self) -> int:
        """Number of slots per row."""
        return self.positions.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, scales included."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.runs))

    @property
    def next_positions(self) -> Int[Array, " batch"]:
        """Position that the next token of every row takes."""
        return jnp.max(self.positions, axis=1) + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's view of a run's stacked cache.

    Attributes:
        stored: The run.
        layer: Index of this layer within the run.
    """

    stored: FloatKV | QuantizedKV
    layer: Int[Array, ""]

    def write(
        self,
        k: Float[Array, "batch kv_heads time head_dim"],
        v: Float[Array, "batch kv_heads time head_dim"],
        index: Int[Array, ""],
    ) -> "LayerCache":
        """Returns the cache with `time` slots from `index` on replaced."""
        return LayerCache(self.stored.write(k, v, index, self.layer), self.layer)


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
        segments: Number of the sample that each token belongs to, where rows hold
            several that do not see each other; only without a cache.
    """

    queries: Int[Array, "batch time"]
    keys: Int[Array, "batch length"]
    cos: Float[Array, "tables batch time half"] | None
    sin: Float[Array, "tables batch time half"] | None
    index: Int[Array, ""]
    segments: Int[Array, "batch time"] | None = None


def positions_from_mask(mask: Bool[Array, "batch time"]) -> Int[Array, "batch time"]:
    """Returns 0, 1, 2, ... over the true entries of every row and -1 elsewhere.

    Serves left padding, right padding and holes alike.
    """
    counted = jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1
    return jnp.where(mask, counted, -1)

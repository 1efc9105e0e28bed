"""IQ4_NL and IQ4_XS: a table of sixteen values, the scale of 32 weights searched for.

Encoders take blocks `x [elements, *blocks]` and the imatrix's values of their inputs,
`[elements, ...]` broadcastable to them, or None; they return bytes `[bytes, *blocks]`.

Reference: ggml `src/ggml-quants.c` (MIT): `quantize_row_iq4_nl_impl`.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from qjax.formats.base import divided
from qjax.formats.ggml_iq import IQ4
from qjax.methods.ggml_bytes import groups, half, ungrouped
from qjax.methods.ggml_exact import best_of, extreme, inverse, quotients, ratio, total
from qjax.methods.ggml_pack import PACK, Parts
from qjax.methods.ggml_search import TINY, error_weights

Blocks = Float[Array, " e *blocks"]
Importance = Float[Array, "e ..."] | None
Bytes = UInt8[Array, " b *blocks"]
_TABLE = np.array(IQ4)
_BOUNDS = (_TABLE[1:] + _TABLE[:-1]) / 2


def iq4_nl(x: Blocks, importance: Importance) -> Bytes:
    """4 bits and a scale for 32."""
    scale = search(x, error_weights(x, importance))
    codes = _count(inverse(scale) * x, np.ones(15))
    return PACK["iq4_nl"](Parts(codes, half(scale)))


def iq4_xs(x: Blocks, importance: Importance) -> Bytes:
    """4 bits, and scales of 6 bits for 32."""
    grouped = groups(x, 32)
    scales = search(grouped, groups(error_weights(x, importance), 32))
    step = extreme(scales) / -32
    scales = jnp.clip(jnp.round(inverse(step) * scales), -32, 31)
    codes = _count(inverse(step * scales) * grouped, np.ones(15))
    return PACK["iq4_xs"](Parts(ungrouped(codes), half(step), scales))


def search(x, weight):
    """The scale whose nearest table entries explain most, of sixteen."""
    top = extreme(x)
    zero = jnp.abs(top) < TINY
    top = jnp.where(zero, 1.0, top)
    first = inverse(divided(-top, jnp.full_like(top, -127.0)))
    tried = quotients(np.arange(-7, 8) + _TABLE[0], top)
    inv = jnp.concatenate([first[None], tried])

    def sums(x, w):
        value = _count(inv * x, np.diff(_TABLE)) + float(_TABLE[0])
        part = w * value
        return part * x, part * value

    def better(new, best):
        return (new["l2"] > 0) & (new["lx"] * new["lx"] > best["energy"] * new["l2"])

    lx, l2 = total(sums, x, weight)
    scale = ratio(lx, l2)
    tried = {"scale": scale, "lx": lx, "l2": l2, "energy": scale * lx}
    return jnp.where(zero, 0.0, best_of(better, tried)["scale"])


def _count(x, steps: np.ndarray):
    """Sum of the steps at the bounds between table entries that `x` reaches."""
    pairs = zip(_BOUNDS, steps, strict=True)
    parts = (jnp.where(x >= float(b), float(s), 0.0) for b, s in pairs)
    return functools.reduce(jnp.add, parts)

"""Whole matrices to llama.cpp's blocks, a few blocks at a time.

`encode` cuts a matrix into chunks of blocks and runs a type's encoder on one after the
other, so that temporaries stay small (and, on a CPU, in its caches) whatever the size
of the matrix.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qjax.formats.base import divided
from qjax.methods import ggml_direct as direct
from qjax.methods import ggml_iq as iq
from qjax.methods import ggml_iq1 as iq1
from qjax.methods import ggml_iq4 as iq4
from qjax.methods import ggml_k as k
from qjax.methods import ggml_legacy as legacy
from qjax.methods.ggml_best import refined
from qjax.methods.ggml_exact import power_of_two, total


class Encoder(NamedTuple):
    """How blocks of a type are made.

    Attributes:
      run: from blocks and the imatrix to bytes; see the types' modules.
      elements: weights of a block.
      row: `run` also takes the mean square of the rows that blocks lie in.
      needy: there is no encoding without an imatrix.
    """

    run: Callable[..., UInt8[Array, " b *blocks"]]
    elements: int
    row: bool = False
    needy: bool = False


ENCODERS: dict[str, Encoder] = {
    "q4_0": Encoder(legacy.q4_0, 32, row=True),
    "q4_1": Encoder(legacy.q4_1, 32, row=True),
    "q5_0": Encoder(legacy.q5_0, 32, row=True),
    "q5_1": Encoder(legacy.q5_1, 32, row=True),
    "q8_0": Encoder(legacy.q8_0, 32, row=True),
    "q2_k": Encoder(k.q2_k, 256),
    "q3_k": Encoder(k.q3_k, 256),
    "q4_k": Encoder(k.q4_k, 256),
    "q5_k": Encoder(k.q5_k, 256),
    "q6_k": Encoder(k.q6_k, 256),
    "iq2_xxs": Encoder(iq.iq2_xxs, 256, needy=True),
    "iq2_xs": Encoder(iq.iq2_xs, 256, needy=True),
    "iq2_s": Encoder(iq.iq2_s, 256),
    "iq3_xxs": Encoder(iq.iq3_xxs, 256),
    "iq3_s": Encoder(iq.iq3_s, 256),
    "iq1_s": Encoder(iq1.iq1_s, 256, needy=True),
    "iq1_m": Encoder(iq1.iq1_m, 256),
    "iq4_nl": Encoder(iq4.iq4_nl, 32),
    "iq4_xs": Encoder(iq4.iq4_xs, 256),
    "tq1_0": Encoder(direct.tq1_0, 256),
    "tq2_0": Encoder(direct.tq2_0, 256),
    "mxfp4": Encoder(direct.mxfp4, 32),
    "nvfp4": Encoder(direct.nvfp4, 64),
    "q1_0": Encoder(direct.q1_0, 128),
    "q2_0": Encoder(direct.q2_0, 64),
}


def encode(
    kind: str,
    w: Float[Array, "in out"],
    importance: Float[Array, "in _"] | None = None,
    *,
    chunk: int = 1 << 15,
    best: bool = False,
) -> UInt8[Array, "b out"]:
    """Quantizes a matrix as llama.cpp does, or better.

    Args:
      kind: name of the type.
      w: float32, finite; `in` is a multiple of the type's block.
      importance: the imatrix: mean squares of the inputs, `[in, 1]`, or of their own
        for every output.
      chunk: weights that are worked on together.
      best: improve llama.cpp's blocks; see `qjax.methods.ggml_best`.

    Returns:
      The blocks of a column one after the other, `[in / elements * bytes, out]`.
    """
    encoder = ENCODERS[kind]
    run = functools.partial(refined, kind, encoder.run) if best else encoder.run
    rows, out = w.shape
    size = encoder.elements
    square = None
    if encoder.row and importance is not None:
        square = total(lambda a: a * a, w)
        square = divided(square, jnp.full_like(square, rows))
    lanes = min(out, max(chunk // size, 1))
    stack = min(rows // size, max(chunk // size // lanes, 1))
    blocks = _cut(w, size, stack, lanes)
    weights = None
    if importance is not None:
        # Powers of small numbers would vanish; a power of two changes nothing else.
        top = jnp.max(importance)
        importance = importance / power_of_two(jnp.where(top > 0, top, 1.0))
        wide = importance.shape[1] > 1
        weights = _cut(importance, size, stack, lanes if wide else 1)

    def one(args):
        """A chunk `[stack, elements, lanes]`."""
        x, weight, square = args
        turned: list[Any] = [
            None if a is None else jnp.moveaxis(a, 1, 0) for a in (x, weight)
        ]
        row = (square,) if encoder.row else ()
        return jnp.moveaxis(run(*turned, *row), 0, 1)

    def column(args):
        """All chunks of `stack` blocks on top of each other."""
        x, weight = args
        pads = None if square is None else _cut(square[None], 1, 1, lanes)[0, :, 0]
        if weight is not None and weight.shape[0] == 1:
            weight = jnp.broadcast_to(weight, (x.shape[0], *weight.shape[1:]))
        return jax.lax.map(one, (x, weight, pads))

    done = jax.lax.map(column, (blocks, weights))
    columns, wide, stack, bytes_, lanes = done.shape
    done = jnp.moveaxis(done, 1, 3).reshape(columns * stack * bytes_, wide * lanes)
    return done[: rows // size * bytes_, :out]


def _cut(x, size: int, stack: int, lanes: int):
    """Chunks `[in / size / stack, out / lanes, stack, size, lanes]`, zeros behind."""
    rows, out = x.shape
    x = jnp.pad(x, ((0, -rows % (size * stack)), (0, -out % lanes)))
    x = x.reshape(-1, stack, size, x.shape[1] // lanes, lanes)
    return jnp.moveaxis(x, 3, 1)

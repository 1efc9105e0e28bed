"""compressed-tensors' `marlin-24`: 2:4 sparse integers in the order of tensor cores.

Of four neighbouring inputs two are stored. `weight_packed` int32
`[in / 32, 16 out * bits / 32]` holds tiles of 16 x 16 codes plus `2**(bits - 1)` of the
halved weight `[in / 2, out]`, four neighbouring tiles in one run of 1024, permuted for
the fragments of tensor cores; fields of a word alternate, even places first.
`scale_packed` float16 `[groups, out]`, permuted in runs of 8 unless groups have half
the inputs or more. `meta` int16 `[in / 32, 2 out]`: for each four inputs of an output
four bits, the two places that are stored, in CUTLASS' reordered layout.

Reference: compressed-tensors 0.12 `compressors/sparse_quantized_compressors/marlin_24`,
`utils/semi_structured_conversions.py`, `utils/permutations_24.py`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.converters.affine import affine, group_of
from qjax.converters.halves import halves
from qjax.converters.words import copied
from qjax.errors import FormatError
from qjax.tensor import QuantizedTensor


def marlin_24(
    parts: Mapping[str, np.ndarray], weights: Mapping[str, Any], where: str
) -> QuantizedTensor:
    """A weight `[in, out]`, with zeros where nothing is stored.

    Args:
      parts: `weight_packed`, `scale_packed` and `meta`.
      weights: how the settings say it is quantized.
      where: what errors call the layer.

    Raises:
      FormatError: parts do not fit each other or the settings.
    """
    words, scale, meta = (parts[k] for k in ("weight_packed", "scale_packed", "meta"))
    bits = weights.get("num_bits")
    if bits not in (4, 8) or words.dtype != np.int32:
        raise FormatError(
            f"{where}: {words.dtype} words of {bits!r} bits, expected int32 with 4 or 8"
        )
    rows, cols = words.shape[0] * 32, scale.shape[-1]
    if (
        scale.ndim != 2
        or cols % 64
        or words.shape[1] * 32 != cols * 16 * bits
        or meta.dtype != np.int16
        or meta.size * 16 != rows * cols
    ):
        raise FormatError(
            f"{where}: weight_packed {list(words.shape)}, scale_packed "
            f"{list(scale.shape)} and meta {meta.dtype} {list(meta.shape)} do not fit "
            f"{bits} bits; expected [in / 32, out * {bits} / 2], [groups, out] and "
            "int16 [in / 32, 2 out] with out a multiple of 64"
        )
    first, second = _stored(words, bits, cols)
    codes = np.asarray(_spread(first, second, _places(meta, rows, cols), bits))
    group = group_of(weights)
    if group is not None and group < rows // 2:
        runs = scale.reshape(-1, 8)
        made = np.empty_like(runs)
        made[:, [0, 4, 1, 5, 2, 6, 3, 7]] = runs
        scale = made.reshape(scale.shape)
    return affine(
        codes.reshape(-1, cols),
        scale,
        None,
        bits=bits,
        matrix=(rows, cols),
        where=where,
        group=group,
        dtype=scale.dtype.name,
        planes=True,
    )


def _stored(words: np.ndarray, bits: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the second of the two codes of four inputs, `[in / 4, out]`.

    The low half of words, or of pairs of 4 bits, holds even rows of the halved weight,
    the high half those behind them.
    """
    tiles = len(words)
    if bits == 4:
        # tile, column over 8, lane modulo 4, column modulo 4, column over 4, row over 8
        pairs = halves(words).reshape(tiles, cols // 64, 4, 2, 4, 4, 2, 2)
        both = copied(pairs.transpose(0, 7, 4, 1, 2, 3, 6, 5)).reshape(-1, cols)
        return both & np.uint8(15), both >> np.uint8(4)
    little = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    fields = little.reshape(tiles, cols // 64, 4, 2, 4, 4, 2, 2, 2)
    first, second = copied(fields.transpose(7, 0, 8, 4, 1, 2, 3, 6, 5))
    return first.reshape(-1, cols), second.reshape(-1, cols)


def _places(meta: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Which two of four inputs are stored, uint16 `[in / 16, out]`, low bits first."""
    # bits of the output and the input: out 1, 3 to 5, 0, in 4, out 2
    fields = meta.view(np.uint16).reshape(rows // 32, cols // 64, 2, 8, 2, 2, 2)
    return copied(fields.transpose(0, 5, 1, 3, 6, 2, 4)).reshape(-1, cols)


@functools.partial(jax.jit, static_argnums=3)
def _spread(first, second, places, bits: int):
    """Two codes of four at their places, as `qjax.packing` packs them."""
    shifts = jnp.arange(0, 16, 4, dtype=jnp.uint16)[:, None]
    quads = (places[:, None] >> shifts).reshape(first.shape).astype(jnp.uint8)
    low, high = quads & 3, quads >> 2 & 3
    half = jnp.uint8(2 ** (bits - 1))
    codes = [
        jnp.where(high == i, second, jnp.where(low == i, first, half)) for i in range(4)
    ]
    if bits == 4:
        codes = [codes[i] | codes[i + 1] << 4 for i in (0, 2)]
    return jnp.stack(codes, 1)

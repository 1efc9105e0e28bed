"""Random blocks of llama.cpp's types, with scales that make weights of usual size."""

import jax.numpy as jnp
import numpy as np

from qjax.formats import Ggml
from qjax.ggml import GgmlTensor

HALVES = {
    **dict.fromkeys(("q4_0", "q5_0", "q8_0", "iq4_nl", "q1_0", "q2_0"), (0,)),
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), (0,)),
    **dict.fromkeys(("iq1_s", "iq4_xs"), (0,)),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q6_k": (208,),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
"""Where float16 scales and minima lie in blocks."""


def random_blocks(
    name: str, lead: tuple[int, ...], matrix: tuple[int, int], seed: int = 0
) -> GgmlTensor:
    """A weight of random bytes whose numbers are at most about 2.

    Args:
      name: of the type.
      lead: leading axes.
      matrix: `(in, out)`.
      seed: of the draw.
    """
    fmt, (rows, cols) = Ggml(name), matrix
    size = fmt.block.bytes
    rng = np.random.default_rng(seed)
    shape = (*lead, rows // fmt.block.elements, size, cols)
    data = rng.integers(0, 256, shape, dtype=np.uint8)
    if name == "mxfp4":
        data[..., 0, :] = rng.integers(123, 127, data[..., 0, :].shape)
    elif name == "nvfp4":
        data[..., :4, :] = rng.integers(0x20, 0x32, data[..., :4, :].shape)
    elif name == "iq1_m":  # the nibbles of one float16, 2^-5
        for at, nibble in ((49, 0), (51, 0), (53, 0x80), (55, 0x20)):
            data[..., at, :] = data[..., at, :] & 15 | nibble
    else:
        for at in HALVES[name]:
            data[..., at, :], data[..., at + 1, :] = 0, 0x3C  # 1.0
        most = np.abs(fmt.block.decode(jnp.asarray(data))).max()
        for at in HALVES[name]:
            scale = rng.uniform(-2, 2, data[..., at, :].shape) / float(most)
            bits = scale.astype(np.float16).view(np.uint16)
            data[..., at, :], data[..., at + 1, :] = bits & 255, bits >> 8
    flat = data.reshape(*lead, -1, cols)
    return GgmlTensor(jnp.asarray(flat), fmt, matrix)

"""Tiles of the Hopper product, and which products it takes.

`Config` is everything that may be tuned. `default` picks from `TUNED`, whose entries
are first choices by the arithmetic below until those that
`python benchmarks/tune_matmul_gpu.py` prints on the device replace them.

* Few tokens (at most 64): the memory decides. Blocks of 256 columns by 128 rows
  (16 KiB of 4-bit codes) in as many stages as shared memory holds: the 4.8 TB/s of an
  H200 times about 1 us of latency are 36 KiB per multiprocessor, and several times that
  hides the waits of four warpgroups.
* Many tokens: the tensor cores decide. Two warpgroups of 64 columns by 256 tokens.
"""

import dataclasses

import jax.numpy as jnp

from .. import hopper
from ..device import hopper_obstacle
from ..weights import WeightSpec
from . import gpu_layout

SHARED_BYTES = 227 * 1024
MULTIPROCESSORS = 132
"""Of H100 SXM and H200; grids are this large unless a `Config` says otherwise."""
SINGLE_ROWS = 64
"""Most rows of float32 `x`: three times as many are multiplied."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles and schedule.

    Attributes:
      warpgroups: compute warpgroups of a block, 64 output columns each.
      tokens: rows of `x` that a tile multiplies, a multiple of 8 up to 256.
      rows: rows of the weight per step, 64 or 128 (transposed: 64 columns).
      stages: steps in flight.
      split: share all steps evenly between blocks, partial sums to memory (else whole
        tiles).
      post: scale sums of a group in float32 instead of weights.
      blocks: size of the grid.
      smem_operand: weights go through shared memory (for the interpreter).
    """

    warpgroups: int = 4
    tokens: int = 8
    rows: int = 128
    stages: int = 8
    split: bool = True
    post: bool = True
    blocks: int = MULTIPROCESSORS
    smem_operand: bool = False


TUNED: dict[int, tuple[int, int, int, bool]] = {
    # most tokens: (warpgroups, tokens of a tile, rows, split)
    8: (4, 8, 128, True),
    16: (4, 16, 128, True),
    32: (4, 32, 128, True),
    64: (4, 64, 128, True),
    128: (2, 128, 64, True),
    512: (2, 256, 64, True),
}
"""By largest number of tokens; made by hand (see the module), not measured."""


def default(spec: WeightSpec, m: int, dtype, out_dtype, transpose: bool) -> Config:
    """The configuration of a product.

    Args:
      spec: the weight.
      m: rows of `x`.
      dtype: of `x`.
      out_dtype: of the result.
      transpose: whether `W^T` is multiplied.

    Returns:
      Tiles that fit shared memory.
    """
    single = jnp.dtype(dtype) == jnp.float32
    blocks = MULTIPROCESSORS
    if single:  # exact: sums of groups are scaled, which takes registers
        warpgroups, tile, rows, split = 2, min(64, -(-3 * m // 8) * 8), 128, True
    else:
        narrow = jnp.dtype(out_dtype).itemsize == 2
        chosen = next((v for most, v in TUNED.items() if m <= most), None)
        warpgroups, tile, rows, split = chosen or (2, 256, 64, not narrow)
        if chosen is None and not narrow:  # a tile per block: one copy of sums
            outer = gpu_layout.padded(spec)[0 if transpose else 1]
            blocks = outer // (64 * warpgroups) * -(-m // tile)
    if transpose:
        warpgroups, rows = 2, 64
    post = single or tile <= 16
    config = Config(warpgroups, tile, rows, 1, split, post, blocks)
    room = SHARED_BYTES - 4096 - fixed_bytes(spec, config, transpose)
    stages = room // stage_bytes(spec, config, transpose)
    return dataclasses.replace(config, stages=min(stages, 8))


def stage_bytes(spec: WeightSpec, config: Config, transpose: bool) -> int:
    """Shared memory of one stage."""
    bits = gpu_layout.codec(spec).bits
    width, rows = config.warpgroups * 64, config.rows
    codes = width * rows * bits // 8
    x = config.tokens * rows * 2
    lanes, deep = (64, width) if transpose else (width, rows)
    pieces = 1 if spec.group >= spec.k else max(1, -(-deep // spec.group))
    return codes + x + 2 * max(128, 4 * lanes * pieces)


def fixed_bytes(spec: WeightSpec, config: Config, transpose: bool) -> int:
    """Shared memory outside of the stages."""
    table = 256 * 32 * 4 + 1024 if spec.kind == "table" else 0
    operand = 8192 * config.warpgroups if transpose or config.smem_operand else 0
    out = 0 if config.split else config.warpgroups * 2 * 64 * 64 * 2
    return table + operand + out


def obstacle(spec: WeightSpec, m: int, x_dtype, *, transpose: bool = False):
    """Why the Hopper kernel cannot compute a product.

    Args:
      spec: the weight.
      m: rows of `x`.
      x_dtype: its dtype.
      transpose: whether `W^T` is multiplied.

    Returns:
      A reason, or None.
    """
    if spec.layout not in gpu_layout.TAGS:
        return "the weight is not prepacked for Hopper GPUs; see qjax.prepack"
    reason = gpu_layout.obstacle(spec)
    if reason is not None:
        return reason
    if m < 1:
        return "there are no rows"
    dtype = jnp.dtype(x_dtype).name
    single = dtype == "float32"
    if dtype not in ("bfloat16", "float16", "float32"):
        return f"x is {dtype}"
    if single and m > SINGLE_ROWS:
        return f"float32 x has {m} rows; partial sums of {SINGLE_ROWS} at most are kept"
    if single and transpose:
        return "float32 x times W^T would round scaled weights to bfloat16"
    if single and spec.kind == "table":
        return "float32 x needs exact weights, and table entries round to bfloat16"
    if single and spec.group < spec.k and spec.group % 64:
        return "float32 x needs groups of a multiple of 64 rows"
    operand = "bfloat16" if single else dtype
    shift = 128 if spec.bits == 8 and spec.layout == gpu_layout.TAGS[0] else 0
    if spec.kind == "int" and not hopper.holds(spec.offset - shift, operand):
        return f"offset {spec.offset} is not a {operand}"
    return hopper_obstacle()

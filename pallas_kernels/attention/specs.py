"""What the attention kernels can do, and the tiles they use.

`obstacle` answers without a device; `config` picks tiles from `TABLE`, measured by
compiling for the device (`python benchmarks/cases_attention.py tpu`).
"""

import dataclasses
import math

import jax.numpy as jnp

from ..device import device_kind
from . import cpu
from .reference import KINDS, KV

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and dtypes of one call.

    Attributes:
      batch: Rows.
      heads: Query heads.
      kv_heads: Key and value heads.
      time: Queries per row.
      length: Slots per row.
      head_dim: Width of a head.
      kind: What codes are.
      dtype: Of queries and result.
      scale_dtype: Of the scales.
    """

    batch: int
    heads: int
    kv_heads: int
    time: int
    length: int
    head_dim: int
    kind: str
    dtype: str
    scale_dtype: str = "float32"

    @classmethod
    def of(cls, q, cache: KV) -> "Problem":
        """Reads the shapes of a call's arrays."""
        batch, heads, time, width = q.shape
        return cls(
            batch=batch,
            heads=heads,
            kv_heads=cache.codes.shape[-3],
            time=time,
            length=cache.length,
            head_dim=width,
            kind=cache.kind,
            dtype=jnp.dtype(q.dtype).name,
            scale_dtype=jnp.dtype(cache.scale.dtype).name,
        )

    @property
    def rows(self) -> int:
        """Queries that share a key head: groups times tokens."""
        return self.heads // self.kv_heads * self.time

    @property
    def row(self) -> int:
        """Codes of a token, key and value together."""
        return self.head_dim if self.kind == "int4" else 2 * self.head_dim

    @property
    def cache_bytes(self) -> int:
        """Stored bytes of the whole cache: codes and scales."""
        scale = 2 * jnp.dtype(self.scale_dtype).itemsize
        return self.batch * self.kv_heads * self.length * (self.row + scale)

    @property
    def flops(self) -> int:
        """Multiply-adds of scores and values, times two."""
        return 4 * self.batch * self.heads * self.time * self.length * self.head_dim


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of a kernel.

    Attributes:
      block: Slots per step.
      heads: Key heads per step (TPU).
      splits: Parts the slots are shared out to (GPU); 1 on TPU.
      stages: Blocks in flight (GPU).
    """

    block: int = 1024
    heads: int = 4
    splits: int = 1
    stages: int = 2


TABLE: dict[tuple[str, str], Config] = {
    (device, kind): Config(block=2048, heads=4)
    for device in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")
    for kind in KINDS
}
"""Tuned tiles by device kind and code kind; `config` falls back to `Config()`."""

TPU_ROWS = 256
GPU_ROWS = 64
GPU_BLOCK = 64
GPU_BLOCKS = 132


def obstacle(backend: str, problem: Problem) -> str | None:
    """Returns why a kernel cannot do a call, or None.

    Args:
      backend: "tpu", "gpu" or "native".
      problem: The call.
    """
    p = problem
    if p.kind not in KINDS:
        return f"codes are {p.kind}; kernels know {', '.join(KINDS)}"
    if p.dtype not in DTYPES:
        return f"queries are {p.dtype}; kernels take {', '.join(DTYPES)}"
    if min(p.batch, p.heads, p.time, p.length) < 1:
        return "an axis is empty"
    if backend == "native":
        return cpu.obstacle(p.head_dim, p.kind, p.dtype, p.scale_dtype)
    return {"tpu": _tpu_obstacle, "gpu": _gpu_obstacle}[backend](p)


def _tpu_obstacle(p: Problem) -> str | None:
    if p.dtype == "float16":
        return "float16 queries; a TPU computes in bfloat16 or float32"
    if p.rows > TPU_ROWS:
        return f"{p.rows} queries share a head; the kernel takes up to {TPU_ROWS}"
    if p.row % 128:
        return f"a cache row has {p.row} codes, not a multiple of 128 lanes"
    if p.length % 128:
        return f"{p.length} slots, not a multiple of 128"
    return None


def write_obstacle(cache: KV) -> str | None:
    """Returns why the TPU kernel cannot write to a cache, or None."""
    length, row = cache.codes.shape[-2:]
    if row % 128:
        return f"a cache row has {row} codes, not a multiple of 128 lanes"
    if length % 128:
        return f"{length} slots, not a multiple of 128"
    return None


def _gpu_obstacle(p: Problem) -> str | None:
    if p.dtype != "bfloat16":
        return f"{p.dtype} queries; the kernel multiplies in bfloat16"
    if p.head_dim not in (64, 128):  # 256 does not fit the registers
        return f"heads of {p.head_dim}; the kernel has 64 and 128"
    if p.rows > GPU_ROWS:
        return f"{p.rows} queries share a head; the kernel takes up to {GPU_ROWS}"
    if p.length % GPU_BLOCK:
        return f"{p.length} slots, not a multiple of {GPU_BLOCK}"
    if p.scale_dtype != "float32":
        return f"{p.scale_dtype} scales; the kernel reads float32"
    return None


def divisor(length: int, most: int, unit: int) -> int:
    """Returns the largest multiple of `unit` up to `most` that divides `length`."""
    for size in range(min(most, length) // unit * unit, 0, -unit):
        if length % size == 0:
            return size
    return math.gcd(length, unit)


def default_device() -> str | None:
    """Returns the kind of the device that programs are traced for."""
    return device_kind()


def config(device: str | None, problem: Problem) -> Config:
    """Returns the tiles for a device and a call.

    Args:
      device: `jax.Device.device_kind`, or None.
      problem: The call.
    """
    tiles = TABLE.get((device or "", problem.kind), Config())
    # Caches are rarely full: a block is at most a quarter of one.
    return dataclasses.replace(
        tiles, block=min(tiles.block, max(512, problem.length // 4))
    )


def gpu_config(problem: Problem) -> Config:
    """Returns the tiles on a GPU: enough splits to fill it about four times over."""
    p = problem
    block = GPU_BLOCK
    blocks = p.length // block
    wanted = -(-4 * GPU_BLOCKS // (p.batch * p.kv_heads))
    splits = max(1, min(wanted, blocks // 2, 64))
    return Config(block=block, splits=splits, stages=3)

"""Weights of every format and wrapper, on shapes that do and do not divide."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.additive import AdditiveTensor
from qjax.formats import (
    FP4,
    FP8,
    MXFP4,
    MXFP8,
    NF4,
    NVFP4,
    Additive,
    Cast,
    Dynamic8,
    Int,
    KMeans,
)
from qjax.methods import quantize
from qjax.tensor import assemble
from qjax.wrappers import (
    InputScaled,
    LowRank,
    Permuted,
    Rotated,
    RowParts,
    SplitInputs,
    Transposed,
    WithOutliers,
)

FORMATS = {
    "int1-g32": Int(1, 32),
    "int2-channel": Int(2, "channel"),
    "int2-g16-asym": Int(2, 16, symmetric=False),
    "int3-g32": Int(3, 32),
    "int3-g32-asym-bf16": Int(
        3, 32, symmetric=False, scale_dtype="bfloat16", zero_dtype="bfloat16"
    ),
    "int4-g32": Int(4, 32),
    "int4-g24-asym-uint8": Int(4, 24, symmetric=False, zero_dtype="uint8"),
    "int4-g28": Int(4, 28),
    "int4-tensor": Int(4, "tensor"),
    "int4-out": Int(4, 16, axis="out"),
    "int4-nested": Int(4, 32, scale_dtype="uint8"),
    "int5-g32": Int(5, 32),
    "int6-channel": Int(6, "channel"),
    "int7-g32": Int(7, 32),
    "int8-channel": Int(8, "channel"),
    "int8-g32": Int(8, 32),
    "int8-g32-asym": Int(8, 32, symmetric=False),
    "nf4": NF4(32),
    "nf4-double": NF4(32, double=True),
    "nf4-flat": NF4(64),
    "fp4": FP4(32),
    "dynamic8": Dynamic8(256),
    "fp8-channel": FP8(),
    "fp8-e5m2-tensor": FP8("e5m2", "tensor"),
    "fp8-block": FP8("e4m3", "block"),
    "mxfp4": MXFP4(),
    "mxfp8": MXFP8(),
    "nvfp4": NVFP4(),
    "bfloat16": Cast(),
    "kmeans2": KMeans(2),
    "kmeans3": KMeans(3),
    "kmeans4": KMeans(4, table_dtype="float32"),
    "kmeans6": KMeans(6),
    "kmeans2-g32": KMeans(2, 32),
    "kmeans3-g24": KMeans(3, 24),
    "additive2x8": Additive(2, 8, 8),
    "additive1x10": Additive(1, 10, 4),
}
MATRIX = (96, 40)


def random(shape, seed, dtype=np.float32):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(values).astype(dtype)


def weight(name, matrix=MATRIX):
    fmt = FORMATS[name]
    if isinstance(fmt, KMeans | Additive):
        return learned(fmt, matrix)
    return quantize(random(matrix, 1), fmt)


def learned(fmt, matrix):
    """Random codes of random tables: what methods learn, without the methods."""
    rng = np.random.default_rng(8)
    rows, cols = matrix
    scale = jnp.abs(random((fmt.grouping(matrix).scale_shape), 9, fmt.scale_dtype))
    if isinstance(fmt, Additive):
        shape = (rows // fmt.group * fmt.codebooks, cols)
        codes = jnp.asarray(rng.integers(0, fmt.levels, shape), f"uint{fmt.code_bits}")
        books = (fmt.codebooks, fmt.levels, fmt.group)
        books = random(books, 10, fmt.table_dtype)
        return AdditiveTensor(codes, scale, books, fmt, matrix)
    codes = jnp.asarray(rng.integers(0, fmt.levels, matrix), jnp.uint8)
    if fmt.columnwise:
        table = jnp.sort(random((fmt.levels, cols), 10, fmt.table_dtype), 0)
        return assemble(fmt, codes, None, matrix, codebook=table)
    table = jnp.sort(random((fmt.levels,), 10))
    return assemble(fmt, codes, scale, matrix, codebook=table)


def wrap(q):
    """Every wrapper around `q`, by name."""
    rows, cols = q.matrix
    rng = np.random.default_rng(3)
    perm = jnp.asarray(rng.permutation(rows), jnp.int32)
    signs = jnp.asarray(rng.choice([-1.0, 1.0], rows), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 2.0, rows), jnp.float32)
    places = rng.choice(rows * cols, 30, replace=False)
    at = [jnp.asarray(p, jnp.int32) for p in np.unravel_index(places, q.matrix)]
    other = quantize(random((40, cols), 11), Int(3, 8))
    return {
        "transposed": Transposed(q),
        "permuted": Permuted(q, perm),
        "scaled": InputScaled(q, scale),
        "rotated": Rotated(q, signs),
        "rotated-int8": Rotated(q, signs.astype(jnp.int8)),
        "split": SplitInputs(q, random((3, cols), 7), jnp.array([5, rows, 17])),
        "low-rank": LowRank(q, random((rows, 3), 4), random((3, cols), 5)),
        "parts-over-parts": RowParts((q, other), (0, 24), q.matrix),
        "transposed-parts": Transposed(
            RowParts((other, Permuted(q, perm)), (0, 40), (rows + 40, cols))
        ),
        "outliers": WithOutliers(q, random((30,), 6), *at),
        "outliers-of-permuted-of-scaled": WithOutliers(
            Permuted(InputScaled(q, scale), perm), random((30,), 6), *at
        ),
        "transposed-low-rank-of-rotated": Transposed(
            LowRank(Rotated(q, signs), random((rows, 3), 4), random((3, cols), 5))
        ),
        "transposed-outliers-of-permuted": Transposed(
            WithOutliers(Permuted(q, perm), random((30,), 6), *at)
        ),
    }


WRAPPERS = tuple(wrap(weight("int4-g32")))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that the tests' matrices need several, and a short last one."""
    from qjax.ops import blocked
    from qjax.ops import matmul as public  # noqa: F401 - loads the module

    monkeypatch.setattr(blocked, "BLOCK", 96 * 8)
    monkeypatch.setattr(blocked, "LANES", 1)

"""Random packed weights and their values in float64, independent of the library."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax.pallas_kernels.weights import FIELDS, Weight

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])
FLOAT8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def pack(codes, bits):
    """Codes `[k, n]` to canonical bytes, one bit at a time."""
    if bits == 8:
        return codes.astype(np.uint8)
    k, n = codes.shape
    unit = 8 if len(FIELDS[bits]) > 1 else 8 // bits
    padded = np.zeros((-(-k // unit) * unit, n), np.uint8)
    padded[:k] = codes
    rows = []
    for block in padded.reshape(-1, unit, n):
        shift = 0
        for width in FIELDS[bits]:
            per = 8 // width
            for start in range(0, unit, per):
                byte = np.zeros(n, np.uint8)
                for i in range(per):
                    part = (block[start + i] >> shift) & (2**width - 1)
                    byte |= (part << (i * width)).astype(np.uint8)
                rows.append(byte)
            shift += width
    return np.stack(rows)


def random_weight(rng, spec, *, scale="float32", zero=None, signed=False):
    """A weight and its float64 values `[k, n]`."""
    codes = rng.integers(0, 2**spec.bits, (spec.k, spec.n))
    stored, table = pack(codes, spec.bits), None
    if spec.kind == "int":
        if signed:
            stored, codes = stored.view(np.int8), stored.view(np.int8).astype(int)
        values = codes - spec.offset
    elif spec.kind == "table":
        table = rng.standard_normal(2**spec.bits).astype(np.float32)
        values = table[codes].astype(np.float64)
    elif spec.kind == "e2m1":
        values = E2M1[codes]
    else:
        finite = {"e4m3": 0x7F, "e5m2": 0x7C}[spec.kind]
        codes = (
            rng.integers(0, finite, codes.shape) | rng.integers(0, 2, codes.shape) << 7
        )
        stored = codes.astype(np.uint8)
        values = stored.view(FLOAT8[spec.kind]).astype(np.float64)
        stored = stored.view(FLOAT8[spec.kind])
    shape = (spec.groups, spec.n)
    if scale == "uint8":
        s = rng.integers(118, 131, shape).astype(np.uint8)
        s64 = 2.0 ** (s.astype(np.float64) - 127)
    else:
        s = rng.uniform(0.5, 2, shape).astype(scale)
        s64 = s.astype(np.float64)
    z, z64 = None, 0.0
    if zero is not None:
        z = rng.integers(0, 2**spec.bits, shape).astype(zero)
        z64 = np.repeat(z.astype(np.float64), spec.group, 0)[: spec.k]
    dense = (values - z64) * np.repeat(s64, spec.group, 0)[: spec.k]
    arrays = (stored, s, z, table)
    return Weight(*(None if a is None else jnp.asarray(a) for a in arrays)), dense


def error_bound(x, dense, spec, values_top, out="float32", transpose=False):
    """Fixed-point activations, float32 sums, one rounding of the result.

    `values_top [n]` is the largest `|value - zero| scale` plus what unsigned codes add.
    """
    x = np.abs(np.asarray(x, np.float64))
    size = x @ np.abs(dense.T if transpose else dense)
    terms = x.sum(1)[:, None] * values_top
    total = terms * 2.0**-21 + size * UNIT[out]
    if spec.kind == "int" and not transpose:
        for start in range(0, spec.k, spec.group):
            for a in range(start, min(start + spec.group, spec.k), 256):
                b = min(a + 256, start + spec.group, spec.k)
                step = x[:, a:b].max(1, initial=0)[:, None] / 65024
                total = total + step * np.abs(dense[a:b]).sum(0)
    return total + 1e-30


UNIT = {"float32": 2.0**-22, "bfloat16": 2.0**-8, "float16": 2.0**-10}


def top_of(w, spec, dense):
    """Largest magnitude that enters a sum, over the whole weight."""
    scale = np.abs(np.asarray(w.scale).astype(np.float64)).max()
    if w.scale.dtype == jnp.uint8:
        scale = 2.0 ** (float(np.asarray(w.scale).max()) - 127)
    extra = 2.0**spec.bits if spec.kind == "int" else 0.0
    return np.abs(dense).max() + 2 * scale * extra

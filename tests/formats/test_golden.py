"""NF4 and FP4 against files that bitsandbytes wrote (tests/golden/formats)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import FP4, NF4
from qjax.methods import quantize

CASES = ("nf4", "nf4-double", "nf4-flat", "fp4", "fp4-double")


@pytest.fixture(scope="module")
def golden(root):
    with np.load(root / "tests" / "golden" / "formats" / "bitsandbytes.npz") as file:
        return dict(file)


@pytest.mark.parametrize("case", CASES)
def test_bitsandbytes(golden, case):
    kind, block, double, dtype = golden[f"{case}/spec"]
    load = lambda key: golden[f"{case}/{key}"]  # noqa: E731
    w, values = (load(key).view(jnp.dtype(str(dtype))) for key in ("w", "values"))
    fmt = {"nf4": NF4, "fp4": FP4}[str(kind)](int(block), double=double == "True")
    q = quantize(w.T, fmt)
    codes = np.asarray(q.unpacked()).T.reshape(-1)
    codes = np.append(codes, 0)[: codes.size + codes.size % 2].reshape(-1, 2)
    same = np.testing.assert_array_equal
    packed = load("packed")
    if codes.size > w.size:  # the padding nibble is nobody's
        packed = np.append(packed[:-1], packed[-1] & 0xF0)
    same(codes[:, 0] << 4 | codes[:, 1], packed)
    scale = q.scale
    if fmt.double:
        same(np.asarray(scale.unpacked()).T.reshape(-1), load("absmax"))
        same(np.asarray(scale.scale).T.reshape(-1), load("nested_absmax"))
        same(np.asarray(scale.offset).reshape(-1), load("offset"))
    else:
        same(np.asarray(scale).T.reshape(-1), load("absmax"))
    same(np.asarray(jax.jit(lambda q: q.dequantize())(q)).T, values)

"""The definition against `qjax`, whose packing it does not share."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import FP8, MXFP4, NF4, Int
from qjax.methods import quantize
from qjax.pallas_kernels.matmul import reference
from qjax.pallas_kernels.matmul.api import quantized_matmul
from qjax.pallas_kernels.weights import KernelError, Weight, WeightSpec

from .suite import FORMATS, MatmulSuite, random_weight, rows


class TestReference(MatmulSuite):
    backend = "reference"


INTS = [Int(b, 32, symmetric=s) for b in range(1, 9) for s in (True, False) if b > 1]


@pytest.mark.parametrize("fmt", [Int(1, 32), *INTS], ids=lambda f: f.name)
def test_integers_decode_as_qjax_decodes_them(fmt, rng):
    q = quantize(jnp.asarray(rng.normal(size=(96, 24)), jnp.float32), fmt)
    offset = fmt.offset if fmt.symmetric else 0.0
    spec = WeightSpec(96, 24, "int", fmt.bits, 32, offset)
    weight = Weight(q.codes, q.scale, q.zero)
    np.testing.assert_array_equal(reference.dense(weight, spec), q.dequantize())


@pytest.mark.parametrize(
    ("fmt", "kind", "group"),
    [(NF4(32), "table", 32), (FP8(), "e4m3", 96), (MXFP4(), "e2m1", 32)],
    ids=["nf4", "fp8", "mxfp4"],
)
def test_others_decode_as_qjax_decodes_them(fmt, kind, group, rng):
    q = quantize(jnp.asarray(rng.normal(size=(96, 24)), jnp.float32), fmt)
    spec = WeightSpec(96, 24, kind, fmt.code_bits, group)
    scale = jnp.broadcast_to(q.scale, (spec.groups, 24))
    table = q.table() if kind == "table" else None
    got = reference.dense(Weight(q.codes, scale, None, table), spec)
    np.testing.assert_array_equal(got, q.dequantize(jnp.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_the_bound_sees_a_scale_of_the_wrong_group(name):
    """A bound that any answer meets would prove nothing."""
    weight, spec = random_weight(name, 512, 128)
    x = rows(8, 512, "bfloat16")
    y, bound = reference.exact(x, weight, spec)
    wrong = weight._replace(scale=jnp.roll(weight.scale, 1, -1))
    got = np.asarray(reference.matmul(x, wrong, spec))
    assert (np.abs(got - y) > reference.tolerance(y, bound, "bfloat16")).mean() > 0.5


def test_unknown_backend():
    weight, spec = random_weight("int4", 64, 32)
    with pytest.raises(KernelError, match="backend is 'abacus'"):
        quantized_matmul(rows(1, 64, "float32"), weight, spec, backend="abacus")

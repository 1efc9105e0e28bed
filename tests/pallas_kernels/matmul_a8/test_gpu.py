"""The Hopper kernel: lowered for a GPU, and run where an interpreter exists."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.mosaic import gpu as mgpu

from qjax.pallas_kernels.matmul_a8 import gpu, layout, specs
from qjax.pallas_kernels.matmul_a8.api import matmul_a8
from qjax.pallas_kernels.weights import KernelError, WeightSpec

from ..gpu_interpreter import interpreter, needs_interpreter
from .suite import FORMATS, A8Suite, random_weight, rows

STORED = [n for n in FORMATS if layout.obstacle(random_weight(n, 512, 64)[1]) is None]


class OnGpu(A8Suite):
    """One block, and 4-bit codes through shared memory, as the interpreter wants."""

    backend = "gpu"
    representative = ("w8", "w4-g128", "w4-fp8-g128", "fp8")
    shapes = ((1, 256, 128), (9, 200, 100), (70, 128, 60))

    def interpret(self):
        return interpreter()

    def config(self, m, spec, activation, out, w):
        if layout.obstacle(spec):
            return None
        narrow = jnp.dtype(out).itemsize == 2
        rest = gpu.needs_sums(spec, w, activation)
        base = specs.gpu_default(spec, m, narrow, rest)
        operand = spec.bits == 4 or rest
        return dataclasses.replace(base, blocks=1, stages=2, operand=operand)

    def prepared(self, weight, spec):
        return layout.prepack(weight, spec) or (weight, spec)

    def obstacle(self, spec, m, dtype, activation):
        return gpu.obstacle(spec, m, dtype, activation=activation)


@needs_interpreter
class TestInterpreted(OnGpu):
    @pytest.mark.parametrize("name", ["w8", "w4-g128"])
    def test_whole_tiles(self, name):
        self.check(name, 70, 256, 128, "bfloat16", bias=True)


def lower(function, *arguments):
    """The program for a GPU; layouts and the kernel's dialect are checked."""
    checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exporter = export.export(
        jax.jit(function), platforms=["cuda"], disabled_checks=checks
    )
    return exporter(*arguments).mlir_module()


@pytest.mark.parametrize("m", [16, 300])
@pytest.mark.parametrize("name", STORED)
def test_lowers(name, m):
    weight, spec = layout.prepack(*random_weight(name, 512, 256, layers=2))

    def product(x, weight, layer):
        return matmul_a8(
            x, weight, spec, activation=FORMATS[name][1], layer=layer, backend="gpu"
        )

    text = lower(product, rows(m, 512, "bfloat16"), weight, jnp.int32(1))
    assert "mosaic_gpu" in text
    assert "matmul_a8_hopper" in text


@pytest.mark.parametrize("shape", [(512, 64), (200, 130)])
@pytest.mark.parametrize("name", STORED)
def test_layout_is_inverted(name, shape):
    for layers in (None, 2):
        weight, spec = random_weight(name, *shape, layers=layers)
        if spec.k % 2 and spec.bits == 4:
            continue
        packed, changed = layout.prepack(weight, spec)
        back = layout.unpack(packed, changed)
        for a, b in zip(weight, back, strict=True):
            if a is None:
                assert b is None
                continue
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(
                np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)
            )


def test_registers_are_in_the_order_of_the_unit():
    """Sixteen rows of k, then the two halves of 16 columns."""
    shape = mgpu.WGMMA_LAYOUT_8BIT.registers_shape((64, gpu.DEEP))
    assert [d for d in shape if d > 1] == [8, 2]


def test_refusals():
    spec = WeightSpec(256, 128, "int", 4, 128, 8.0, layout.TAGS[0])

    def why(activation="int8", **changed):
        new = dataclasses.replace(spec, **changed)
        return gpu.obstacle(new, 16, jnp.float32, activation=activation)

    assert why() is None
    assert why("float8_e4m3fn") is None
    assert "prepacked" in why(layout="canonical")
    assert "int codes of 2 bits" in why(bits=2)
    assert "groups of 96" in why(group=96)
    assert "groups of 64" in why(bits=8, group=64)
    assert "do not multiply table" in why(kind="table")
    assert layout.prepack(*random_weight("w2-g64", 256, 64)) is None
    weight, new = layout.prepack(*random_weight("w4-g128", 256, 128))
    config = specs.GpuConfig(12)
    with pytest.raises(KernelError, match="tokens"):
        gpu.matmul(rows(4, 256), weight, new, config=config)

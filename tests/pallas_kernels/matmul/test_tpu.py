"""The TPU kernels in the interpreter, as each generation decodes.

v5e runs the whole suite; of v6e and 7x the formats that they decode in a way of their
own. Both regimes are seen: more than 32 rows count as many.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qjax.pallas_kernels.matmul import layout, specs
from qjax.pallas_kernels.weights import KernelError

from .suite import FORMATS, FormatSuite, MatmulSuite, random_weight


class OnTpu(FormatSuite):
    """Small tiles; undefined memory is NaN, races and bounds are checked."""

    backend = "tpu"
    chip: ClassVar[str]

    def interpret(self):
        return pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
        )

    def config(self, m, spec, transpose):
        return specs.Config(self.chip, m > 32, 16, 128, 16 << 20)

    def prepared(self, weight, spec):
        return layout.prepack(weight, spec) or (weight, spec)


class TestV5e(OnTpu, MatmulSuite):
    chip = "v5e"
    shapes = ((1, 256, 128), (16, 192, 200), (40, 320, 130))
    largest = (40, 300, 150)

    def test_few_groups_in_a_long_region(self):
        self.check("int7-g32", 1, 33, 1, "float32")

    @pytest.mark.parametrize("name", ["int3-g64", "int4-g32-asym", "fp8-e4m3", "mxfp4"])
    def test_many_rows(self, name):
        self.check_format(name, False, m=40)
        self.check_format(name, True, m=40)


@pytest.mark.parametrize("transpose", [False, True], ids=["", "transpose"])
@pytest.mark.parametrize(
    "name",
    "int8-asym int4-g96-asym int3-g64 int2-g64-asym int1-g128 nf4-g64 table3-g32 "
    "fp8-e4m3 nvfp4".split(),
)
class TestV6e(OnTpu):
    chip = "v6e"

    def test_formats(self, name, transpose):
        self.check_format(name, transpose)


@pytest.mark.parametrize("transpose", [False, True], ids=["", "transpose"])
@pytest.mark.parametrize(
    "name", "int4-g64-f16 int2-g256 fp8-e4m3-g128 fp8-e5m2 mxfp4 nf4-g64".split()
)
class Test7x(OnTpu):
    chip = "7x"

    def test_formats(self, name, transpose):
        self.check_format(name, transpose)


@pytest.mark.parametrize("name", FORMATS)
def test_layout_is_inverted(name):
    for k in (512, 200):
        weight, spec = random_weight(name, k, 24)
        packed = layout.prepack(weight, spec)
        assert (packed is None) == (spec.bits in (1, 2, 4, 8))
        if packed is None:
            continue
        assert packed[0].codes.shape == (layout.packed_rows(spec), 24)
        back = layout.unpack(*packed)
        np.testing.assert_array_equal(back.codes, weight.codes)


@pytest.mark.parametrize(
    ("name", "k", "n", "reason"),
    [
        ("int3-g64", 256, 128, "prepack"),
        ("int4", 4_000_000, 128, "VMEM"),
    ],
)
def test_refusals(name, k, n, reason):
    _, spec = random_weight(name, 256, 128)
    spec = dataclasses.replace(spec, k=k, group=min(spec.group, k))
    assert reason in (specs.obstacle(spec, 4, jnp.bfloat16) or "")


def test_a_table_too_large():
    spec = specs.WeightSpec(256, 128, "table", 8, 64)
    assert "256 entries" in (specs.obstacle(spec, 4, jnp.bfloat16) or "")


def test_unknown_chip():
    with pytest.raises(KernelError, match="TPU v2"):
        specs.chip("TPU v2")
    assert specs.chip("TPU v6 lite") == "v6e"
    assert specs.chip() in specs.TUNED


@pytest.mark.parametrize("chip", specs.TUNED)
@pytest.mark.parametrize("m", [1, 16, 100, 4096])
def test_tiles_fit(chip, m):
    for k, n in ((4096, 14336), (14336, 4096), (53248, 16384), (100, 50)):
        for transpose in (False, True):
            spec = specs.WeightSpec(k, n, "int", 4, 128, 8.0)
            found = specs.config(spec, m, "bfloat16", transpose=transpose, chip=chip)
            assert specs.vmem_bytes(spec, found, "bfloat16", transpose) < found.vmem
            assert found.columns % 128 == 0 and found.rows % 16 == 0

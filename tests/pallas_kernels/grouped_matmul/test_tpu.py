"""The TPU kernel in the interpreter, which looks for races and stray accesses."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from qjax.pallas_kernels.matmul import layout
from qjax.pallas_kernels.matmul.specs import Config

from .suite import SIZES, GroupedSuite

VMEM = 32 << 20


class TestTpu(GroupedSuite):
    backend = "tpu"
    refused = ("int4-g96-asym",)

    def interpret(self):
        return pltpu.InterpretParams(detect_races=True)

    def prepared(self, weight, spec):
        return layout.prepack(weight, spec) or (weight, spec)

    def config(self, m, spec, transpose, weights):
        return Config("v5e", False, 16, 128, VMEM)

    @pytest.mark.parametrize("transpose", [False, True])
    @pytest.mark.parametrize("name", ["int4-g128", "int4-g32-asym", "nf4-g64"])
    def test_panels(self, name, transpose):
        config = Config("v5e", True, 32, 128, VMEM)
        self.check(name, SIZES, transpose=transpose, config=config)

    @pytest.mark.parametrize("chip", ["v5p", "v6e", "7x"])
    @pytest.mark.parametrize("name", ["int4-g128", "mxfp4"])
    def test_chips(self, name, chip):
        config = Config(chip, False, 16, 256, VMEM)
        self.check(name, SIZES, config=config)

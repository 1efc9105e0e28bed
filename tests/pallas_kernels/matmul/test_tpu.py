"""The TPU kernels in the interpreter, as each generation decodes."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qjax.pallas_kernels.matmul import layout, specs

from .suite import FORMATS, MatmulSuite, random_weight


class OnTpu(MatmulSuite):
    """Small tiles; undefined memory is NaN, races and bounds are checked."""

    backend = "tpu"
    chip: ClassVar[str]
    prefill_above: ClassVar[int] = 32

    def interpret(self):
        return pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
        )

    def config(self, m, spec, transpose):
        return specs.Config(self.chip, m > self.prefill_above, 16, 128, 16 << 20)

    def prepared(self, weight, spec):
        return layout.prepack(weight, spec)


class TestV5e(OnTpu):
    chip = "v5e"


class TestV6e(OnTpu):
    chip = "v6e"


class Test7x(OnTpu):
    chip = "7x"


@pytest.mark.parametrize("name", FORMATS)
def test_layout_is_inverted(name):
    for k in (512, 200):
        weight, spec = random_weight(name, k, 24)
        packed, changed = layout.prepack(weight, spec)
        back, again = layout.unpack(packed, changed)
        assert again == spec
        whole = slice(0, k * spec.bits // 8)
        np.testing.assert_array_equal(
            jax.device_get(back.codes)[whole].view(np.uint8),
            jax.device_get(weight.codes)[whole].view(np.uint8),
        )
        if changed != spec:
            assert packed.codes.shape == (layout.packed_rows(spec), 24)
            assert packed.codes.dtype == jnp.uint8

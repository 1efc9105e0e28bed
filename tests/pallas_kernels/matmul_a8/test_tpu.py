"""The TPU kernel in the interpreter, and compiled for chips that need not exist."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from qjax.pallas_kernels.matmul_a8 import specs, tpu
from qjax.pallas_kernels.matmul_a8.api import matmul_a8
from qjax.pallas_kernels.weights import Weight, WeightSpec

from .suite import A8Suite, random_weight, rows

TOPOLOGIES = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}


class OnTpu(A8Suite):
    """Small tiles; undefined memory is NaN, races and bounds are checked."""

    backend = "tpu"
    chip: ClassVar[str]

    def interpret(self):
        return pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
        )

    def config(self, m, spec, activation, out, w):
        unroll = m <= 16
        return specs.Config(32 if unroll else 16, 128, 128, self.chip, unroll)

    def obstacle(self, spec, m, dtype, activation):
        return tpu.obstacle(spec, m, dtype, activation=activation, chip=self.chip)


class TestInteger(OnTpu):
    chip = "v5p"  # two cores share the columns
    representative = ("w8", "w4-g128", "w4-g32-asymmetric", "w2-g64")


class TestFloat(OnTpu):
    chip = "7x"
    representative = ("fp8", "w4-fp8-g128", "w4-fp8-asymmetric")


def test_refusals():
    spec = WeightSpec(256, 128, "int", 4, 128, 8.0)

    def why(chip="v6e", activation="int8", **changed):
        new = dataclasses.replace(spec, **changed)
        return tpu.obstacle(new, 16, jnp.float32, activation=activation, chip=chip)

    assert why() is None
    assert why("7x", "float8_e4m3fn") is None
    assert why("7x") == ("7x has no int8 matrix unit; use float8_e4m3fn activations")
    assert "v5e has no float8_e4m3fn" in why("v5e", "float8_e4m3fn")
    assert "not exact" in why("7x", "float8_e4m3fn", bits=8)
    assert "3-bit codes" in why(bits=3)
    assert "table codes" in why(kind="table")
    assert "k=200 is not a multiple of 128" in why(k=200)
    assert "groups of 96" in why(group=96)
    assert "'planes'" in why(layout="planes")
    assert "transposed" in tpu.obstacle(spec, 16, jnp.float32, transpose=True)


@pytest.mark.parametrize("m", [1, 16, 100, 4096])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_default_tiles_fit(chip, m):
    activation = specs.CHIPS[chip].multiplies[0]
    for k, n in ((4096, 14336), (14336, 4096), (28672, 8192), (256, 128)):
        spec = WeightSpec(k, n, "int", 4, 128, 8.0)
        config = specs.default(spec, m, activation, chip)
        assert config.columns % config.strip == 0
        assert config.strip % 128 == 0
        assert config.rows >= min(m, 16)
        size = specs._bytes(spec, config.rows, config.columns)
        assert size <= specs.CHIPS[chip].vmem


@pytest.mark.parametrize("name", ["w4-g128", "w4-g32-asymmetric", "w8", "fp8"])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles(chip, name, monkeypatch):
    """Small shapes for each chip: no temporaries beside the result's."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    activation = specs.CHIPS[chip].multiplies[0]
    weight, spec = random_weight(name, 512, 1024, layers=2)
    if specs.tpu_obstacle(spec, activation, chip):
        assert activation == ("int8" if name == "fp8" else "float8_e4m3fn")
        return
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[chip]
    )
    sharding = SingleDeviceSharding(topology.devices[0])

    def place(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    config = specs.default(spec, 16, activation, chip)

    def product(x, weight, layer):
        return matmul_a8(
            x, weight, spec, activation=activation, layer=layer, config=config
        )

    arguments = (rows(16, 512, "bfloat16"), Weight(*weight), jnp.int32(1))
    compiled = jax.jit(product).lower(*jax.tree.map(place, arguments)).compile()
    dense = spec.k * spec.n * 2
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < dense // 8

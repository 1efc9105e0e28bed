"""The Hopper kernel without a GPU: places of rows, lowering, interpreted products.

Every format and regime is lowered for CUDA (layouts, barriers, copies and instructions
are checked by the compiler). Where jax has a GPU interpreter, small products run in it
with race detection, their weights going through shared memory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.pallas_kernels.grouped_matmul import gpu, specs
from qjax.pallas_kernels.grouped_matmul.api import grouped_gate_up, grouped_matmul
from qjax.pallas_kernels.matmul import gpu_layout, gpu_specs

from ..gpu_interpreter import interpreter, needs_interpreter
from ..matmul.suite import FORMATS, random_weight
from .suite import GroupedSuite, int32

REFUSED = ("int4-g96-asym",)
EXPERTS, K, N = 6, 256, 512


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=7),
    behind=st.integers(0, 20),
    rows=st.sampled_from((8, 16, 64)),
)
def test_places(sizes, behind, rows):
    m = sum(sizes) + behind
    if m == 0:
        return
    where = specs.windows(int32(sizes), m, rows)
    count, place = int(where.count[0]), np.asarray(where.place)[: sum(sizes)]
    assert count == sum(-(-size // rows) for size in sizes)
    assert count <= where.expert.shape[0]
    assert len(set(place)) == len(place)
    np.testing.assert_array_equal(
        np.asarray(where.source)[place], np.arange(sum(sizes))
    )
    owner = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(np.asarray(where.expert)[place // rows], owner)


@pytest.mark.parametrize("name", FORMATS)
def test_defaults_fit_shared_memory(name):
    weight, spec = random_weight(name, K, N)
    made = gpu_layout.prepack(weight, spec)
    for m in (1, 16, 200, 4096) if made else ():
        for transpose, weights in ((False, 1), (False, 2), (True, 1)):
            config = gpu.default(
                made[1], m, 8, jnp.bfloat16, transpose=transpose, weights=weights
            )
            size = config.stages * gpu_specs.stage_bytes(made[1], config, transpose)
            size += gpu_specs.fixed_bytes(made[1], config, transpose)
            assert config.stages >= 3 and size <= gpu_specs.SHARED_BYTES
    assert (made is None) == (name in REFUSED)


def lowered(name, m, dtype="bfloat16", *, gate_up=None, transpose=False, **options):
    """The exported program of a product."""
    weight, spec = random_weight(name, K, N, 0, EXPERTS)
    weight, spec = gpu_layout.prepack(weight, spec)
    x = jax.ShapeDtypeStruct((m, N if transpose else K), dtype)
    sizes = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)

    def run(x, sizes, weight):
        if gate_up is not None:
            return grouped_gate_up(
                x, sizes, weight, weight, spec, activation=gate_up, backend="gpu"
            )
        return grouped_matmul(
            x, sizes, weight, spec, transpose=transpose, backend="gpu", **options
        )

    safe = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    export = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=[safe])
    program = export(x, sizes, weight)
    assert program.out_avals[0].shape == (m, K if transpose else N)
    return program.mlir_module()


@pytest.mark.parametrize("m", [6, 1000])
@pytest.mark.parametrize("name", [n for n in FORMATS if n not in REFUSED])
def test_lowers(name, m):
    assert "mosaic_gpu" in lowered(name, m)


@pytest.mark.parametrize("name", ["int4-g128", "nf4-g64", "int8"])
def test_lowers_transposed(name):
    assert "mosaic_gpu" in lowered(name, 300, transpose=True)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("m", [6, 1000])
def test_lowers_gate_and_up(m, activation):
    text = lowered("int4-g128", m, gate_up=activation)
    assert text.count("@mosaic_gpu") == (2 if activation == "gelu" else 1)


def test_lowers_other_dtypes():
    assert "mosaic_gpu" in lowered("int4-g128", 6, "float16")
    assert "mosaic_gpu" in lowered("int4-g128", 600, out_dtype=jnp.float32)


@needs_interpreter
class TestGpu(GroupedSuite):
    backend = "gpu"
    refused = REFUSED
    dtypes = ("bfloat16", "float16")

    def interpret(self):
        return interpreter(detect_races=True)

    def prepared(self, weight, spec):
        return gpu_layout.prepack(weight, spec) or (weight, spec)

    def config(self, m, spec, transpose, weights):
        rows = 64 if transpose else 128
        return gpu.Config(2, 8, rows, 2, blocks=2, smem_operand=True)

    def test_whole_tiles(self):
        config = gpu.Config(
            2, 64, 64, 2, split=False, blocks=2, smem_operand=True, post=False
        )
        self.check("int4-g128", (70, 0, 5), config=config)

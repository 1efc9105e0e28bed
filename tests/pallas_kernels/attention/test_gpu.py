"""The Hopper kernel: lowered for CUDA here, interpreted where jax can."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from qjax.pallas_kernels.attention import api, reference, specs
from qjax.pallas_kernels.attention.reference import KINDS

from ..gpu_interpreter import interpreter, needs_interpreter
from .suite import AttentionSuite


@needs_interpreter
class TestGpu(AttentionSuite):
    """Interpreted: races, barriers, and two splits of blocks of 64 slots."""

    dtypes = ("bfloat16",)
    widths = (64,)
    lengths = (128, 256)
    groups = (1, 4)
    examples = 4

    def run(self, q, cache, queries, keys, **options):
        return api.decode_attention(
            q, cache, positions=keys, queries=queries, backend="gpu",
            config=specs.Config(block=64, splits=2, stages=2),
            interpret=interpreter(detect_races=True), **options,
        )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width, groups, time", [(128, 4, 1), (64, 8, 2)])
def test_lowers_for_cuda(kind, width, groups, time):
    cache = jax.eval_shape(
        lambda: reference.empty(4, 8, 4096, width, kind, layers=(2,))
    )
    shapes = (
        jax.ShapeDtypeStruct((4, 8 * groups, time, width), jnp.bfloat16),
        cache,
        jax.ShapeDtypeStruct((4,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )

    def decode(q, cache, lengths, layer):
        return api.decode_attention(
            q, cache, lengths, layer=layer, backend="gpu", scale=0.1, window=1000,
            softcap=30.0,
        )  # fmt: skip

    checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    program = export.export(
        jax.jit(decode), platforms=["cuda"], disabled_checks=checks
    )(*shapes)
    assert "mosaic_gpu_v2" in program.mlir_module()

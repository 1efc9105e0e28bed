"""The TPU kernel: interpreted with races and bounds checked; compiled for TPUs."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qjax.pallas_kernels.attention import api, reference, specs
from qjax.pallas_kernels.attention.reference import KINDS

from .suite import AttentionSuite

INTERPRET = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


class TestTpu(AttentionSuite):
    """Interpreted, in blocks of 128 slots."""

    widths = (128, 64)
    lengths = (128, 384)
    groups = (1, 4)
    examples = 5

    def run(self, q, cache, queries, keys, **options):
        problem = specs.Problem.of(q, cache)
        if specs.obstacle("tpu", problem):
            assert problem.row % 128
            return api.decode_attention(
                q, cache, positions=keys, queries=queries, **options
            )
        return api.decode_attention(
            q, cache, positions=keys, queries=queries, backend="tpu",
            config=specs.Config(block=128, heads=2), interpret=INTERPRET, **options,
        )  # fmt: skip


@pytest.mark.parametrize(
    "kind, time, index",
    [("int8", 1, 37), ("int4", 1, 255), ("float8_e4m3fn", 3, 253), ("int4", 140, 50)],
)
def test_write_equals_the_definition_everywhere(kind, time, index, rng):
    def draw(n):
        return jnp.asarray(rng.normal(size=(1, 2, n, 128)), jnp.float32)

    cache = reference.empty(1, 2, 256, 128, kind, layers=(2,))
    cache = api.write_kv(draw(256), draw(256), cache, 0, layer=1)
    new = draw(time), draw(time)
    expected = api.write_kv(*new, cache, index, layer=1, rotate="both")
    got = api.write_kv(
        *new, cache, index, layer=1, rotate="both", backend="tpu", interpret=INTERPRET
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_without_a_copy_of_the_cache(chip, kind, monkeypatch):
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("libtpu is not installed; pip install 'qjax-llm[test]' brings it")
    from jax.experimental import topologies

    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    device = topology.devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def decode(q, k, v, cache, lengths, layer):
        tiles = specs.config(device.device_kind, specs.Problem.of(q, cache))
        cache = api.write_kv(
            k, v, cache, lengths[0], layer=layer, backend="tpu", rotate="keys"
        )
        y = api.decode_attention(
            q, cache, lengths, layer=layer, backend="tpu", scale=0.1, config=tiles
        )
        return y, cache

    cache = jax.eval_shape(lambda: reference.empty(4, 8, 4096, 128, kind, layers=(2,)))
    new = jax.ShapeDtypeStruct((4, 8, 1, 128), jnp.bfloat16)
    arguments = jax.tree.map(
        place,
        (
            jax.ShapeDtypeStruct((4, 32, 1, 128), jnp.bfloat16),
            new,
            new,
            cache,
            jax.ShapeDtypeStruct((4,), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.int32),
        ),
    )
    step = jax.jit(decode, donate_argnums=3).lower(*arguments).compile()
    stored = sum(x.size * x.dtype.itemsize for x in cache)
    memory = step.memory_analysis()
    assert memory.argument_size_in_bytes < 1.02 * stored + (1 << 20)
    assert memory.temp_size_in_bytes < 0.05 * stored + (1 << 20)
    assert memory.alias_size_in_bytes >= stored

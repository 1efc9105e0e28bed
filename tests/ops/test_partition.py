"""Kernel calls split over devices as their operands are, and map over batches."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.formats import Int
from qjax.methods import quantize
from qjax.ops import kernels
from qjax.ops.partition import partitioned
from qjax.tensor import AffineTensor

K, N, M = 256, 64, 8
SEEN: list = []


def call(x, weight, spec, layer, transpose=False):
    """A kernel in plain jnp that notes the spec it was given."""
    SEEN.append(spec)
    if layer is not None:
        weight = type(weight)(*(v if v is None else v[layer] for v in weight))
    fmt = Int(spec.bits, spec.group if spec.groups > 1 else "channel")
    q = AffineTensor(weight.codes, weight.scale, weight.zero, fmt, (spec.k, spec.n))
    w = q.dequantize(jnp.float32)
    return jnp.matmul(x, w.T if transpose else w, precision="highest")


@pytest.fixture
def seen():
    SEEN.clear()
    return SEEN


def operands(group=32, layers=None):
    rng = np.random.default_rng(0)
    shape = (K, N) if layers is None else (layers, K, N)
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q = quantize(w, Int(4, group))
    spec = kernels.kernel_spec(q)
    return q, kernels.kernel_weight(q, spec), spec


def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))


def place(tree, spec):
    return jax.device_put(tree, NamedSharding(mesh(), spec))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("group", [32, "channel"])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_shards_stay_where_they_are(seen, axis, group, transpose):
    q, weight, spec = operands(group)
    split = P("model", None) if axis == "in" else P(None, "model")
    small = split if axis == "out" or group == 32 else P()
    weight_placed = weight._replace(
        codes=place(weight.codes, split), scale=place(weight.scale, small)
    )
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((M, N if transpose else K)), jnp.float32)

    @jax.jit
    def run(x, weight):
        def kernel(*a):
            return call(*a, transpose=transpose)

        return partitioned(kernel, x, weight, spec, None, transpose)

    x_placed = place(x, P("data", None))
    compiled = run.lower(x_placed, weight_placed).compile()
    y = compiled(x_placed, weight_placed)
    w = q.dequantize(jnp.float32)
    np.testing.assert_allclose(
        y, jnp.matmul(x, w.T if transpose else w, precision="highest"), atol=2e-4
    )
    local = seen[-1]
    assert (local.k, local.n) == ((K // 4, N) if axis == "in" else (K, N // 4))
    assert not re.search(r"u8\[[^]]*\][^=]*all-gather", compiled.as_text())


def test_groups_that_shards_would_cut_are_gathered(seen):
    q, weight, spec = operands(group=128)
    placed = weight._replace(codes=place(weight.codes, P("model", None)))
    x = jnp.ones((M, K), jnp.float32)
    run = jax.jit(lambda x, w: partitioned(call, x, w, spec, None, False))
    y = run(place(x, P()), placed)
    np.testing.assert_allclose(y, x @ q.dequantize(jnp.float32), atol=2e-4)
    assert seen[-1] == spec


def test_layers_of_a_stack(seen):
    q, weight, spec = operands(layers=3)
    codes = place(weight.codes, P(None, None, "model"))
    placed = weight._replace(codes=codes)
    x = place(jnp.ones((M, K), jnp.float32), P())
    run = jax.jit(lambda x, w, i: partitioned(call, x, w, spec, i, False))
    for i in range(3):
        y = run(x, placed, jnp.int32(i))
        expected = jnp.ones((M, K)) @ q[i].dequantize(jnp.float32)
        np.testing.assert_allclose(y, expected, atol=2e-4)
    assert seen[-1] == dataclasses.replace(spec, n=N // 4)


def test_shard_map_runs_on_the_shard(seen):
    q, weight, spec = operands()
    local = dataclasses.replace(spec, n=N // 4)
    x = jnp.ones((M, K), jnp.float32)

    def run(x, codes, scale):
        return partitioned(call, x, type(weight)(codes, scale), local, None, False)

    columns = P(None, "model")
    mapped = jax.shard_map(
        run, mesh=mesh(), in_specs=(P(), columns, columns), out_specs=columns
    )
    y = jax.jit(mapped)(x, weight.codes, weight.scale)
    np.testing.assert_allclose(y, x @ q.dequantize(jnp.float32), atol=2e-4)


def test_vmap_over_weights_and_over_activations():
    q, weight, spec = operands(layers=3)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((3, M, K)), jnp.float32)
    w = q.dequantize(jnp.float32)

    def run(x, codes, scale):
        return partitioned(call, x, type(weight)(codes, scale), spec, None, False)

    y = jax.vmap(run)(x, weight.codes, weight.scale)
    np.testing.assert_allclose(y, jnp.matmul(x, w), atol=2e-4)
    y = jax.vmap(run, (0, None, None))(x, weight.codes[0], weight.scale[0])
    np.testing.assert_allclose(y, jnp.matmul(x, w[0]), atol=2e-4)
    y = jax.vmap(run, (None, 0, 0))(x[0], weight.codes, weight.scale)
    np.testing.assert_allclose(y, jnp.matmul(x[0], w), atol=2e-4)

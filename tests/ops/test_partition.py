"""Kernel calls split over devices as their operands are, and map over batches."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.formats import Int
from qjax.methods import quantize
from qjax.ops import grouped_kernels, kernels
from qjax.ops.partition import on_one, partitioned
from qjax.pallas_kernels.grouped_matmul import reference as grouped
from qjax.tensor import AffineTensor
from qjax.wrappers import layer_of

K, N, M = 256, 64, 8
SEEN: list = []


def call(spec, x, *rest, transpose=False):
    """A kernel in plain jnp that notes the spec it was given."""
    SEEN.append(spec)
    *layers, weight = rest
    for layer in layers:
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

        return partitioned(kernel, spec, x, [], [weight], transpose=transpose)

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
    run = jax.jit(lambda x, w: partitioned(call, spec, x, [], [w]))
    y = run(place(x, P()), placed)
    np.testing.assert_allclose(y, x @ q.dequantize(jnp.float32), atol=2e-4)
    assert seen[-1] == spec


def test_layers_of_a_stack(seen):
    q, weight, spec = operands(layers=3)
    codes = place(weight.codes, P(None, None, "model"))
    placed = weight._replace(codes=codes)
    x = place(jnp.ones((M, K), jnp.float32), P())
    run = jax.jit(lambda x, w, i: partitioned(call, spec, x, [i], [w]))
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
        return partitioned(call, local, x, [], [type(weight)(codes, scale)])

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
        return partitioned(call, spec, x, [], [type(weight)(codes, scale)])

    y = jax.vmap(run)(x, weight.codes, weight.scale)
    np.testing.assert_allclose(y, jnp.matmul(x, w), atol=2e-4)
    y = jax.vmap(run, (0, None, None))(x, weight.codes[0], weight.scale[0])
    np.testing.assert_allclose(y, jnp.matmul(x, w[0]), atol=2e-4)
    y = jax.vmap(run, (None, 0, 0))(x[0], weight.codes, weight.scale)
    np.testing.assert_allclose(y, jnp.matmul(x[0], w), atol=2e-4)


EXPERTS = 3
SIZES = (3, 0, 4)  # one row belongs to none


@pytest.fixture
def gpu_kernel(seen, monkeypatch):
    """The grouped kernel of GPUs replaced by its definition, which notes its specs."""

    def matmul(x, sizes, weights, spec, *, first, out_dtype, transpose, activation):
        seen.append(spec)
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=len(sizes)
        )
        weights = [jax.tree.map(cut, w) for w in weights]
        if activation is None:
            y = grouped.grouped_matmul(x, sizes, *weights, spec, transpose=transpose)
        else:
            y = grouped.gate_up(x, sizes, *weights, spec, activation)
        return y.astype(out_dtype)

    monkeypatch.setattr("qjax.pallas_kernels.grouped_matmul.gpu.matmul", matmul)


def experts(seed=0):
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_normal((EXPERTS, K, N)), jnp.float32)
    return quantize(w, Int(4, 32))


def grouped_run(x, sizes, *weights, transpose=False):
    """A product, or with two weights the gated form, as GPUs run it."""
    if len(weights) == 1:
        args = ("gpu", x, sizes, weights[0], transpose, None)
        return grouped_kernels.run(*args)
    return grouped_kernels.run_gated("gpu", x, sizes, *weights, "silu", None)


def of_experts(x, *weights, transpose=False):
    """The same, in float32."""
    expert = np.repeat(np.arange(EXPERTS), SIZES)
    both = []
    for q in weights:
        w = q.dequantize(jnp.float32)[expert]
        w = jnp.swapaxes(w, 1, 2) if transpose else w
        rows = x[: len(expert), None]
        both.append(jnp.matmul(rows, w, precision="highest")[:, 0])
    y = both[0] if len(both) == 1 else jax.nn.silu(both[0]) * both[1]
    return jnp.pad(y, [(0, len(x) - len(y)), (0, 0)])


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(
    "axis, transpose, count",
    [("in", False, 1), ("in", True, 1), ("out", False, 1), ("out", True, 1),
     ("in", False, 2), ("out", False, 2)],
)  # fmt: skip
def test_grouped(seen, gpu_kernel, axis, transpose, count, explicit):
    """Columns stay, sums follow before an activation, and rows are gathered."""
    split = P(None, "model", None) if axis == "in" else P(None, None, "model")
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((M, N if transpose else K)), jnp.float32)
    sizes = jnp.asarray(SIZES, jnp.int32)
    weights = [experts(seed) for seed in range(count)]
    expected = of_experts(x, *weights, transpose=transpose)
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    devices = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    run = jax.jit(functools.partial(grouped_run, transpose=transpose))
    with jax.set_mesh(devices):
        weights = jax.device_put(weights, NamedSharding(devices, split))
        y = run(jax.device_put(x, NamedSharding(devices, P("data"))), sizes, *weights)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=2e-3)
    summed = axis == "in" and count == 1
    shard = (K // 4 if summed else K, N if axis == "in" else N // 4)
    assert (seen[-1].k, seen[-1].n) == shard


def test_grouped_layers_and_vmap(seen, gpu_kernel):
    layers = jax.tree.map(lambda *x: jnp.stack(x), *map(experts, range(2)))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, M, K)), jnp.float32)
    sizes = jnp.asarray([SIZES, SIZES[::-1]], jnp.int32)
    y = jax.vmap(lambda x, i: grouped_run(x, sizes[0], layer_of(layers, i)))(
        x, jnp.arange(2, dtype=jnp.int32)
    )
    for i in range(2):
        want = of_experts(x[i], experts(i))
        np.testing.assert_allclose(y[i], want, rtol=1e-4, atol=2e-3)


def test_one_or_several_devices_under_vmap():
    """What compilers for TPUs cannot split has a rule for `jax.vmap`."""
    x = jnp.arange(16.0).reshape(8, 2)

    def run(x):
        return on_one("tpu", lambda x: x + 1, lambda x: x - 1, x)

    np.testing.assert_array_equal(jax.jit(jax.vmap(run))(x), x + 1)
    placed = place(x, P("model", None))
    np.testing.assert_array_equal(jax.jit(jax.vmap(run))(placed), x - 1)

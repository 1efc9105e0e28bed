"""Optimizers on devices: how states are split, and what an update takes of memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from qjax.ops import target
from qjax.pallas_kernels.optimizer import xla
from qjax.train.fused import adamw, apply
from qjax.train.optimizers import Optimizer, make_optimizer
from qjax.train.state_shardings import state_shardings
from tests.ops.test_memory import device_topology


def arrays(seed, shapes):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


SPLITS = {
    "lead": ((4, 40, 128), P("x", None, None)),
    "rows": ((2, 64, 64), P(None, ("x", "y"), None)),
    "both": ((2, 4, 1024), P(None, "x", "y")),
    "blocks cut by columns": ((2, 16, 256), P(None, None, "y")),
    "small": ((4, 4), P("x", None)),
}


@pytest.fixture(scope="module")
def whole():
    """Parameters, gradients, and what a step on one device makes of them."""
    shapes = {name: shape for name, (shape, _) in SPLITS.items()}
    params, grads = arrays(0, shapes), arrays(1, shapes)
    tx = adamw(1e-2, weight_decay=0.1)
    return params, grads, jax.jit(tx.apply)(params, grads, tx.init(params))


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_shards(kind, whole):
    """Bits are those of one device; parameters and moments stay split as they are."""
    params, grads, want = whole
    tx = adamw(1e-2, weight_decay=0.1)
    axes = (getattr(AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axes, devices=jax.devices()[:4])
    places = {k: NamedSharding(mesh, spec) for k, (_, spec) in SPLITS.items()}
    params, grads = (jax.device_put(x, places) for x in (params, grads))
    told = places if kind == "Auto" else None
    with jax.set_mesh(mesh):
        state = tx.init(params)
        got = jax.jit(lambda *x: apply(tx, *x, told))(params, grads, state)
        expected = state_shardings(tx, params, places)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_array_equal(a, b)
    for found in (state, got[1]):
        for x, place in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert x.sharding.is_equivalent_to(place, x.ndim)
    for name, place in places.items():
        assert got[0][name].sharding.is_equivalent_to(place, got[0][name].ndim)
    assert expected.moments["lead"].m.absmax.spec == P("x", None)
    assert expected.moments["both"].m.absmax.spec == P(None, "x")


def test_states_of_optax_are_split_like_parameters():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    places = {"w": NamedSharding(mesh, P("x", None))}
    params = {"w": jnp.ones((4, 6))}
    tx = make_optimizer(Optimizer("sgd", b1=0.9), 5)
    found = jax.tree.leaves(state_shardings(tx, params, places))
    assert [x.spec for x in found if x.spec] == [P("x", None)]
    assert len(found) == len(jax.tree.leaves(tx.init(params)))


def compiled(tx, shape, dtype, place=None, kind="cpu"):
    """`apply` of one leaf, donated, for a kind of device."""
    given = [{"w": jax.ShapeDtypeStruct(shape, dtype)}] * 2
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (*given, jax.eval_shape(tx.init, given[0])),
    )
    with target(kind):
        step = jax.jit(lambda *x: tx.apply(*x), donate_argnums=(0, 2))
        memory = step.lower(*given).compile().memory_analysis()
    assert memory is not None
    return memory


@pytest.mark.parametrize("shape", [(8, 512, 512), (32, 255, 257)])
def test_no_temporary_on_cpu(shape, monkeypatch):
    """Beside a donated leaf of 8 MB, and its state, there is little."""
    jax.config.update("jax_disable_most_optimizations", False)
    monkeypatch.setattr(xla, "CHUNKS", {"cpu": 1 << 14, "other": 1 << 14})
    memory = compiled(adamw(1e-3, clip=1.0), shape, jnp.float32)
    assert memory.temp_size_in_bytes < 0.3 * 4 * math.prod(shape)
    assert memory.alias_size_in_bytes > 6 * math.prod(shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_temporary_on_a_tpu(dtype, monkeypatch):
    """Beside a leaf of 64 MB there are 2 %; as updates it would be all of it."""
    place = SingleDeviceSharding(device_topology("v5e", monkeypatch).devices[0])
    shape = (4, 2048, 2048)
    tx = adamw(1e-3, clip=1.0)
    memory = compiled(tx, shape, dtype, place, "TPU v5 lite")
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    assert memory.temp_size_in_bytes < 0.02 * size
    assert memory.alias_size_in_bytes >= size + 2 * math.prod(shape)

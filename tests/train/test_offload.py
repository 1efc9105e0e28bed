"""Optimizer states in host memory: where arrays lie, and that nothing else changes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from qjax.errors import SpecError, UnsupportedError
from qjax.ops import target
from qjax.train import offload
from qjax.train.fused import adamw, apply
from qjax.train.offload import (
    available_bytes,
    host_states,
    peak_bytes,
    should_offload,
    to_device,
    to_host,
)
from qjax.train.optimizers import Optimizer, make_optimizer, state_bytes
from tests.ops.test_memory import device_topology

SHAPES = {"stack": (3, 16, 256), "one": (1, 128, 64), "odd": (50, 90)}


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def kinds(tree):
    return [x.sharding.memory_kind for x in jax.tree.leaves(tree)]


def test_large_arrays_move_and_scalars_stay():
    params = {"large": jnp.ones((400, 256)), "small": jnp.ones((300, 300))}
    state = make_optimizer(Optimizer(offload="always"), 9).init(params)
    moments = state.moments
    assert kinds(moments["large"]) == ["pinned_host"] * 2
    assert kinds(moments["small"]) == ["device"] * 2  # under 100000 elements
    assert kinds(state.count) == ["device"]
    for choice in ("never", "auto"):  # "auto" is for the trainer to decide
        state = make_optimizer(Optimizer(offload=choice), 9).init(params)
        assert set(kinds(state)) == {"device"}
    assert set(kinds(to_device(to_host(state, 1)))) == {"device"}


@pytest.mark.parametrize("bits", [8, 32])
def test_bits_are_those_of_the_device(bits):
    """Streamed by layers, by rows and whole, inside of a branch as a step has it."""
    tx = adamw(1e-2, weight_decay=0.1, bits=bits)

    @jax.jit
    def step(params, grads, state):
        held = (params, state)
        on = grads["odd"][0, 0] < 1e9
        return jax.lax.cond(
            on, lambda h: tx.apply(h[0], grads, h[1]), lambda h: h, held
        )

    near = far = arrays(0)
    state = tx.init(near)
    hosted = host_states(tx, 1000).init(near)
    before = kinds(hosted)
    assert before.count("pinned_host") == 6
    for seed in (1, 2):
        near, state = step(near, arrays(seed), state)
        far, hosted = step(far, arrays(seed), hosted)
    assert kinds(hosted) == before
    both = zip(*map(jax.tree.leaves, ((near, state), (far, hosted))), strict=True)
    for a, b in both:
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_updates_of_hosted_states(name):
    """As an optax transformation, for ours and for others; jitted `init` too."""
    plain = make_optimizer(Optimizer(name, b1=0.9), 9)
    tx = host_states(plain, 1000)
    params, grads = arrays(0), arrays(1)
    state = jax.jit(tx.init)(params)
    assert "pinned_host" in kinds(state)
    updates, new = jax.jit(tx.update)(grads, state, params)
    assert kinds(new) == kinds(state)
    want, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, want
    )
    moved, again = jax.jit(lambda *x: apply(tx, *x))(params, grads, state)
    assert kinds(again) == kinds(state)
    want = optax.apply_updates(params, want)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), moved, want)


def test_split_states_stay_split():
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Explicit,), devices=jax.devices()[:2])
    params = {
        "w": jax.device_put(arrays(0)["stack"], NamedSharding(mesh, P(None, "x")))
    }
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    tx = host_states(adamw(1e-2), 1000)
    with jax.set_mesh(mesh):
        state = tx.init(params)
        new, moved = jax.jit(tx.apply)(params, grads, state)
    codes = moved.moments["w"].m.codes
    assert codes.sharding.spec == P(None, "x", None)
    assert codes.sharding.memory_kind == "pinned_host"
    alone = {"w": jax.device_put(np.asarray(params["w"]), jax.devices()[0])}
    slopes = jax.tree.map(lambda x: 0.1 * x, alone)
    plain = adamw(1e-2)
    want, _ = jax.jit(plain.apply)(alone, slopes, plain.init(alone))
    np.testing.assert_array_equal(new["w"], want["w"])


def test_auto_looks_at_what_the_step_needs():
    step = jax.jit(lambda x: x @ x + 1, donate_argnums=0)
    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    memory = step.lower(shape).compile().memory_analysis()
    need = peak_bytes(memory)
    assert need >= 4 * 256 * 256  # the donated matrix counts once
    assert not should_offload("auto", memory, need)
    assert should_offload("auto", memory, need - 1)
    assert not should_offload("auto", memory, None)  # a device without a limit
    assert should_offload("always") and not should_offload("never", memory, 0)
    assert available_bytes() is None or available_bytes() > 0
    with pytest.raises(SpecError, match="compile it and give its memory_analysis"):
        should_offload("auto", None, 1)
    with pytest.raises(SpecError, match="offload is 'off'; expected one of never"):
        should_offload("off")


def test_devices_without_host_memory_are_named():
    memory = types.SimpleNamespace(kind="device")
    device = types.SimpleNamespace(
        device_kind="toaster", addressable_memories=lambda: [memory]
    )
    with pytest.raises(
        UnsupportedError, match="toaster has memories device, not pinned"
    ):
        offload._check_device(device)


def test_shapes_stand_for_arrays():
    device = jax.devices()[0]
    one = NamedSharding(Mesh([device], ("x",)), P())
    large = jax.ShapeDtypeStruct((1000, 100), jnp.float32, sharding=one)
    moved = to_host(large)
    assert moved.sharding.memory_kind == "pinned_host" and moved.shape == large.shape
    assert to_device(moved).sharding.memory_kind == "device"
    single = to_host(large.update(sharding=SingleDeviceSharding(device)))
    assert single.sharding.memory_kind == "pinned_host"
    assert single.sharding.device_set == {device}
    with pytest.raises(SpecError, match=r"sharding of float32\[1000, 100\] is None"):
        to_host(large.update(sharding=None))


@pytest.mark.parametrize("bits", [8, 32])
def test_host_bytes_of_a_tpu_program(bits, monkeypatch):
    """The host holds the state, the device the moments of a layer at a time."""
    devices = device_topology("v5e", monkeypatch).devices
    place = SingleDeviceSharding(devices[0])
    leaves = {name: (8, 1024, 1024) for name in "ab"}
    tx = adamw(1e-3, clip=1.0, bits=bits)
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in leaves.items()}

    def step(params, grads, state):
        def update(held):
            return tx.apply(held[0], grads, held[1])

        finite = jnp.isfinite(grads["a"][0, 0, 0])
        return jax.lax.cond(finite, update, lambda held: held, (params, state))

    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, params, jax.eval_shape(tx.init, params)),
    )
    state = to_host(given[2], 1000)
    with target("TPU v5 lite"):
        lowered = jax.jit(step, donate_argnums=(0, 2)).lower(*given[:2], state)
        memory = lowered.compile().memory_analysis()
    assert memory is not None
    held = state_bytes(state) - 4  # the count is on the device
    assert memory.host_argument_size_in_bytes == held
    assert memory.host_alias_size_in_bytes == held
    weights = 2 * 4 * 8 * 1024 * 1024
    assert memory.argument_size_in_bytes - 2 * weights < 0.01 * weights
    assert memory.temp_size_in_bytes < 6 * 4 * 1024 * 1024

"""Optimizers: optax's numbers, 8-bit states, settings and schedules."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qjax.errors import SpecError
from qjax.pallas_kernels.optimizer.api import Moment8
from qjax.train.fused import Fused, adamw, apply, lion
from qjax.train.optimizers import (
    Optimizer,
    learning_rate,
    make_optimizer,
    state_bytes,
)

SHAPES = {
    "stack": (3, 16, 128),
    "ragged": (3, 50, 30),  # blocks end with each matrix
    "small": (5, 7),
}
RULES = {"adamw": (adamw, optax.adamw), "lion": (lion, optax.lion)}


def arrays(seed, dtype=jnp.float32, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal(s), dtype) for k, s in shapes.items()}


def run(tx, params, count=3, way="apply"):
    """Parameters and state after some steps, by `apply` or by optax's contract."""

    def step(params, grads, state):
        if way == "apply":
            return apply(tx, params, grads, state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, step = tx.init(params), jax.jit(step)
    for seed in range(count):
        params, state = step(params, arrays(seed + 1, params["small"].dtype), state)
    return params, state


def assert_trees(got, want, **tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.float32(x), np.float32(y), **tolerance
        ),
        got,
        want,
    )


@pytest.mark.parametrize("way", ["apply", "update"])
@pytest.mark.parametrize("rule", RULES)
def test_float32_states_give_the_steps_of_optax(rule, way):
    mine, theirs = RULES[rule]
    rate = optax.linear_schedule(1e-2, 1e-3, 4)
    options = {"b1": 0.8, "b2": 0.95, "weight_decay": 0.1}
    want = optax.chain(optax.clip_by_global_norm(1.0), theirs(rate, **options))
    tx = mine(rate, **options, clip=1.0, bits=32)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        found, _ = run(want, arrays(0), way="update")
    assert_trees(run(tx, arrays(0), way=way)[0], found, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
def test_both_ways_are_one(rule, dtype):
    """New parameters are the old ones and the updates; states are equal."""
    tx = RULES[rule][0](1e-2, weight_decay=0.1, clip=1.0)
    got, state = run(tx, arrays(0, dtype), way="apply")
    with jax.numpy_dtype_promotion("standard"):
        want, other = run(tx, arrays(0, dtype), way="update")
    coarse = {"float32": 1e-6, "bfloat16": 0.04}[dtype]
    assert_trees(got, want, atol=coarse, rtol=0)
    assert got["stack"].dtype == dtype
    for a, b in zip(*map(jax.tree.leaves, (state, other)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_layers_are_as_if_alone(rule):
    """A stack is updated as its matrices would be, each with blocks of its own."""
    tx = RULES[rule][0](1e-2, min_size=0)
    shapes = {name: SHAPES[name] for name in ("stack", "ragged")}
    params, grads = arrays(0, shapes=shapes), arrays(1, shapes=shapes)
    new, state = jax.jit(tx.apply)(params, grads, tx.init(params))
    for i in range(3):
        own, slopes = ({k: v[i] for k, v in x.items()} for x in (params, grads))
        one, alone = jax.jit(tx.apply)(own, slopes, tx.init(own))
        layer = jax.tree.map(lambda x: x[i], (new, state.moments))  # noqa: B023
        for a, b in zip(*map(jax.tree.leaves, (layer, (one, alone.moments)))):  # noqa: B905
            np.testing.assert_array_equal(a, b)


def test_states_take_what_they_claim():
    tx = adamw(1e-3)
    state = tx.init(arrays(0))
    moments = state.moments
    assert isinstance(moments["stack"].m, Moment8)
    assert moments["small"].m.dtype == jnp.float32  # under 4096 elements
    assert moments["stack"].v.absmax.shape == (3, 8)
    assert moments["ragged"].v.absmax.shape == (3, 6)
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    blocks = {"stack": 24, "ragged": 18}
    want = 4 + 8 * sizes["small"]
    want += sum(2 * (sizes[name] + 4 * count) for name, count in blocks.items())
    assert state_bytes(state) == want
    assert state_bytes(jax.eval_shape(tx.init, arrays(0))) == want
    large = jax.ShapeDtypeStruct((32, 4096, 4096), jnp.float32)
    for make, rate in ((adamw, 2.03125), (lion, 1.015625)):
        state = jax.eval_shape(make(1e-3).init, {"w": large})
        assert state_bytes(state) == 4 + rate * large.size


def test_in_chains_and_under_masks():
    """What a mask leaves out passes; what follows in a chain sees the updates."""
    shapes = {"stack": SHAPES["stack"], "small": SHAPES["small"]}
    params, grads = arrays(0, shapes=shapes), arrays(1, shapes=shapes)
    masked = optax.masked(adamw(1e-2), {"stack": True, "small": False})
    tx = optax.chain(masked, optax.scale(0.5))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    plain = adamw(1e-2)
    want, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    want["small"] = grads["small"]
    assert_trees(updates, jax.tree.map(lambda x: 0.5 * x, want), rtol=1e-6)


def test_the_rate_is_that_of_the_step():
    tx = adamw(lambda count: jnp.where(count == 1, 1.0, 0.0), bits=32)
    params = arrays(0)
    first, state = tx.apply(params, arrays(1), tx.init(params))
    assert_trees(first, params, rtol=0)
    second, _ = tx.apply(first, arrays(1), state)
    assert np.abs(second["stack"] - params["stack"]).max() > 0.5


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_every_optimizer_trains(name, bits):
    """A least-squares problem; decay, clipping and the schedule take part."""
    if bits == 8 and name in ("adafactor", "sgd"):
        with pytest.raises(SpecError, match=f"bits=8 is for .*{name} has no 8-bit"):
            Optimizer(name, bits=bits)
        return
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.standard_normal((96, 64)), jnp.float32)
    goal = a @ jnp.asarray(rng.standard_normal((64, 80)), jnp.float32)
    rate = {"sgd": 2.0, "adafactor": 0.5}.get(name, 0.05)
    config = Optimizer(name, rate, "cosine", bits=bits, weight_decay=1e-3, clip=50.0)
    tx = make_optimizer(config, 60)

    def loss(x):
        return jnp.mean(jnp.square(a @ x["w"] - goal))

    @jax.jit
    def step(x, state):
        return apply(tx, x, jax.grad(loss)(x), state)

    x = {"w": jnp.zeros((64, 80))}
    state, start = tx.init(x), loss(x)
    for _ in range(60):
        x, state = step(x, state)
    assert loss(x) < start / 10


@pytest.mark.parametrize("name", ["adafactor", "sgd"])
def test_decay_is_decoupled_in_those_of_optax(name):
    params, grads = arrays(0), arrays(1)
    moved = []
    for decay in (0.0, 0.1):
        config = Optimizer(name, 1e-2, warmup=0, weight_decay=decay, clip=None)
        tx = make_optimizer(config, 5)
        step = jax.jit(functools.partial(apply, tx))
        moved.append(step(params, grads, tx.init(params))[0])
    want = jax.tree.map(lambda p, new: new - 1e-3 * p, params, moved[0])
    assert_trees(moved[1], want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule):
    rate = learning_rate(Optimizer(learning_rate=3.0, schedule=schedule, warmup=4), 10)
    got = [float(jnp.asarray(rate(i))) for i in range(12)]
    left = [min((i - 4) / 6, 1.0) for i in range(4, 12)]
    falls = {
        "constant": [3.0 for _ in left],
        "linear": [3.0 * (1 - x) for x in left],
        "cosine": [1.5 * (1 + math.cos(math.pi * x)) for x in left],
    }[schedule]
    want = [0.6, 1.2, 1.8, 2.4, *falls]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert all(x > 0 for x in got[:10])
    short = learning_rate(Optimizer(schedule=schedule), 1)  # 3 % of a step is none
    assert jnp.asarray(short(0)) == np.float32(2e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; nothing would be trained"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001; .* above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3'"),
        ({"name": "adam"}, "name is 'adam'; did you mean adamw.*one of adamw, lion"),
        ({"name": 3}, "name is 3; expected one of"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; did you mean cosine"),
        ({"offload": "alway"}, "offload is 'alway'; did you mean always"),
        ({"warmup": -1}, "warmup is -1; expected a number from 0"),
        ({"warmup": 2.5}, "warmup is 2.5; expected a fraction below 1, or a whole"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"clip": 0.0}, "clip is 0.0; expected a norm above 0, or None"),
        ({"bits": 4}, "bits is 4; expected 8 or 32"),
        ({"min_size_8bit": -1}, "min_size_8bit is -1"),
        ({"b1": 1.0}, r"b1 is 1.0; expected a number in \[0, 1\)"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"name": "lion", "eps": 1e-8}, "eps is 1e-08; lion has none, only b1, b2"),
        ({"name": "sgd", "b2": 0.9}, "b2 is 0.9; sgd has none, only b1"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(SpecError, match=f"optimizer: {message}"):
        Optimizer(**change)


@pytest.mark.parametrize("steps, message", [(3, "takes 5 steps.*has 3"), (0, "has 0")])
def test_a_run_must_be_longer_than_its_warmup(steps, message):
    with pytest.raises(SpecError, match=message):
        make_optimizer(Optimizer(warmup=5), steps)


def test_bad_trees_are_named():
    tx = adamw(1e-2, weight_decay=0.1)
    params = {"w": jnp.ones((3, 3))}
    state = tx.init(params)
    with pytest.raises(SpecError, match=r"parameter \['w'\] is uint8, expected one of"):
        tx.init({"w": jnp.ones((3, 3), jnp.uint8)})
    with pytest.raises(SpecError, match="gradients and the state are different trees"):
        tx.update({"v": params["w"]}, state, params)
    with pytest.raises(SpecError, match="needs the parameters for weight decay"):
        tx.update(params, state)
    with pytest.raises(SpecError, match="bits is 16; expected 8 or 32"):
        adamw(1e-2, bits=16)


def test_unusual_gradients():
    """No NaN from zero gradients; a NaN stays where it is."""
    tx = adamw(1e-2, min_size=0)
    params = {"w": jnp.ones((2, 256))}
    step = jax.jit(tx.apply)
    new, state = step(params, {"w": jnp.zeros((2, 256))}, tx.init(params))
    np.testing.assert_array_equal(new["w"], params["w"])
    bad = {"w": jnp.zeros((2, 256)).at[0, 3].set(jnp.nan)}
    new, _ = step(params, bad, state)
    assert np.isnan(new["w"]).sum() == 1
    empty = {"w": jnp.zeros((0, 4))}
    new, _ = tx.apply(empty, empty, tx.init(empty))
    assert new["w"].shape == (0, 4)


def test_a_fused_one_stays_a_transformation():
    tx = make_optimizer(dataclasses.replace(Optimizer(), bits=8), 5)
    assert isinstance(tx, Fused) and isinstance(tx, optax.GradientTransformation)
    init, update = tx
    assert callable(init) and callable(update)

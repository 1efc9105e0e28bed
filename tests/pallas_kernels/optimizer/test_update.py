"""8-bit AdamW and Lion: backends against the reference, the reference against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from qjax.formats.codebook import dynamic_map
from qjax.pallas_kernels.optimizer import api, dynamic, specs, xla
from qjax.pallas_kernels.weights import KernelError

from .suite import RULES, UpdateSuite, assert_close, random_operands, sizes, update


class TestReference(UpdateSuite):
    backend = "reference"
    shapes = ((2, 300), (256,), (1,))

    def draw_shape(self):
        return st.tuples(st.integers(1, 3), st.integers(1, 400))


class TestXla(UpdateSuite):
    backend = "xla"
    shapes = ((2, 300), (256,), (1,), (3, 5, 77))

    def draw_shape(self):
        return st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple)

    @pytest.mark.parametrize("size", [1024, 2048, 2500])
    def test_chunks(self, size, monkeypatch):
        monkeypatch.setattr(xla, "CHUNKS", {"cpu": 1024, "other": 2048})
        for rule in RULES:
            self.check(rule, random_operands(rule, (size,)))

    @pytest.mark.parametrize("rule", RULES)
    def test_in_place_without_copies(self, rule):
        """Donated operands are reused; beside them lives a chunk."""
        p = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
        state = jax.eval_shape(lambda p: api.init8(p, rule), p)

        def step(p, g, state):
            return update(rule, p, g, state)

        compiled = jax.jit(step, donate_argnums=(0, 2)).lower(p, p, state).compile()
        used = compiled.memory_analysis()
        assert used.temp_size_in_bytes <= 40 * xla.CHUNKS["cpu"]
        assert used.temp_size_in_bytes < 4 * 4096 * 1024
        own = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((p, state)))
        assert used.alias_size_in_bytes == own


class TestTpu(UpdateSuite):
    backend = "tpu"
    interpret = pltpu.InterpretParams(detect_races=True)
    shapes = ((32, 256), (40, 256), (2, 32, 512))

    def draw_shape(self):
        return st.tuples(st.integers(1, 70), st.sampled_from([256, 512]))

    def test_many_tiles(self):
        operands = random_operands("adamw", (64, 1024))
        config = specs.TpuConfig(32, 512)
        got = self.update("adamw", *operands, config=config)
        want = update("adamw", *operands, backend="reference")
        assert_close(got, want, sizes("adamw", *operands))

    @pytest.mark.parametrize(
        "shape,dtype,words",
        [
            ((512,), jnp.float32, "one axis"),
            ((8, 300), jnp.float32, "300 columns"),
            ((2, 24, 256), jnp.float32, "24 rows"),
            ((32, 256), jnp.float16, "float16"),
        ],
    )
    def test_refuses_with_reasons(self, shape, dtype, words):
        p = jnp.zeros(shape, dtype)
        with pytest.raises(KernelError, match=words):
            update("adamw", p, p, api.init8(p), backend="tpu")


if hasattr(plgpu, "InterpretGPUParams"):  # not in jax 0.10

    class TestGpu(UpdateSuite):
        backend = "gpu"
        interpret = plgpu.InterpretGPUParams(detect_races=True)  # pyright: ignore
        shapes = ((2, 1024), (4, 3, 1024))

        def draw_shape(self):
            return st.tuples(st.integers(1, 3), st.just(1024))


@pytest.mark.parametrize("rule", RULES)
def test_gpu_kernel_lowers(rule):
    """Layouts and operations of the kernel; no GPU is needed to lower it."""
    p = jax.ShapeDtypeStruct((8, 512), jnp.float32)
    state = jax.eval_shape(lambda p: api.init8(p, rule), p)

    def step(p, g, state):
        return update(rule, p, g, state, backend="gpu")

    unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = export.export(
        jax.jit(step), platforms=["cuda"], disabled_checks=unchecked
    )(p, p, state)
    assert "mosaic_gpu" in exported.mlir_module()
    with pytest.raises(KernelError, match="300 elements"):
        flat = jnp.zeros((300,))
        update(rule, flat, flat, api.init8(flat, rule), backend="gpu")


@pytest.mark.parametrize("signed", [True, False])
def test_decodes_the_values_of_bitsandbytes(signed):
    np.testing.assert_array_equal(dynamic.table(signed), dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
def test_encodes_to_the_nearest_value(signed):
    """All midpoints and their surroundings: the wrong side only within 2 ulp."""
    table = dynamic_map(signed)
    bounds = (table[:-1] + table[1:]) * np.float32(0.5)
    run = jax.jit(lambda u: dynamic.encode(u, signed=signed))
    np.testing.assert_array_equal(np.asarray(run(jnp.asarray(table))), np.arange(256))
    for steps in range(-5, 6):
        u = bounds
        for _ in range(abs(steps)):
            u = np.nextafter(u, np.float32(2 if steps > 0 else -2))
        got = np.asarray(run(jnp.asarray(u)))
        below = np.arange(255)
        if abs(steps) > 2:
            np.testing.assert_array_equal(got, below + (steps > 0))
        else:
            assert ((got == below) | (got == below + 1)).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=32, max_size=32))
def test_encoding_is_nearest(values):
    u = np.array(values, np.float32)
    for signed in (True, False):
        x = u if signed else np.abs(u)
        table = np.float64(dynamic_map(signed))
        code = np.asarray(dynamic.encode(jnp.asarray(x), signed=signed))
        best = np.abs(table[None] - np.float64(x)[:, None]).min(axis=1)
        assert (np.abs(table[code] - x) <= best + 3e-7 * np.abs(x) + 1e-30).all()


def test_beyond_the_ends():
    u = jnp.array([-9.0, -1.0, 1.0, 9.0, 0.0, -0.0])
    signed = np.asarray(dynamic.encode(u, signed=True))
    np.testing.assert_array_equal(signed, [0, 0, 255, 255, 127, 127])
    unsigned = np.asarray(dynamic.encode(jnp.abs(u), signed=False))
    np.testing.assert_array_equal(unsigned, [255, 255, 255, 255, 0, 0])


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_optax(rule):
    """optax with moments rounded to the stored ones before each step."""
    p, g, _ = random_operands(rule, (3, 256))
    if rule == "adamw":
        tx = optax.adamw(1e-2, weight_decay=0.1)
    else:
        tx = optax.lion(1e-2, weight_decay=0.1)
    state, theirs = api.init8(p, rule), tx.init(p)
    for count in range(1, 5):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, theirs = tx.update(g, theirs, p)
            want = optax.apply_updates(p, updates)
        p, state = update(rule, p, g, state, count=count, weight_decay=0.1)
        np.testing.assert_allclose(p, want, rtol=2e-6, atol=2e-7)
        moments = {"mu": api.moment(state.m, signed=True)}
        for name, signed in (("mu", True), ("nu", False)):
            index = 0 if signed else 1
            if index < len(state):
                stored = api.moment(state[index], signed=signed)
                near = np.asarray(getattr(theirs[0], name))
                scale = np.abs(near).max()
                np.testing.assert_allclose(stored, near, atol=0.01 * scale)
                moments[name] = stored
        theirs = (theirs[0]._replace(**moments), *theirs[1:])
        g = g * 0.7 + 0.01


@pytest.mark.parametrize("rule", RULES)
def test_converges_like_float32(rule):
    """A least-squares problem: the 8-bit run ends as low as the float32 one."""
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)
    b = a @ jnp.asarray(rng.standard_normal((32, 16)), jnp.float32)

    def loss(x):
        return jnp.mean(jnp.square(a @ x - b))

    tx = {"adamw": optax.adamw, "lion": optax.lion}[rule](0.02, weight_decay=0.0)
    x = y = jnp.zeros((32, 16))
    state, theirs = api.init8(x, rule), tx.init(y)

    @jax.jit
    def both(x, state, y, theirs, count):
        x, state = update(
            rule, x, jax.grad(loss)(x), state, count, 0.02, weight_decay=0.0
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, theirs = tx.update(jax.grad(loss)(y), theirs, y)
            return x, state, optax.apply_updates(y, updates), theirs

    start = loss(x)
    for count in range(1, 151):
        x, state, y, theirs = both(x, state, y, theirs, count)
    assert loss(y) < start / 4
    assert loss(x) < start / 4


def test_empty():
    p = jnp.zeros((0, 4))
    state = api.init8(p)
    new, state = update("adamw", p, p, state)
    assert new.shape == (0, 4)
    assert state.m.absmax.shape == (0,)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda p, g, s: (p, g[:2], s), "g has shape"),
        (lambda p, g, s: (p.astype(jnp.int32), g, s), "p has dtype int32"),
        (lambda p, g, s: (p, g, s[:1]), "1 moments"),
        (lambda p, g, s: (p, g, (s.m, s.m._replace(codes=g))), "codes of v"),
        (lambda p, g, s: (p, g, (s.m._replace(absmax=s.m.absmax[:1]), s.v)), "absmax"),
    ],
)
def test_bad_input_names_the_argument(change, words):
    with pytest.raises(KernelError, match=words):
        update("adamw", *change(*random_operands("adamw", (4, 256))))


def test_unknown_names():
    p, g, state = random_operands("adamw", (4, 256))
    with pytest.raises(KernelError, match="backend is 'cuda'"):
        update("adamw", p, g, state, backend="cuda")
    with pytest.raises(KernelError, match="rule is 'sgd'"):
        api.init8(p, "sgd")

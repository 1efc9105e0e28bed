"""What every backend of the 8-bit updates must do.

Subclass `UpdateSuite`, name the backend and its shapes. Results are compared with the
reference within its bound; codes may be neighbours where a moment lies on a midpoint.
"""

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.pallas_kernels.optimizer import api
from qjax.pallas_kernels.optimizer.reference import BOUND

RULES = {"adamw": api.adamw8, "lion": api.lion8}


def update(rule, p, g, state, count=3, rate=1e-2, **options) -> Any:
    """One step of a rule."""
    options |= {"count": count} if rule == "adamw" else {}
    return RULES[rule](p, g, state, learning_rate=rate, **options)


def random_operands(rule, shape, dtype=jnp.float32, seed=0) -> Any:
    """`(p, g, state)` with every code in the state and magnitudes of all sizes."""
    rng = np.random.default_rng(seed)
    p = jnp.asarray(rng.standard_normal(shape), dtype)
    g = jnp.asarray(rng.standard_normal(shape) * np.exp(rng.uniform(-9, 0)), dtype)
    state = api.init8(p, rule)

    def moment(zero, signed):
        codes = rng.integers(0, 256, shape, np.uint8)
        scale = np.exp(rng.uniform(-9, 0, zero.absmax.shape)).astype(np.float32)
        scale = scale if signed else scale**2
        return api.Moment8(jnp.asarray(codes), jnp.asarray(scale))

    return p, g, type(state)(*(moment(m, i == 0) for i, m in enumerate(state)))


def sizes(rule, p, g, state, count=3, rate=1e-2) -> np.ndarray:
    """What a rounding of each element of the new parameter is relative to.

    The terms of the moment may cancel: its error is relative to their magnitudes.
    """
    p, g = (np.abs(np.asarray(x, np.float64)) for x in (p, g))
    m = np.abs(np.asarray(api.moment(state.m, signed=True), np.float64))
    terms = 0.9 * m + 0.1 * g
    if rule == "lion":
        return p + rate
    v = np.asarray(api.moment(state.v, signed=False), np.float64)
    root = np.sqrt((0.999 * v + 0.001 * g**2) / (1 - 0.999**count)) + 1e-8
    return p + rate * terms / (1 - 0.9**count) / root


def assert_close(got, want, size, unit=BOUND) -> None:
    """Parameters and maxima within the bound, codes equal or rarely neighbours."""
    (p, state), (p_want, state_want) = got, want
    assert p.dtype == p_want.dtype
    gap = np.abs(np.float64(np.asarray(p, np.float32)) - np.asarray(p_want, np.float32))
    assert (gap <= unit * size).all(), np.max(gap / size)
    for m, m_want in zip(state, state_want, strict=True):
        np.testing.assert_allclose(m.absmax, m_want.absmax, rtol=BOUND)
        apart = np.abs(np.int32(np.asarray(m.codes)) - np.int32(m_want.codes))
        assert apart.max(initial=0) <= 1
        assert (apart > 0).sum() <= 1 + 1e-3 * apart.size


class UpdateSuite(abc.ABC):
    """The cases; `backend`, `interpret` and `shapes` are the subclass's."""

    backend: ClassVar[str]
    interpret: ClassVar[Any] = False
    shapes: ClassVar[tuple[tuple[int, ...], ...]]

    def update(self, rule, p, g, state, **options):
        if self.interpret:
            options["interpret"] = self.interpret
            return update(rule, p, g, state, backend=self.backend, **options)

        def step(p, g, state):
            return update(rule, p, g, state, backend=self.backend, **options)

        return jax.jit(step)(p, g, state)

    def check(self, rule, operands, unit=BOUND, **options):
        got = self.update(rule, *operands, **options)
        want = update(rule, *operands, backend="reference", **options)
        size = sizes(rule, *operands, count=options.get("count", 3))
        assert_close(got, want, size, unit)

    @pytest.mark.parametrize("rule", RULES)
    def test_every_shape(self, rule):
        for seed, shape in enumerate(self.shapes):
            self.check(rule, random_operands(rule, shape, seed=seed))

    @pytest.mark.parametrize("rule", RULES)
    def test_bfloat16(self, rule):
        operands = random_operands(rule, self.shapes[0], jnp.bfloat16)
        self.check(rule, operands, unit=2.0**-7)

    @pytest.mark.parametrize("rule", RULES)
    def test_from_zero(self, rule):
        p, g, _ = random_operands(rule, self.shapes[0])
        g = g.at[:].set(0.0) if g.ndim == 1 else g.at[0].set(0.0)
        self.check(rule, (p, g, api.init8(p, rule)), count=1)

    @pytest.mark.parametrize("rule", RULES)
    def test_scaled_gradients(self, rule):
        p, g, state = random_operands(rule, self.shapes[0])
        got = self.update(rule, p, g, state, gradient_scale=0.25)
        scaled = (p, g * 0.25, state)
        want = update(rule, *scaled, backend="reference")
        assert_close(got, want, sizes(rule, *scaled))

    def test_non_finite_gradients_stay_where_they_are(self):
        """Their parameters are NaN, their moments 0; the rest is as if they were 0."""
        p, g, state = random_operands("adamw", self.shapes[0])
        lanes = np.arange(g.size).reshape(g.shape)
        for i, value in ((3, np.nan), (5, np.inf), (7, 3e38)):
            g = jnp.where(lanes == i, jnp.float32(value), g)
        hit = np.isin(lanes, [3, 5, 7])
        state = api.AdamW8(
            *(
                m._replace(codes=jnp.where(hit, jnp.uint8(zero), m.codes))
                for m, zero in zip(state, (127, 0), strict=True)
            )
        )
        clean = jnp.where(hit, 0.0, g)
        got_p, got = self.update("adamw", p, g, state)
        want_p, want = update("adamw", p, clean, state, backend="reference")
        assert np.isnan(np.asarray(got_p)[np.isin(lanes, [3, 5])]).all()
        new = jnp.where(hit, want_p, got_p)
        assert_close((new, got), (want_p, want), sizes("adamw", p, clean, state))

    def test_tiny_moments_are_zeros(self):
        p, g, state = random_operands("adamw", self.shapes[0])
        state = api.init8(p)
        _, new = self.update("adamw", p, g * 0 + 1e-30, state)
        values = np.asarray(api.moment(new.v, signed=False))
        assert (values == 0).all()
        assert np.isfinite(np.asarray(api.moment(new.m, signed=True))).all()

    @settings(
        max_examples=3,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(
        data=st.data(), seed=st.integers(0, 2**31), rule=st.sampled_from(list(RULES))
    )
    def test_random(self, data, seed, rule):
        shape = data.draw(self.draw_shape())
        self.check(rule, random_operands(rule, shape, seed=seed))

    @abc.abstractmethod
    def draw_shape(self):
        """Shapes that the backend takes."""

"""Native attention of tokens to themselves, and its gradient, on every ISA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.pallas_kernels import native
from qjax.pallas_kernels.attention import cpu_self

pytestmark = pytest.mark.skipif(not native.status().loaded, reason=str(native.status()))

AVAILABLE = [isa for isa in native.ISAS if native.choose_isa(isa)] or ["none"]
native.choose_isa("")


@pytest.fixture(params=AVAILABLE, autouse=True)
def isa(request):
    assert native.choose_isa(request.param)
    yield request.param
    native.choose_isa("")


def exact(q, k, v, positions, segments, scale, window, dy):
    """Attention and its gradient in float64, by the equations, query by query."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    batch, time, heads, _ = q.shape
    y, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, t, h in np.ndindex(batch, time, heads):
        key = h // (heads // k.shape[1])
        distance = positions[b, t] - positions[b]
        seen = (positions[b] >= 0) & (distance >= 0) & (distance < window)
        seen &= segments[b] == segments[b, t]
        if not seen.any():
            continue
        s = scale * k[b, key, seen] @ q[b, t, h]
        p = np.exp(s - s.max())
        p /= p.sum()
        y[b, t, h] = p @ v[b, key, seen]
        d = v[b, key, seen] @ dy[b, t, h]
        ds = scale * p * (d - p @ d)
        dq[b, t, h] = ds @ k[b, key, seen]
        dk[b, key, seen] += np.outer(ds, q[b, t, h])
        dv[b, key, seen] += np.outer(p, dy[b, t, h])
    return y, dq, dk, dv


@pytest.mark.parametrize(
    ("time", "width", "heads", "kv_heads", "window"),
    [(1, 16, 1, 1, 9), (70, 32, 4, 2, 2**30), (150, 20, 2, 2, 33), (65, 80, 3, 1, 64)],
)
def test_equations(time, width, heads, kv_heads, window, rng):
    batch = 2

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    q, dy = draw(batch, time, heads, width), draw(batch, time, heads, width)
    k, v = draw(batch, kv_heads, time, width), draw(batch, kv_heads, time, width)
    cut = time // 3
    positions = np.tile(np.arange(time, dtype=np.int32), (batch, 1))
    segments = np.ones((batch, time), np.int32)
    positions[1, cut:], segments[1, cut:] = positions[1, : time - cut], 2
    if cut:
        positions[1, -cut // 2 :] = -1  # padding
    numbers = (positions, segments, 0.3, window)
    y, *wanted = exact(q, k, v, *numbers, dy)
    found = cpu_self.attention(q, k, v, *numbers)
    np.testing.assert_allclose(found, y, atol=3e-6)
    for got, want in zip(cpu_self.gradient(q, k, v, *numbers, dy), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_bad_number_stays_in_its_row(rng):
    q, k, v = (rng.standard_normal((2, 8, 8, 16)).astype(np.float32) for _ in range(3))
    q[1, 3, 2, 0] = np.nan
    positions = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    y = cpu_self.attention(q, k, v, positions, positions * 0, 1.0, None)
    bad = np.isnan(np.asarray(y)).any(-1)
    assert bad[1, 3, 2] and bad.sum() == 1


def test_the_handler_checks_sizes():
    """What reaches it without the wrapper is refused, not read out of bounds."""
    result = jax.ShapeDtypeStruct((1, 4, 2, 16), jnp.float32)
    call = jax.ffi.ffi_call("qjax_self_attention", result)
    q, k = jnp.zeros((1, 4, 2, 16)), jnp.zeros((1, 1, 4, 16))
    number = jnp.zeros((1, 4), jnp.int32)
    good = [q, k, k, number, number, jnp.int32(4), jnp.float32(1)]
    call(*good)
    floats = number.astype(jnp.float32)
    bad = [(1, k[:, :, :3]), (2, k[..., :8]), (3, number[:, :3]), (4, floats),
           (5, jnp.float32(4)), (0, q.astype(jnp.bfloat16))]  # fmt: skip
    for at, value in bad:
        with pytest.raises(Exception, match="native self-attention"):
            call(*good[:at], value, *good[at + 1 :])

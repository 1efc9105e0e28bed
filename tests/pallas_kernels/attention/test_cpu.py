"""The native CPU kernel, over codes on every instruction set, and over floats."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.pallas_kernels import native
from qjax.pallas_kernels.attention import api, cpu, reference

from .suite import AttentionSuite, exact

pytestmark = pytest.mark.skipif(not native.status().loaded, reason=str(native.status()))

AVAILABLE = [isa for isa in native.ISAS if native.choose_isa(isa)] or ["none"]
native.choose_isa("")


@pytest.fixture(params=AVAILABLE, autouse=True)
def isa(request):
    assert native.choose_isa(request.param)
    yield request.param
    native.choose_isa("")


class TestNative(AttentionSuite):
    """Heads of 16 lanes and more; poisoned results come from XLA's own allocator."""

    dtypes = ("float32", "bfloat16", "float16")

    def run(self, q, cache, queries, keys, **options):
        return api.decode_attention(
            q, cache, positions=keys, queries=queries, backend="native", **options
        )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cache_of_floats(dtype, softcap, rng):
    layers, batch, heads, length, width = 2, 2, 3, 70, 48

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    keys, values = (draw(layers, batch, heads, length, width) for _ in range(2))
    q = draw(batch, 2 * heads, 3, width)
    queries, slots = reference.positions_from_lengths(jnp.array([5, 70]), 3, length)
    options = {"scale": 0.2, "window": 40, "softcap": softcap}
    y = cpu.attention(q, (keys, values), queries, slots, layer=jnp.int32(1), **options)
    assert y.dtype == q.dtype
    ones = jnp.ones((batch, heads, 2, length))
    codes = jnp.concatenate([keys, values], -1)[1].astype(jnp.float32)

    class Floats(reference.KV):
        kind = "float"

    wanted = exact(q, Floats(codes, ones), queries, slots, rotate="none", **options)
    limit = 2e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, atol=limit)

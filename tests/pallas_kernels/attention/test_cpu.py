"""The native CPU kernel, over codes on every instruction set, and over floats."""

import jax
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


def test_the_handler_checks_sizes():
    """What reaches it without the wrapper is refused, not read out of bounds."""
    call = jax.ffi.ffi_call(
        "qjax_attention", jax.ShapeDtypeStruct((1, 2, 1, 16), jnp.float32)
    )
    keys, none = jnp.zeros((3, 1, 2, 8, 16)), jnp.zeros((0,))
    good = {
        "q": jnp.zeros((1, 2, 1, 16)),
        "keys": keys,
        "values": keys,
        "scale": none,
        "queries": jnp.zeros((1, 1), jnp.int32),
        "positions": jnp.zeros((1, 8), jnp.int32),
        "window": jnp.int32(9),
        "factor": jnp.float32(1),
        "layer": jnp.int32(0),
    }
    call(*good.values(), softcap=np.float32(0)).block_until_ready()
    codes = jnp.zeros((3, 1, 2, 8, 32), jnp.int8)
    for change, message in [
        ({"layer": jnp.int32(3)}, "layer 3 of 3"),
        ({"values": keys[:2]}, "values are not like keys"),
        ({"keys": codes}, "scale has another shape"),
        ({"keys": codes[..., :24]}, "do not fit heads of q"),
        ({"positions": jnp.zeros((1, 7), jnp.int32)}, "positions"),
        ({"keys": keys[0, 0]}, "rank"),
    ]:
        with pytest.raises(Exception, match=message):
            call(*(good | change).values(), softcap=np.float32(0)).block_until_ready()

"""The definition: against float64, and what rounding keys and values costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.pallas_kernels.attention import api, reference, specs
from qjax.pallas_kernels.attention.api import AttentionError
from qjax.pallas_kernels.attention.reference import KINDS, KV, ROTATE

from .suite import AttentionSuite, hadamard_matrix

HALF_STEP = {"int8": 0.5 / 127, "int4": 0.5 / 7, "float8_e4m3fn": 2.0**-4}
"""Greatest error per number over the absmax; fp8 rounds relative to the number."""


class TestReference(AttentionSuite):
    """The reference itself, called through the public function."""

    def run(self, q, cache, queries, keys, **options):
        return api.decode_attention(
            q, cache, positions=keys, queries=queries, **options
        )


@settings(deadline=None, max_examples=10)
@given(
    kind=st.sampled_from(KINDS),
    rotate=st.sampled_from(ROTATE),
    width=st.sampled_from([2, 6, 64, 80]),
    scale_dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 2**31),
)
def test_codes_are_within_half_a_step(kind, rotate, width, scale_dtype, seed):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, 3, 2, 5, width)) * 10.0 ** rng.integers(-8, 8)
    k[0, 0, 0] = 0.0
    k, v = jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)
    kv = reference.encode(k, v, kind, rotate=rotate, scale_dtype=scale_dtype)
    codes = reference.decode_codes(kv.codes, kind)
    turn = hadamard_matrix(width)
    for i, (x, code) in enumerate(zip((k, v), codes, strict=True)):
        turned = rotate != "none" and (i == 0 or rotate == "both")
        x = np.asarray(x, np.float64) @ (turn if turned else np.eye(width))
        scale = np.asarray(kv.scale[..., i, :, None], np.float64)
        most = np.abs(x).max(-1, keepdims=True)
        step = HALF_STEP[kind] + (2.0**-8 if scale_dtype == "bfloat16" else 0) + 1e-5
        assert np.all(np.abs(np.asarray(code) * scale - x) <= step * most)
    assert not np.any(np.asarray(codes[0])[0, 0, 0])


def test_rounding_moves_the_result_no_further_than_stated(rng):
    k, v = (jnp.asarray(rng.normal(size=(1, 1, 40, 32)), jnp.float32) for _ in "kv")
    q = jnp.asarray(rng.normal(size=(1, 2, 1, 32)), jnp.float32)
    queries, keys = reference.positions_from_lengths(jnp.array([40]), 1, 40)
    plain = jnp.einsum("bhtd,bosd->bhts", q, k) * 0.18
    exact = jnp.einsum("bhts,bosd->bhtd", jax.nn.softmax(plain), v)
    for kind in ("int8", "int4"):
        kv = reference.encode(k, v, kind)
        y = reference.attend(q, kv, queries, keys, scale=0.18)
        reach = (
            0.18 * jnp.max(kv.scale[:, :, 0]) / 2 * jnp.abs(q).sum(-1, keepdims=True)
        )
        limit = jnp.expm1(2 * reach) * jnp.abs(v).max() + jnp.max(kv.scale[:, :, 1]) / 2
        assert np.all(np.abs(y - exact) <= limit + 1e-6)


def test_rotation_changes_no_scores(rng):
    k, v = (jnp.asarray(rng.normal(size=(1, 1, 30, 64)), jnp.float32) for _ in "kv")
    q = jnp.asarray(rng.normal(size=(1, 3, 1, 64)), jnp.float32)
    queries, keys = reference.positions_from_lengths(jnp.array([30]), 1, 30)
    results = [
        reference.attend(
            q, reference.encode(k, v, "int8", rotate=r), queries, keys, rotate=r,
            scale=0.125,
        )
        for r in ROTATE
    ]  # fmt: skip
    for y in results[1:]:
        np.testing.assert_allclose(y, results[0], atol=0.03)
    np.testing.assert_allclose(
        reference.hadamard(q), np.asarray(q) @ hadamard_matrix(64), atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [(), (2,)])
def test_write_touches_its_slots_only(kind, layers, rng):
    cache = reference.empty(2, 3, 11, 8, kind, layers=layers)
    k, v = (jnp.asarray(rng.normal(size=(2, 3, 4, 8)), jnp.float32) for _ in "kv")
    layer = jnp.int32(1) if layers else None
    write = jax.jit(lambda c, i: api.write_kv(k, v, c, i, layer=layer))
    after = write(cache, jnp.int32(5))
    one = KV(*(x[1] for x in after)) if layers else after
    fresh = reference.encode(k, v, kind)
    np.testing.assert_array_equal(one.codes[:, :, 5:9], fresh.codes)
    np.testing.assert_array_equal(one.scale[..., 5:9], fresh.scale)
    rest = np.r_[0:5, 9:11]
    blank = reference.empty(2, 3, 11, 8, kind)
    np.testing.assert_array_equal(
        one.codes[:, :, rest].astype(jnp.float32),
        blank.codes[:, :, rest].astype(jnp.float32),
    )
    if layers:
        np.testing.assert_array_equal(after.scale[0], cache.scale[0])


def test_empty_cache_decodes_to_zeros():
    for kind in KINDS:
        cache = reference.empty(1, 1, 4, 8, kind)
        for codes in reference.decode_codes(cache.codes, kind):
            assert codes.shape == (1, 1, 4, 8) and not np.any(codes)


def test_nan_keys_are_not_hidden():
    k = jnp.full((1, 1, 1, 8), jnp.nan)
    kv = reference.encode(k, jnp.ones((1, 1, 1, 8)), "int8")
    assert np.isnan(kv.scale[0, 0, 0, 0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": jnp.zeros((2, 4, 1, 16))}, r"q has shape \[2, 4, 1, 16\], expected"),
        ({"q": jnp.zeros((2, 3, 1, 32))}, "q has heads 3, expected a multiple of 2"),
        ({"q": jnp.zeros((2, 4, 1, 32), jnp.int32)}, "q has dtype int32"),
        ({"layer": 0}, "codes have shape .* expected rank 5"),
        ({"rotate": "values"}, "rotate is 'values'"),
        ({"lengths": None}, "lengths is None"),
        ({"positions": jnp.zeros((2, 3), jnp.int32)}, "positions have shape"),
        ({"backend": "triton"}, "backend is 'triton'"),
        ({"backend": "gpu"}, "float32 queries"),
        ({"scale_of": (2, 2, 1, 20)}, "scale has shape"),
    ],
)
def test_bad_arguments_are_named(change, message):
    cache = reference.empty(2, 2, 20, 32, "int8")
    if shape := change.pop("scale_of", None):
        cache = KV(cache.codes, jnp.ones(shape))
    arguments = {"q": jnp.zeros((2, 4, 1, 32)), "lengths": jnp.array([3, 4])} | change
    if "positions" in arguments:
        arguments["queries"] = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(AttentionError, match=message):
        api.decode_attention(cache=cache, **arguments)


def test_writes_that_do_not_fit_are_named():
    cache = reference.empty(2, 2, 20, 32, "int4")
    k = jnp.zeros((2, 2, 3, 32))
    for key, value, message in (
        (k, jnp.zeros((2, 2, 4, 32)), "v has shape"),
        (jnp.zeros((2, 4, 3, 32)), k, "k has heads 4, expected 2"),
        (jnp.zeros((2, 2, 21, 32)), k, "k has tokens 21"),
    ):
        with pytest.raises(AttentionError, match=message):
            api.write_kv(key, value, cache, 0)


def test_obstacles_say_why():
    base = dict(batch=1, heads=8, kv_heads=2, time=1, length=4096, head_dim=128,
                kind="int8", dtype="bfloat16")  # fmt: skip

    def why(backend, **change):
        return specs.obstacle(backend, specs.Problem(**(base | change)))

    for backend in ("tpu", "gpu"):
        assert why(backend) is None
        assert "100 slots" in (why(backend, length=100) or "")
        assert "queries share a head" in (why(backend, time=100) or "")
        assert "float16" in (why(backend, dtype="float16") or "")
        assert "codes are int3" in (why(backend, kind="int3") or "")
    assert "heads of 256" in (why("gpu", head_dim=256) or "")
    assert why("tpu", head_dim=256) is None
    assert "128 lanes" in (why("tpu", head_dim=32) or "")

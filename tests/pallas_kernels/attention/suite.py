"""What every backend of attention over a quantized cache must do.

Subclass `AttentionSuite` and say how to run; results are compared with attention in
float64, written here with NumPy from the definition in `reference`.
"""

import abc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.pallas_kernels.attention import api, reference
from qjax.pallas_kernels.attention.reference import KINDS, KV, ROTATE

write = jax.jit(api.write_kv, static_argnames=("layer", "rotate"))
bound = jax.jit(
    reference.bound, static_argnames=("window", "softcap", "rotate", "compute")
)


def hadamard_matrix(n):
    """The blockwise orthonormal Hadamard matrix."""
    block = n & -n
    one = np.ones((1, 1))
    while len(one) < block:
        one = np.block([[one, one], [one, -one]])
    return np.kron(np.eye(n // block), one) / np.sqrt(block)


def exact(q, cache, queries, keys, *, scale=1.0, window=None, softcap=None, rotate):
    """Attention over one layer's cache in float64."""
    codes, scales = (np.asarray(x) for x in cache)
    if cache.kind == "int4":
        key = (codes & 15).astype(np.float64) - 8
        value = (codes >> 4).astype(np.float64) - 8
    else:
        key, value = np.split(codes.astype(np.float32).astype(np.float64), 2, axis=-1)
    key = key * scales[:, :, 0, :, None].astype(np.float64)
    value = value * scales[:, :, 1, :, None].astype(np.float64)
    batch, _, time, width = q.shape
    turn = hadamard_matrix(width)
    x = np.asarray(q.astype(jnp.float32), np.float64)
    x = x @ turn if rotate != "none" else x
    x = x.reshape(batch, codes.shape[1], -1, time, width)
    score = np.einsum("bhgtd,bhsd->bhgts", x, key) * scale
    score = score if softcap is None else np.tanh(score / softcap) * softcap
    p, k = np.asarray(queries)[:, :, None], np.asarray(keys)[:, None, :]
    seen = (k >= 0) & (k <= p) & (p - k < (2**30 if window is None else window))
    seen = np.broadcast_to(seen[:, None, None], score.shape)
    top = np.where(seen, score, -np.inf).max(-1, keepdims=True)
    weight = np.where(seen, np.exp(np.where(seen, score - top, 0)), 0)
    total = weight.sum(-1, keepdims=True)
    y = np.einsum("bhgts,bhsd->bhgtd", weight / np.where(total == 0, 1, total), value)
    y = y.reshape(q.shape)
    return y @ turn if rotate == "both" else y


def problem(kind, *, batch, kv_heads, groups, time, length, width, dtype, seed,
            rotate="none", layers=None):  # fmt: skip
    """Random queries and a filled cache (of one layer if `layers`: the last)."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * rng.choice([0.3, 3.0]), dtype)

    lead = () if layers is None else (layers,)
    cache = reference.empty(batch, kv_heads, length, width, kind, layers=lead)
    k = draw(batch, kv_heads, length, width)
    v = draw(batch, kv_heads, length, width)
    layer = None if layers is None else layers - 1
    cache = write(k, v, cache, 0, layer=layer, rotate=rotate)
    return draw(batch, kv_heads * groups, time, width), cache


class AttentionSuite(abc.ABC):
    """Cases; a subclass sets how to run and what fits."""

    compute = "float32"
    dtypes = ("float32", "bfloat16")
    widths = (16, 96)
    lengths = (1, 3, 100, 256)
    groups = (1, 2, 5)
    kinds = KINDS
    examples = 8

    @abc.abstractmethod
    def run(self, q, cache, queries, keys, **options):
        """Calls the backend."""

    def check(self, q, cache, queries, keys, layer=None, **options):
        """Compares one call with float64."""
        compute = self.compute if q.dtype == jnp.float32 else "bfloat16"
        y = self.run(q, cache, queries, keys, layer=layer, **options)
        assert y.dtype == q.dtype and y.shape == q.shape
        one = cache if layer is None else KV(*(x[layer] for x in cache))
        options = {"rotate": "none"} | options
        expected = exact(q, one, queries, keys, **options)
        limit = bound(q, one, queries, keys, compute=compute, **options)
        error = np.abs(np.asarray(y.astype(jnp.float32), np.float64) - expected)
        assert np.all(np.isfinite(error))
        assert np.all(error <= np.asarray(limit, np.float64) + 1e-30)
        return y

    def cases(self):
        """Strategies of a random call."""
        return {
            "kind": st.sampled_from(self.kinds),
            "dtype": st.sampled_from(self.dtypes),
            "width": st.sampled_from(self.widths),
            "length": st.sampled_from(self.lengths),
            "groups": st.sampled_from(self.groups),
            "time": st.integers(1, 3),
            "rotate": st.sampled_from(ROTATE),
            "window": st.sampled_from([None, 1, 40]),
            "softcap": st.sampled_from([None, 5.0]),
            "seed": st.integers(0, 2**31),
        }

    def test_within_bound(self):
        @settings(
            max_examples=self.examples,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(st.fixed_dictionaries(self.cases()))
        def check(case):
            window, softcap = case.pop("window"), case.pop("softcap")
            rng = np.random.default_rng(case["seed"])
            q, cache = problem(batch=2, kv_heads=2, **case)
            lengths = rng.integers(0, case["length"] + 1, 2)
            queries, keys = reference.positions_from_lengths(
                jnp.asarray(lengths, jnp.int32), case["time"], case["length"]
            )
            self.check(
                q, cache, queries, keys, scale=case["width"] ** -0.5,
                window=window, softcap=softcap, rotate=case["rotate"],
            )  # fmt: skip

        check()

    def one(self, kind="int8", time=1, layers=None):
        """One plain call."""
        return problem(
            kind, batch=2, kv_heads=2, groups=2, time=time, length=max(self.lengths),
            width=self.widths[0], dtype=self.dtypes[-1], seed=1, layers=layers,
        )  # fmt: skip

    def test_only_the_layer_asked_for_is_read(self):
        q, cache = self.one(layers=3)
        poisoned = cache.scale.at[:2].set(jnp.nan)
        queries, keys = reference.positions_from_lengths(
            jnp.array([50, 200]), 1, cache.length
        )
        cache = KV(cache.codes, poisoned)
        self.check(q, cache, queries, keys, layer=jnp.int32(2), scale=0.1)

    def test_padding_holes_and_blind_rows(self):
        q, cache = self.one(time=2)
        slots = np.arange(cache.length, dtype=np.int32)
        keys = np.stack([np.where(slots % 3 == 0, -1, slots // 2), slots * 0 - 1])
        queries = np.array([[20, -1], [7, 8]], np.int32)
        y = self.check(q, cache, jnp.asarray(queries), jnp.asarray(keys), window=12)
        assert not np.any(y[1]) and not np.any(y[0, :, 1])
        assert np.any(y[0, :, 0])

    def test_window_and_scale_may_be_traced(self):
        q, cache = self.one()
        queries, keys = reference.positions_from_lengths(
            jnp.array([150, 256]), 1, cache.length
        )

        @jax.jit
        def call(window, scale):
            return self.run(q, cache, queries, keys, window=window, scale=scale)

        got = call(jnp.int32(30), jnp.float32(0.25))
        same = self.run(q, cache, queries, keys, window=30, scale=0.25)
        np.testing.assert_array_equal(
            *(np.asarray(y.astype(jnp.float32)) for y in (got, same))
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_deterministic(self, kind):
        if kind not in self.kinds:
            pytest.skip("not of this backend")
        q, cache = self.one(kind)
        queries, keys = reference.positions_from_lengths(
            jnp.array([256, 3]), 1, cache.length
        )
        runs = [self.run(q, cache, queries, keys, scale=0.3) for _ in range(2)]
        np.testing.assert_array_equal(
            *(np.asarray(y.astype(jnp.float32)) for y in runs)
        )

"""Attention over a quantized cache: the XLA path, prefill, memory, choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import ops
from qjax.errors import SpecError, UnsupportedError
from qjax.ops import attention
from qjax.pallas_kernels import native
from qjax.pallas_kernels.attention import reference, specs
from tests.pallas_kernels.attention.suite import AttentionSuite, exact, problem

CASE = dict(
    batch=2, kv_heads=2, groups=2, length=40, width=16, dtype="float32", seed=3
)  # fmt: skip


class TestXla(AttentionSuite):
    """The loop over blocks, in blocks of 16 slots."""

    lengths = (1, 7, 50)
    examples = 6

    @pytest.fixture(autouse=True)
    def _small_blocks(self, monkeypatch):
        monkeypatch.setattr(attention, "BLOCK_BYTES", 1)

    def run(self, q, cache, queries, keys, **options):
        return attention.decode_attention(
            q, cache, queries, keys, backend="xla", **options
        )


@pytest.mark.parametrize("rotate", reference.ROTATE)
def test_prefill_sees_its_own_tokens_exactly(rotate, rng, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_BYTES", 1)
    monkeypatch.setattr(attention, "DECODE_TOKENS", 1)
    _, cache = problem("int8", time=1, rotate=rotate, **CASE)
    q = jnp.asarray(rng.normal(size=(2, 4, 20, 16)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 2, 20, 16)), jnp.float32) for _ in "kv")
    queries = jnp.broadcast_to(jnp.arange(12, 32, dtype=jnp.int32), (2, 20))
    keys = np.full((2, 40), -1, np.int32)
    keys[:, :32] = np.arange(32)
    written = attention.write_kv(k, v, cache, jnp.int32(12), rotate=rotate)
    options = dict(scale=0.3, window=15, softcap=9.0, rotate=rotate)
    y = jax.jit(
        lambda cache: attention.cached_attention(
            q, k, v, cache, queries, jnp.asarray(keys), jnp.int32(12), **options
        )
    )(written)
    # The same with the call's own part of the cache finer by a factor of 2**12.
    fine = np.asarray(written.scale, np.float64)
    codes = np.asarray(written.codes, np.float64)
    turned = [
        reference.hadamard(x)
        if rotate == "both" or (i == 0 and rotate == "keys")
        else x
        for i, x in enumerate((k, v))
    ]
    codes[:, :, 12:32] = np.concatenate(turned, axis=-1)
    fine[..., 12:32] = 1.0

    class Mixed:
        kind = "int8"

        def __iter__(self):
            return iter((codes.astype(np.float32), fine))

    expected = exact(q, Mixed(), queries, keys, **options)
    np.testing.assert_allclose(y, expected, atol=2e-4)


def test_short_calls_read_the_cache(rng):
    q, cache = problem("int4", time=2, **CASE)
    k = v = jnp.full((2, 2, 2, 16), jnp.nan)
    queries, keys = reference.positions_from_lengths(jnp.array([9, 30]), 2, 40)
    y = attention.cached_attention(q, k, v, cache, queries, keys, jnp.int32(7))
    np.testing.assert_allclose(
        y, exact(q, cache, queries, keys, rotate="none"), atol=1e-4
    )


@pytest.mark.parametrize("kind", reference.KINDS)
def test_the_cache_is_never_expanded(kind):
    cache = jax.eval_shape(lambda: reference.empty(2, 8, 8192, 128, kind, layers=(2,)))
    shapes = (
        jax.ShapeDtypeStruct((2, 32, 1, 128), jnp.float32),
        cache,
        jax.ShapeDtypeStruct((2, 1), jnp.int32),
        jax.ShapeDtypeStruct((2, 8192), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )

    def decode(q, cache, queries, keys, layer):
        return attention.decode_attention(
            q, cache, queries, keys, layer=layer, backend=backend
        )

    dense = 2 * 8 * 8192 * 128 * 2 * 4
    backend = "xla"
    compiled = jax.jit(decode).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.15 * dense
    backend = "reference"
    compiled = jax.jit(lambda *a: decode(*a)).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes > 0.4 * dense


@pytest.mark.parametrize("kind", reference.KINDS)
def test_writing_in_a_loop_is_in_place(kind):
    cache = reference.empty(1, 2, 4096, 64, kind, layers=(4,))

    def fill(cache):
        def step(i, cache):
            k = jnp.full((1, 2, 1, 64), 1.0) * i.astype(jnp.float32)
            return attention.write_kv(k, k, cache, i, layer=i % 4)

        return jax.lax.fori_loop(0, 100, step, cache)

    compiled = jax.jit(fill, donate_argnums=0).lower(cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * cache.codes.nbytes
    assert float(compiled(cache).scale[3, 0, 0, 0, 99]) == np.float32(
        99 / reference.TOP[kind]
    )


def test_choice_follows_the_platform():
    base = dict(
        batch=1, heads=8, kv_heads=2, time=1, length=4096, head_dim=128, kind="int8",
        dtype="bfloat16",
    )  # fmt: skip
    assert attention.choose("tpu", specs.Problem(**base)) == ("tpu", [])
    assert attention.choose("cuda", specs.Problem(**base)) == ("gpu", [])
    name, refused = attention.choose("cpu", specs.Problem(**base))
    assert name == ("native" if native.status().loaded else "xla")
    assert bool(refused) != native.status().loaded
    odd = specs.Problem(**base | {"head_dim": 20})
    assert attention.choose("cpu", odd)[0] == "xla"
    name, refused = attention.choose("tpu", specs.Problem(**base | {"length": 100}))
    assert name == "xla" and refused[0][0] == "tpu" and "100 slots" in refused[0][1]


def test_named_backends_run_or_raise():
    q, cache = problem("int8", time=1, **CASE)
    queries, keys = reference.positions_from_lengths(jnp.array([9, 30]), 1, 40)
    with pytest.raises(SpecError, match="backend 'fast'"):
        attention.decode_attention(q, cache, queries, keys, backend="fast")
    with pytest.raises(UnsupportedError, match="backend 'tpu' cannot do"):
        attention.decode_attention(q, cache, queries, keys, backend="tpu")


def test_sharded_over_heads(rng):
    mesh = jax.make_mesh((2,), ("heads",))
    spec = jax.sharding.PartitionSpec
    q, cache = problem("int8", time=1, **CASE)
    queries, keys = reference.positions_from_lengths(jnp.array([9, 30]), 1, 40)
    split = jax.sharding.NamedSharding(mesh, spec(None, "heads"))
    expected = attention.decode_attention(q, cache, queries, keys)
    placed = jax.device_put((q, cache), split)
    y = jax.jit(attention.decode_attention)(*placed, queries, keys)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    mapped = jax.shard_map(
        attention.decode_attention, mesh=mesh,
        in_specs=(spec(None, "heads"), spec(None, "heads"), spec(), spec()),
        out_specs=spec(None, "heads"),
    )  # fmt: skip
    np.testing.assert_allclose(
        jax.jit(mapped)(*placed, queries, keys), expected, atol=1e-6
    )


def test_kernels_are_lowered_for_the_target():
    q = jax.ShapeDtypeStruct((2, 8, 1, 128), jnp.bfloat16)
    cache = jax.eval_shape(lambda: reference.empty(2, 2, 1024, 128, "int8"))
    shapes = (
        q,
        cache,
        jax.ShapeDtypeStruct((2, 1), jnp.int32),
        jax.ShapeDtypeStruct((2, 1024), jnp.int32),
    )
    with ops.target("TPU v6 lite"):
        step = jax.jit(lambda *a: attention.decode_attention(*a))
        lowered = step.trace(*shapes).lower(lowering_platforms=("tpu",))
    assert "decode_attention_int8" in lowered.as_text()

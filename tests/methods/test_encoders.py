"""The kernels that `quantize` encodes with give the bytes of XLA's encoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.formats import FP8, MXFP4, NF4, NVFP4, Cast, Int
from qjax.methods import RTN, encoders, explain, quantize
from qjax.ops import target
from qjax.pallas_kernels.quantize import api

FORMATS = [
    Int(4, 128),
    Int(3, 64, scale_dtype="bfloat16"),
    Int(4, "tensor"),
    Int(8, "channel"),
    NF4(64),
    NF4(64, double=True),
    FP8("e4m3", "block"),
    MXFP4(),
    NVFP4(),
]


@pytest.fixture
def interpreted(monkeypatch):
    """A function that makes a kernel's interpreter the encoder, and notes its calls."""

    def use(name):
        calls = []
        interpret = name == "tpu" or plgpu.InterpretGPUParams()  # pyright: ignore
        encode = functools.partial(api.encode, interpret=interpret)

        def noted(*args, backend, **options):
            calls.append(backend)
            return encode(*args, backend=backend, **options)

        monkeypatch.setattr(encoders.api, "encode", noted)
        monkeypatch.setitem(encoders.PREFERENCE, "default", (name, "xla"))
        return calls

    return use


def weight(shape=(256, 130), dtype=jnp.float32, seed=0):
    w = np.random.default_rng(seed).standard_normal(shape)
    w[..., 1], w[..., 2] = 0.0, np.round(w[..., 2] * 2) / 2
    return jnp.asarray(w, dtype)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def interpreters():
    return ["tpu", *(["gpu"] if hasattr(plgpu, "InterpretGPUParams") else [])]


@pytest.mark.parametrize("name", interpreters())
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_quantize_by_kernels(fmt, name, interpreted, monkeypatch):
    monkeypatch.setattr("qjax.pallas_kernels.device.count", lambda: 1)
    w = weight(dtype=jnp.bfloat16 if fmt == Int(4, 128) else jnp.float32)
    want = quantize(w, fmt)
    calls = interpreted(name)
    with target(f"interpreted {name}"):  # programs already traced are for this CPU
        got = quantize(w, fmt)
    assert name in calls
    assert_same(got, want)


def test_bfloat16_is_its_float32():
    w = weight(dtype=jnp.bfloat16)
    for fmt in (NVFP4(), Int(4, 32, symmetric=False), Cast("float16")):
        run = jax.jit(lambda w, fmt=fmt: RTN()(w, fmt))
        assert_same(run(w), run(w.astype(jnp.float32)))


def test_vmap(interpreted):
    w = weight((3, 256, 40))
    want = quantize(w, Int(4, 128))
    calls = interpreted("tpu")
    got = jax.vmap(lambda w: RTN()(w, Int(4, 128)))(w)
    assert "tpu" in calls
    assert_same(got, want)


def test_several_devices(interpreted):
    """Split by `jit`: XLA. Inside `shard_map`: the kernel, on the shard."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    w, fmt = weight((256, 128)), Int(4, 128)
    want = quantize(w, fmt)
    columns = P(None, "model")
    placed = jax.device_put(w, NamedSharding(mesh, columns))

    def shards(**options):
        def codes(w):
            return RTN()(w, fmt).codes

        options |= {"mesh": mesh, "in_specs": columns, "out_specs": columns}
        return jax.jit(jax.shard_map(codes, **options))

    assert_same(shards()(placed), want.codes)
    calls = interpreted("tpu")
    assert_same(jax.jit(lambda w: RTN()(w, fmt))(placed), want)
    assert "tpu" not in calls
    # The interpreter does not follow what varies over axes.
    assert_same(shards(check_vma=False)(placed), want.codes)
    assert "tpu" in calls


def test_scales_keep_their_gradients(interpreted):
    def total(w):
        return jnp.sum(RTN()(w, Int(4, 128)).scale)

    w = weight((128, 40))
    want = jax.grad(total)(w)
    calls = interpreted("tpu")
    assert_same(jax.grad(total)(w), want)
    assert "tpu" in calls


def test_explains():
    shape = (4096, 1024)
    assert explain(shape, Int(4, 128)).startswith("xla: one fused loop (int4-g128, cpu")
    with target("TPU v6 lite"):
        assert explain(shape, Int(4, 128)).startswith("tpu: ")
        assert "not tpu: groups of 24" in explain((4800, 64), Int(4, 24))
        assert "float16" in explain(shape, Int(4, 128), "float16")
    with target("NVIDIA H200"):
        assert explain(shape, NVFP4()).startswith("gpu: ")
        assert "not gpu: 64 columns" in explain((4096, 64), Int(4, 128))
    assert "packing" in explain(shape, Int(4, 128, symmetric=False))

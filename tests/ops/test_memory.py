"""No hidden dense weight: what compilers reserve for a product and its gradient.

A 4096 x 14336 weight in bfloat16 is 117 MB; a tenth of that is the limit for everything
that is neither argument nor result. TPU programs are compiled by libtpu without a TPU.
"""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from qjax.formats import FP8, MXFP4, NF4, NVFP4, Cast, Int
from qjax.methods import RTN, quantize
from qjax.methods.array import _quantize
from qjax.ops import matmul, target

ROWS, COLS = 4096, 14336
LIMIT = 0.10 * 2 * ROWS * COLS


def device_sharding(platform, monkeypatch):
    """None for this CPU; a sharding on one device of a TPU that need not exist."""
    if platform == "cpu":
        return None
    topology = device_topology(platform, monkeypatch)
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def device_topology(platform, monkeypatch):
    """Four TPUs that need not exist."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("libtpu is not installed; pip install 'qjax-llm[test]' brings it")
    from jax.experimental import topologies

    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{platform}:2x2")


def temporaries(function, shapes, fmt, sharding, kind="cpu"):
    """Bytes of temporaries of `function(*arrays, weight)` on a kind of device."""

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    dense = jax.ShapeDtypeStruct((ROWS, COLS), jnp.float32)
    weight = jax.eval_shape(lambda w: quantize(w, fmt), dense)
    weight = jax.tree.map(place, weight)
    arrays = [place(jax.ShapeDtypeStruct(*shape)) for shape in shapes]
    with target(kind):
        compiled = jax.jit(function).lower(*arrays, weight).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def gradient(x, dy, w):
    return jax.vjp(lambda x: matmul(x, w), x)[1](dy)[0]


@pytest.mark.parametrize("rows", [1, 16, 256])
@pytest.mark.parametrize("platform", ["cpu", "v5e", "v6e"])
def test_int4(platform, rows, monkeypatch):
    sharding = device_sharding(platform, monkeypatch)
    fmt = Int(4, 128)
    # On TPUs the path without kernels too, which programs on several devices take.
    kinds = {"cpu": ("cpu",), "v5e": ("cpu", "TPU v5 lite"), "v6e": ("TPU v6 lite",)}
    for kind in kinds[platform]:
        for dtype in ("float32", "bfloat16") if platform == "cpu" else ("bfloat16",):
            x, dy = ((rows, ROWS), dtype), ((rows, COLS), dtype)
            assert temporaries(matmul, [x], fmt, sharding, kind) < LIMIT
            assert temporaries(gradient, [x, dy], fmt, sharding, kind) < LIMIT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fmt", [Int(4, 128), Int(8, "channel"), NF4(64), NVFP4()], ids=lambda f: f.name
)
def test_quantizing_on_a_tpu(fmt, dtype, monkeypatch):
    """The kernel encodes; beside it there are absolute maxima and scales."""
    place = device_sharding("v6e", monkeypatch)
    w = jax.ShapeDtypeStruct((ROWS, COLS), dtype, sharding=place)
    with target("TPU v6 lite"):
        compiled = _quantize.lower(w, fmt, RTN(), "none", "v6e").compile()
    assert "encode_weight" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < LIMIT


@pytest.mark.parametrize("platform", ["cpu", "v5e"])
def test_the_measure_sees_a_dense_weight(platform, monkeypatch):
    sharding = device_sharding(platform, monkeypatch)

    def naive(x, w):
        return x @ w.dequantize(x.dtype)

    x = ((16, ROWS), "bfloat16")
    assert temporaries(naive, [x], Int(4, 128), sharding) > 5 * LIMIT


@pytest.mark.parametrize(
    "fmt",
    [
        Int(8, "channel"),
        Int(3, 64, symmetric=False, scale_dtype="bfloat16"),
        NF4(64, double=True),
        FP8(),
        MXFP4(),
        NVFP4(),
        Cast(),
    ],
    ids=lambda f: f.name,
)
def test_other_formats(fmt):
    for rows in (1, 16):
        x, dy = ((rows, ROWS), "float32"), ((rows, COLS), "float32")
        assert temporaries(matmul, [x], fmt, None) < LIMIT
        assert temporaries(gradient, [x, dy], fmt, None) < LIMIT

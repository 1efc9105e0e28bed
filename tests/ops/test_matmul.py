"""`matmul` agrees with `x @ dequantize(w)` for every format, wrapper and transform."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import SpecError, UnsupportedError
from qjax.formats import Int
from qjax.methods import quantize
from qjax.ops import explain, matmul
from qjax.wrappers import Transposed

from .conftest import FORMATS, MATRIX, WRAPPERS, random, weight, wrap


@pytest.fixture(autouse=True)
def _exact():
    """Products keep float32 activations, but where a test is about the default."""
    with jax.default_matmul_precision("float32"):
        yield


def close(got, want, tolerance=2e-5):
    scale = max(float(jnp.max(jnp.abs(want.astype(jnp.float32)))), 1e-6)
    np.testing.assert_allclose(
        np.asarray(got, np.float32),
        np.asarray(want, np.float32),
        atol=tolerance * scale,
    )


def reference(x, w):
    return matmul(x, w, backend="reference")


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, small_blocks):
    q = weight(name)
    one, few, back = random((1, 96), 2), random((5, 96), 3), random((3, 40), 4)

    @jax.jit
    def run(q):
        def product(multiply):
            return (
                multiply(one, q),
                multiply(few, q),
                multiply(back, Transposed(q)),
            )

        return product(matmul), product(reference)

    for got, want in zip(*run(q), strict=True):
        assert got.dtype == jnp.float32
        close(got, want)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("rows", [1, 6])
def test_wrappers(name, rows, small_blocks):
    w = wrap(weight("int4-g32"))[name]
    x = random((rows, w.shape[0]), 2)
    close(jax.jit(matmul)(x, w), reference(x, w))


@pytest.mark.parametrize("matrix", [(1, 1), (7, 3), (17, 5), (130, 9), (256, 129)])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_odd_shapes(matrix, bits):
    for group in ("channel", min(16, matrix[0])):
        q = quantize(random(matrix, 1), Int(bits, group, symmetric=False))
        for rows in (1, 9):
            x = random((rows, matrix[0]), 2)
            close(matmul(x, q), reference(x, q))


def test_explain_says_why_no_kernel_reads_learned_tables():
    columns, vectors = weight("kmeans4"), weight("additive2x8")
    assert "xla: " in (text := explain((8, 96), columns))
    assert "native: each column has a table of its own" in text
    assert "xla: " in (text := explain((1, 96), vectors))
    assert "native: its codes index vectors" in text


def test_outliers_in_several_turns(monkeypatch):
    import sys

    module = sys.modules["qjax.ops.matmul"]
    monkeypatch.setattr(module, "OUTLIER_BLOCK", 7 * 4)
    w = wrap(weight("int4-g32"))["outliers"]
    x = random((4, 96), 2)
    close(matmul(x, w), reference(x, w))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 6])
def test_half_precision(dtype, rows):
    q = weight("int4-g32")
    x = random((rows, 96), 2, dtype)
    y = matmul(x, q)
    assert y.dtype == dtype
    exact = reference(x.astype(jnp.float32), q)
    close(y, exact, 2.0**-8 if dtype == "bfloat16" else 2.0**-10)


def test_accelerator_path_is_close_in_half_precision(small_blocks):
    from qjax.ops import blocked

    q = weight("nf4")
    x = random((2, 96), 2, "bfloat16")
    y = blocked.contract(x, q, False, cpu=False)
    assert y.shape == (2, 40)
    assert y.dtype == jnp.bfloat16
    close(y, reference(x.astype(jnp.float32), q), 2e-2)


def test_batch_shapes():
    q = weight("int4-g32")
    assert matmul(random((96,), 1), q).shape == (40,)
    assert matmul(random((2, 3, 96), 1), q).shape == (2, 3, 40)
    assert matmul(jnp.zeros((0, 96)), q).shape == (0, 40)
    assert matmul(jnp.zeros((2, 0, 96)), q).shape == (2, 0, 40)
    empty = quantize(jnp.zeros((0, 4)), Int(4, "channel"))
    np.testing.assert_array_equal(matmul(jnp.zeros((2, 0)), empty), np.zeros((2, 4)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_weights(dtype):
    w = random(MATRIX, 1, dtype)
    for rows in (1, 6):
        x = random((rows, 96), 2)
        y = matmul(x, w)
        assert y.dtype == jnp.float32
        close(y, x @ w.astype(jnp.float32))
        gradient = jax.grad(lambda w, x=x: matmul(x, w).sum())(w)
        assert gradient.dtype == dtype
        close(gradient, jnp.broadcast_to(x.sum(0)[:, None], w.shape), 1e-2)


def stacked(name, count=3):
    return quantize(random((count, *MATRIX), 7), FORMATS[name])


@pytest.mark.parametrize("name", ["int4-g32", "int3-g32", "nf4-double", "fp8-channel"])
@pytest.mark.parametrize("rows", [1, 6])
def test_vmap_and_scan(name, rows):
    q = stacked(name)
    x = random((3, rows, 96), 2)
    want = jnp.einsum("emk,ekn->emn", x, q.dequantize(jnp.float32))
    close(jax.jit(jax.vmap(matmul))(x, q), want)
    shared = jax.vmap(matmul, (None, 0))(x[0], q)
    close(shared[0], want[0])

    def step(carry, layer):
        return carry, matmul(*layer)

    close(jax.jit(lambda x, q: jax.lax.scan(step, 0, (x, q))[1])(x, q), want)


AXIS_TYPES = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)


@pytest.mark.parametrize("kind", AXIS_TYPES, ids=str)
@pytest.mark.parametrize("spec", [(None, "d"), ("d", None)])
def test_sharded_weights(spec, kind):
    mesh = jax.make_mesh((8,), ("d",), (kind,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    q = quantize(random((256, 64), 1), Int(4, 32))
    for rows in (1, 6):
        x = random((rows, 256), 2)
        spread = jax.device_put(q, place)
        close(jax.jit(matmul)(x, spread), reference(x, q))


def test_shard_map_on_local_shards():
    mesh = jax.make_mesh((8,), ("d",), (AXIS_TYPES[0],))
    spec = jax.sharding.PartitionSpec(None, "d")
    q = quantize(random((256, 64), 1), Int(4, 32))

    def local(x, codes, scale):
        import dataclasses

        part = dataclasses.replace(q, codes=codes, scale=scale, matrix=(256, 8))
        return matmul(x, part)

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(jax.P(), spec, spec), out_specs=spec
    )
    for rows in (2, 6):
        x = random((rows, 256), 2)
        close(jax.jit(run)(x, q.codes, q.scale), reference(x, q))
        got = jax.jit(jax.grad(lambda x: (run(x, q.codes, q.scale) ** 2).sum()))(x)
        close(got, jax.grad(lambda x: (reference(x, q) ** 2).sum())(x))


@pytest.mark.parametrize("name", [n for n in FORMATS if n.startswith("int")])
def test_default_activations_have_16_bits(name):
    """Off by at most `absmax / 65024` per activation, and float32 sums."""
    q = weight(name)
    w = jnp.abs(q.dequantize())
    for rows in (1, 6, 40):
        x = random((rows, 96), 2)
        with jax.default_matmul_precision(None):
            error = jnp.abs(matmul(x, q) - reference(x, q))
        step = jnp.max(jnp.abs(x), 1, keepdims=True) / 65024
        assert (error <= (step + 1e-6 * jnp.abs(x)) @ w + 1e-5).all()


def test_explain_names_the_backend_and_the_reason():
    q = weight("int4-g32")
    with jax.default_matmul_precision(None):
        assert explain((1, 96), q).startswith("native: C++ kernel")
    with jax.default_matmul_precision("float32"):
        text = explain((1, 96), q)
        assert text.startswith("cpu: decodes rows") and "16 bits" in text
        text = explain((2, 32, 96), q)
        assert "do not divide in=96" in explain((1, 96), weight("int4-g28"))
    assert text.startswith("xla: ")
    assert "not cpu: it is for 1 to 4 rows of x, not 64" in text
    assert "grouped by 'out'" in explain((1, 96), weight("int4-out"))
    assert "inside WithOutliers" in explain((1, 96), wrap(q)["outliers"])
    assert "inside Transposed" in explain((1, 40), Transposed(q))
    assert explain((1, 96), random(MATRIX, 1)).startswith("dense: ")


def test_debug_log_says_what_ran(caplog):
    level = caplog.at_level(logging.DEBUG, "qjax.ops")
    with level, jax.default_matmul_precision(None):
        matmul(random((1, 96), 2), weight("int5-g32"))
    assert any("int5-g32" in m and ": native on cpu" in m for m in caplog.messages)


def test_backends_can_be_named():
    q = weight("int4-g32")
    x = random((1, 96), 2)
    for name in ("cpu", "xla", "reference"):
        close(matmul(x, q, backend=name), reference(x, q))
    with pytest.raises(UnsupportedError, match=r"backend .cpu. cannot mul.*1 to 4"):
        matmul(random((64, 96), 2), q, backend="cpu")
    with pytest.raises(
        SpecError, match="backend is 'mkl', expected None or one of 'tpu'"
    ):
        matmul(x, q, backend="mkl")


def test_errors_name_both_shapes():
    q = weight("int4-g32")
    with pytest.raises(SpecError, match=r"x has shape \[2, 95\] and w \[96, 40\]"):
        matmul(random((2, 95), 1), q)
    with pytest.raises(SpecError, match=r"\[3, 96, 40\].*use jax.vmap"):
        matmul(random((2, 96), 1), stacked("int4-g32"))
    with pytest.raises(SpecError, match="x has dtype int32, expected a float dtype"):
        matmul(jnp.ones((2, 96), jnp.int32), q)
    with pytest.raises(SpecError, match=r"x has shape \[\] and w \[96, 40\]"):
        matmul(jnp.float32(1), q)


def test_float8_values_are_exact():
    from qjax.ops.blocks import float8_values

    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        codes = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), dtype)
        want = np.asarray(codes).astype(np.float32)
        np.testing.assert_array_equal(jax.jit(float8_values)(codes), want)


def test_unknown_wrappers_are_refused():
    import dataclasses

    from qjax.wrappers import Wrapper

    @dataclasses.dataclass(frozen=True, repr=False)
    class Strange(Wrapper):
        def compose(self, w):
            return w

    with pytest.raises(UnsupportedError, match="no rule for Strange"):
        matmul(random((1, 96), 1), Strange(weight("int4-g32")))

"""Weights in strips of columns: the way back, equal products, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.pallas_kernels import native
from qjax.pallas_kernels.matmul import cpu, cpu_layout
from qjax.pallas_kernels.matmul_a8 import cpu as cpu_a8
from qjax.pallas_kernels.weights import KernelError, WeightSpec

from .cases import random_weight

pytestmark = pytest.mark.skipif(not native.status().loaded, reason=str(native.status()))

AVAILABLE = [isa for isa in native.ISAS if native.choose_isa(isa)] or ["none"]
native.choose_isa("")

FORMATS = [("int", bits) for bits in range(1, 9)]
FORMATS += [("table", 3), ("table", 4), ("e2m1", 4), ("e4m3", 8), ("e5m2", 8)]
SHAPES = [(256, 130, 64), (100, 67, 100), (320, 33, 64), (192, 64, 96), (40, 8, 40)]


@pytest.fixture(params=AVAILABLE)
def isa(request):
    assert native.choose_isa(request.param)
    yield request.param
    native.choose_isa("")


def pair(kind, bits, shape, rng, **options):
    """A canonical weight and the same in strips, with their specs."""
    k, n, group = shape
    offset = 2.0 ** (bits - 1) if kind == "int" else 0.0
    spec = WeightSpec(k, n, kind, bits, group, offset)
    zero = "float32" if kind == "int" else None
    w, _ = random_weight(rng, spec, **({"zero": zero} | options))
    made = cpu_layout.prepack(w, spec)
    assert made is not None and made[1].layout == cpu_layout.TAG
    return (w, spec), made


def bits_of(array):
    return np.asarray(array).view(np.uint8)


@pytest.mark.parametrize(("kind", "bits"), FORMATS)
def test_the_way_back_is_exact(kind, bits, rng):
    for shape in SHAPES:
        (w, _), made = pair(kind, bits, shape, rng)
        for back, array in zip(cpu_layout.unpack(*made), w, strict=True):
            assert (back is None) == (array is None)
            if array is not None:
                assert back.dtype == array.dtype and back.shape == array.shape
                np.testing.assert_array_equal(bits_of(back), bits_of(array))


@pytest.mark.parametrize(("kind", "bits"), FORMATS)
def test_products_are_those_of_the_layout_at_rest(isa, kind, bits, rng):
    for shape, scale in zip(
        SHAPES[:3], ["float32", "float16", "bfloat16"], strict=True
    ):
        (w, spec), made = pair(kind, bits, shape, rng, scale=scale)
        for m in (1, 3, 20):
            x = jnp.asarray(rng.standard_normal((m, shape[0])).astype(np.float32))
            # Blocks are cut elsewhere for few rows, and x is rounded per block.
            top = float(jnp.abs(cpu.matmul(x, w, spec)).max())
            np.testing.assert_allclose(
                cpu.matmul(x, *made), cpu.matmul(x, w, spec), atol=2e-4 * top
            )
            if kind == "int":
                np.testing.assert_allclose(
                    cpu_a8.matmul(x, *made),
                    cpu_a8.matmul(x, w, spec),
                    atol=2e-6 * float(jnp.abs(cpu_a8.matmul(x, w, spec)).max()),
                )


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_sums_of_integers_are_exact(isa, bits, rounded, rng):
    """A result of one block is one sum times a scale: the same bits everywhere."""
    spec = WeightSpec(248, 70, "int", bits, 248)
    w, _ = random_weight(rng, spec)
    made = cpu_layout.prepack(w, spec)
    matmul = cpu_a8.matmul if rounded else cpu.matmul
    for m in (1, 2, 9, 15):
        x = jnp.asarray(rng.standard_normal((m, spec.k)).astype(np.float32))
        found = [matmul(x, *made)] + [matmul(x, w, spec)] * (m > 8)
        native.choose_isa("plain")
        wanted = matmul(x, *made)
        native.choose_isa(isa)
        for y in found:
            np.testing.assert_array_equal(y, wanted)


def test_transpose(rng):
    (w, spec), made = pair("table", 4, SHAPES[0], rng)
    x = jnp.asarray(rng.standard_normal((3, spec.n)).astype(np.float32))
    y = cpu.matmul(x, *made, transpose=True)
    np.testing.assert_array_equal(y, cpu.matmul(x, w, spec, transpose=True))
    _, made = pair("int", 4, SHAPES[0], rng)
    assert "transpose of integers" in str(
        cpu.obstacle(made[1], 3, "float32", transpose=True)
    )
    with pytest.raises(KernelError, match="transpose of integers"):
        cpu.matmul(x, *made, transpose=True)


def test_layers_of_a_stack(rng):
    pairs = [pair("int", 4, SHAPES[0], rng)[1] for _ in range(3)]
    spec = pairs[0][1]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(w for w, _ in pairs))
    again = cpu_layout.prepack(
        cpu_layout.unpack(stack, spec), WeightSpec(*SHAPES[0][:2], "int", 4, 64, 8.0)
    )
    assert again is not None
    np.testing.assert_array_equal(again[0].codes, stack.codes)
    x = jnp.asarray(rng.standard_normal((2, spec.k)).astype(np.float32))
    for i, (w, _) in enumerate(pairs):
        y = jax.jit(lambda x, i: cpu.matmul(x, stack, spec, layer=i))(x, i)
        np.testing.assert_array_equal(y, cpu.matmul(x, w, spec))


def test_what_is_not_stored_so():
    refused = WeightSpec(64, 64, "int", 4, 20)
    assert "groups of 20 rows" in str(cpu_layout.obstacle(refused))
    assert "empty" in str(cpu_layout.obstacle(WeightSpec(64, 0)))
    assert cpu_layout.obstacle(WeightSpec(64, 64, "table", 4, 20)) is None


@pytest.mark.parametrize("argument", ["codes", "scale", "zero", "x"])
def test_bad_input(argument, rng):
    _, (w, spec) = pair("int", 4, SHAPES[0], rng)
    x = jnp.zeros((2, spec.k))
    if argument == "x":
        x = x[:, 1:]
    else:
        w = w._replace(**{argument: getattr(w, argument)[1:]})
    with pytest.raises(KernelError, match=f"{argument} has shape .* expected"):
        cpu.matmul(x, w, spec)
    with pytest.raises(KernelError, match="layout is 'canonical'"):
        cpu_layout.unpack(w, WeightSpec(64, 64))

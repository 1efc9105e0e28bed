"""Products and gradients on meshes with explicit axes, with and without kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.formats import FP8, NF4, NVFP4, Cast, Int
from qjax.ops import grouped_matmul, matmul, prepack, target
from qjax.ops.prepack import Prepacked
from qjax.wrappers import layer_of

from .conftest import random
from .test_memory import device_topology

ROWS, COLS = 256, 128
SPLITS = {"in": P("model", None), "out": P(None, "model"), "whole": P(None, None)}


@pytest.fixture
def explicit():
    axes = (AxisType.Explicit,) * 2
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"), axis_types=axes)) as m:
        yield m


def place(tree, *split):
    """Leaves split along their last two axes, where the mesh divides them."""

    def put(leaf):
        pairs = zip(leaf.shape[-2:], split[-2:], strict=False)
        kept = [axis if axis and size % 4 == 0 else None for size, axis in pairs]
        lead = [None] * (leaf.ndim - len(kept))
        return jax.device_put(
            leaf, NamedSharding(jax.sharding.get_mesh(), P(*lead, *kept))
        )

    return jax.tree.map(put, tree)


def with_gradients(function, x, w):
    """The result and the gradients of half its square."""
    y, pull = jax.vjp(function, x, w)
    return y, pull(y)


def compare(got, expected):
    """Leaves that agree; gradients of narrow leaves up to their own rounding."""
    trees = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    for left, right in trees:
        if right.dtype == jax.dtypes.float0:
            assert left.dtype == right.dtype and left.shape == right.shape
            continue
        step = max(float(jnp.finfo(right.dtype).eps), 2e-5)
        left, right = (np.asarray(v, np.float32) for v in (left, right))
        np.testing.assert_allclose(
            left, right, rtol=step, atol=step * np.abs(right).max()
        )


@pytest.mark.parametrize("backend", ["xla", None])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "fmt",
    [
        Int(4, 32),
        Int(3, "channel", symmetric=False),
        Int(4, 16, axis="out"),
        NF4(64, double=True),
        NVFP4(),
        FP8("e4m3", "block"),
        Cast(),
    ],
    ids=lambda f: f.name,
)
def test_explicit_axes(explicit, small_blocks, fmt, split, backend):
    q = qjax.quantize(random((ROWS, COLS), 1), fmt)
    x = random((8, ROWS), 2)

    def run(x, q):
        return with_gradients(lambda x, q: matmul(x, q, backend=backend), x, q)

    expected = jax.jit(run)(x, q)
    placed = place(x, "data", None), place(q, *SPLITS[split])
    y, (dx, dq) = jax.jit(run)(*placed)
    compare((y, (dx, dq)), expected)
    assert jax.typeof(dx).sharding == jax.typeof(placed[0]).sharding
    if split == "out" and backend == "xla" and fmt.name == "int4-g32":
        assert y.sharding.spec == P("data", "model")


@pytest.mark.parametrize("split", SPLITS)
def test_layers_of_a_stack(explicit, small_blocks, split):
    stack = qjax.quantize(random((2, ROWS, COLS), 1), Int(4, 16, axis="out"))
    x = random((8, ROWS), 2)

    def run(x, q):
        return with_gradients(lambda x, q: matmul(x, layer_of(q, jnp.int32(1))), x, q)

    placed = place(x, "data", None), place(stack, *SPLITS[split])
    compare(jax.jit(run)(*placed), jax.jit(run)(x, stack))


@pytest.mark.parametrize("fmt", [NF4(32), Int(4, 32)], ids=lambda f: f.name)
def test_prepacked(explicit, fmt):
    """Gathered where a device cannot cut it; also layers of stacks and under `vmap`."""
    stack = prepack(qjax.quantize(random((2, ROWS, COLS), 1), fmt))
    assert isinstance(stack, Prepacked)
    x = random((8, ROWS), 2)
    rows = place(x, "data", None)

    def run(x, q):
        return with_gradients(matmul, x, layer_of(q, jnp.int32(1)))

    whole = jax.jit(run)(x, stack)
    compare(jax.jit(run)(rows, place(stack, None, None)), whole)
    compare(jax.jit(run)(rows, place(stack, "model", None)), whole)
    mapped = jax.jit(jax.vmap(matmul, (None, 0)))
    compare(mapped(rows, place(stack, None, None)), mapped(x, stack))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_experts(explicit, small_blocks, split, packed):
    q = qjax.quantize(random((3, ROWS, COLS), 1), Int(4, 32))
    q = prepack(q) if packed else q
    x, sizes = random((8, ROWS), 2), jnp.asarray([3, 0, 4], jnp.int32)

    def run(x, q):
        return with_gradients(lambda x, q: grouped_matmul(x, sizes, q), x, q)

    placed = place(x, "data", None), place(q, *SPLITS[split])
    compare(jax.jit(run)(*placed), jax.jit(run)(x, q))


@pytest.mark.parametrize("split", ["in", "out"])
@pytest.mark.parametrize("fmt", [Int(4, 128), Int(4, 128, axis="out")])
def test_tpu_programs(fmt, split, monkeypatch):
    """Compiled for TPUs: a kernel per shard where there is one, else blocks of it."""
    devices = device_topology("v5e", monkeypatch).devices
    axes = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axes, devices=devices)

    def shape(leaf, spec):
        place = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    dense = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
    weight = jax.eval_shape(lambda w: qjax.quantize(w, fmt), dense)
    weight = jax.tree.map(lambda leaf: shape(leaf, SPLITS[split]), weight)
    x = shape(jax.ShapeDtypeStruct((16, 2048), jnp.bfloat16), P("data", None))

    def run(x, q):
        return with_gradients(matmul, x, q)

    with jax.set_mesh(mesh), target("TPU v5 lite"):
        text = jax.jit(run).lower(x, weight).compile().as_text()
    assert ("tpu_custom_call" in text) == (fmt.grouping((2048, 2048)).kind == "in")
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert not any("u8[" in line for line in gathers)


def test_prepacked_rows_under_jit():
    """Automatic axes: the compiler asks how a kernel call on such a layout splits."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = random((16, ROWS), 2)
    rows = jax.device_put(x, NamedSharding(mesh, P("data", None)))
    for fmt in (Int(4, 32), Int(8, 32, symmetric=False), NF4(32), NF4(32, double=True)):
        stack = prepack(qjax.quantize(random((3, ROWS, COLS), 1), fmt))
        assert isinstance(stack, Prepacked)
        run = jax.jit(lambda x, q: with_gradients(matmul, x, layer_of(q, jnp.int32(2))))
        mapped = jax.jit(jax.vmap(matmul, (None, 0)))
        expected, both = run(x, stack), mapped(x, stack)
        for split in (P(), P(None, None, "data")):
            place = NamedSharding(mesh, split)
            codes, scale = jax.device_put((stack.codes, stack.scale), place)
            placed = dataclasses.replace(stack, codes=codes, scale=scale)
            compare(run(rows, placed), expected)
            compare(mapped(rows, placed), both)
            if split == P():
                assert run(rows, placed)[0].sharding.spec == P("data")

"""Grouped products agree with one dense product per expert, and so do gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import SpecError, UnsupportedError
from qjax.formats import NF4, NVFP4, Int
from qjax.methods import quantize
from qjax.ops import target
from qjax.ops.grouped import (
    ACTIVATIONS,
    explain_grouped,
    gated_experts,
    grouped_gate_up,
    grouped_matmul,
    sort_by_expert,
)
from qjax.ops.prepack import Prepacked, prepack
from qjax.wrappers import (
    InputScaled,
    LowRank,
    Permuted,
    Rotated,
    SplitInputs,
    Transposed,
    WithOutliers,
    layer_of,
)

from .conftest import FORMATS, random
from .test_memory import device_sharding

EXPERTS, ROWS, COLS = 5, 96, 40
SIZES = (3, 0, 9, 1, 4)
FORMAT_NAMES = (
    "int3-g32-asym-bf16",
    "int4-g32",
    "int4-tensor",
    "int4-nested",
    "int8-channel",
    "nf4-double",
    "nf4-flat",
    "fp8-block",
    "nvfp4",
    "mxfp4",
    "bfloat16",
)


def stacked(name, experts=EXPERTS, matrix=(ROWS, COLS), seed=1):
    return quantize(random((experts, *matrix), seed), FORMATS[name])


def expected(x, sizes, w):
    """One float64 product per expert."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y, row = np.zeros((x.shape[0], w.shape[2])), 0
    for e, size in enumerate(sizes):
        y[row : row + size] = x[row : row + size] @ w[e]
        row += size
    return y


def close(got, want, tolerance=1e-4):
    want = np.asarray(want, np.float64)
    scale = max(np.abs(want).max(initial=0), 1e-6)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, atol=tolerance * scale
    )


def int32(values):
    return jnp.asarray(values, jnp.int32)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_formats(name):
    q = stacked(name)
    x = random((20, ROWS), 2)
    y = jax.jit(grouped_matmul)(x, int32(SIZES), q)
    assert y.shape == (20, COLS) and y.dtype == x.dtype
    close(y, expected(x, SIZES, q.dequantize(jnp.float32)))
    assert not np.any(np.asarray(y)[sum(SIZES) :])
    close(grouped_matmul(x, int32(SIZES), q, backend="reference"), y)


run_jitted = jax.jit(grouped_matmul)


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 30), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_any_group_sizes(cuts, seed):
    sizes = np.diff(sorted(cuts), prepend=0)
    q = quantize(random((4, 16, 8), seed), Int(4, 8))
    x = random((30, 16), seed + 1)
    y = run_jitted(x, int32(sizes), q)  # compiled once: only the sizes differ
    close(y, expected(x, sizes, q.dequantize(jnp.float32)))


@pytest.mark.parametrize("sizes", [(0, 40, 0, 0, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 40)])
def test_one_expert_has_all_rows_or_none(sizes):
    q = stacked("int4-g32")
    x = random((40, ROWS), 2)
    y = grouped_matmul(x, int32(sizes), q)
    close(y, expected(x, sizes, q.dequantize(jnp.float32)))


def test_no_rows():
    q = stacked("int4-g32")
    x = jnp.zeros((0, ROWS))
    assert grouped_matmul(x, int32([0] * EXPERTS), q).shape == (0, COLS)
    assert grouped_gate_up(x, int32([0] * EXPERTS), q, q).shape == (0, COLS)


def test_groups_larger_than_a_window():
    sizes = (700, 0, 3, 0, 600)
    q = quantize(random((EXPERTS, 16, 8), 1), Int(4, 8))
    x = random((1310, 16), 2, jnp.bfloat16)
    y = grouped_matmul(x, int32(sizes), q)
    assert y.dtype == jnp.bfloat16
    close(y, expected(x, sizes, q.dequantize(jnp.float32)), 1e-2)


def test_group_sizes_beyond_the_rows_are_cut():
    q = stacked("int4-g32")
    x = random((6, ROWS), 2)
    y = grouped_matmul(x, int32((4, 4, 4, 0, 0)), q)
    close(y, expected(x, (4, 2, 0, 0, 0), q.dequantize(jnp.float32)))


def gradients(function, *arguments):
    def loss(*arguments):
        y = function(*arguments).astype(jnp.float32)
        return jnp.sum(y * random(y.shape, 9))

    every = tuple(range(len(arguments)))
    return jax.jit(jax.grad(loss, argnums=every, allow_int=True))(*arguments)


def dense_groups(x, sizes, w):
    """Differentiable definition: one masked product per expert."""
    ends = np.cumsum(sizes)
    row = np.arange(x.shape[0])[:, None]
    w = w if isinstance(w, jax.Array) else w.dequantize(jnp.float32)
    parts = [
        jnp.where((row >= end - size) & (row < end), x @ w[e], jnp.float32(0))
        for e, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    return functools.reduce(jnp.add, parts)


def same_gradients(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.dtype != jax.dtypes.float0 and a.dtype.itemsize > 1:
            close(a, b, 2e-2 if a.dtype.itemsize == 2 else 3e-4)


@pytest.mark.parametrize(
    "name", ["int3-g32-asym-bf16", "int4-g32", "int4-nested", "nf4-double", "nvfp4"]
)
def test_gradients_of_formats(name):
    q, x = stacked(name), random((20, ROWS), 2)
    got = gradients(lambda x, w: grouped_matmul(x, int32(SIZES), w), x, q)
    same_gradients(got, gradients(lambda x, w: dense_groups(x, SIZES, w), x, q))


def wrappers(q):
    experts, (rows, cols) = q.codes.shape[0], q.matrix
    rng = np.random.default_rng(3)
    perm = np.stack([rng.permutation(rows) for _ in range(experts)])
    signs = jnp.asarray(rng.choice([-1.0, 1.0], (experts, rows)), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 2.0, (experts, rows)), jnp.float32)
    split = int32(np.stack([[e, rows if e == 1 else e + 3] for e in range(experts)]))
    low = random((experts, rows, 3), 4), random((experts, 3, cols), 5)
    return {
        "dense": random((experts, rows, cols), 7),
        "transposed": Transposed(q),
        "permuted": Permuted(q, int32(perm)),
        "scaled": InputScaled(q, scale),
        "rotated": Rotated(q, signs),
        "rotated-int8": Rotated(q, signs.astype(jnp.int8)),
        "split": SplitInputs(q, random((experts, 2, cols), 8), split),
        "transposed-split": Transposed(
            SplitInputs(q, random((experts, 2, cols), 8), split)
        ),
        "low-rank": LowRank(q, *low),
        "transposed-low-rank-of-rotated-of-permuted": Transposed(
            LowRank(Rotated(Permuted(q, int32(perm)), signs), *low)
        ),
        "transposed-scaled": Transposed(InputScaled(q, scale)),
    }


WRAPPED = tuple(wrappers(stacked("int4-g32")))


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_and_their_gradients(name):
    w = wrappers(stacked("int4-g32"))[name]
    x = random((20, w.shape[1]), 2)
    dense = w if name == "dense" else w.dequantize(jnp.float32)
    close(grouped_matmul(x, int32(SIZES), w), expected(x, SIZES, dense))
    got = gradients(lambda x, w: grouped_matmul(x, int32(SIZES), w), x, w)
    same_gradients(got, gradients(lambda x, w: dense_groups(x, SIZES, w), x, w))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_and_up(activation):
    gate, up = stacked("int4-g32", seed=1), stacked("nf4", seed=2)
    x = random((20, ROWS), 3)

    def fused(x, gate, up):
        return grouped_gate_up(x, int32(SIZES), gate, up, activation=activation)

    def plain(x, gate, up):
        g, u = (dense_groups(x, SIZES, w) for w in (gate, up))
        return ACTIVATIONS[activation](g) * u

    close(fused(x, gate, up), plain(x, gate, up))
    same_gradients(gradients(fused, x, gate, up), gradients(plain, x, gate, up))


def test_sort_by_expert():
    ids = int32([[2, 0], [9, 2], [-1, 1]])
    order, sizes, inverse = sort_by_expert(ids, 3)
    flat = np.asarray(ids).reshape(-1)
    np.testing.assert_array_equal(flat[order][:4], [0, 1, 2, 2])
    np.testing.assert_array_equal(sizes, [1, 1, 2])
    np.testing.assert_array_equal(np.asarray(order)[np.asarray(inverse)], np.arange(6))
    np.testing.assert_array_equal(order[2:4], [0, 3])


def test_a_layer_of_experts():
    gate, up = stacked("int4-g32", seed=1), stacked("int4-g32", seed=2)
    down = stacked("int4-g32", matrix=(32, 24), seed=3)
    gate, up = (quantize(random((EXPERTS, ROWS, 32), s), NF4(32)) for s in (1, 2))
    x, weights = random((7, ROWS), 3), jax.nn.softmax(random((7, 2), 4))
    ids = int32(np.random.default_rng(0).integers(0, EXPERTS + 1, (7, 2)))
    y = jax.jit(gated_experts)(x, ids, weights, gate, up, down)
    dense = [np.asarray(w.dequantize(), np.float64) for w in (gate, up, down)]
    want = np.zeros((7, 24))
    for t, j in np.ndindex(*ids.shape):
        e, row = int(ids[t, j]), np.asarray(x[t], np.float64)
        if e < EXPERTS:
            g, u = row @ dense[0][e], row @ dense[1][e]
            hidden = g / (1 + np.exp(-g)) * u
            want[t] += float(weights[t, j]) * (hidden @ dense[2][e])
    close(y, want)
    grad = jax.grad(lambda w: jnp.sum(gated_experts(x, ids, w, gate, up, down)))(
        weights
    )
    assert grad.shape == weights.shape and np.any(np.asarray(grad))


def test_memory_does_not_hold_dense_experts():
    experts, rows, cols, m = 8, 1024, 2048, 16
    shape = jax.ShapeDtypeStruct((experts, rows, cols), jnp.float32)
    q = jax.eval_shape(lambda w: quantize(w, Int(4, 128)), shape)
    x = jax.ShapeDtypeStruct((m, rows), jnp.float32)
    dy = jax.ShapeDtypeStruct((m, cols), jnp.float32)
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)

    def gradient(x, dy, sizes, q):
        return jax.vjp(lambda x: grouped_matmul(x, sizes, q), x)[1](dy)[0]

    dense = 4 * experts * rows * cols
    for function, arguments in (
        (grouped_matmul, (x, sizes, q)),
        (gradient, (x, dy, sizes, q)),
    ):
        memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.15 * dense


def test_loops_and_vmap():
    q = stacked("int4-g32")
    x = random((3, 20, ROWS), 2)
    sizes = int32([SIZES, SIZES[::-1], (0, 0, 0, 0, 20)])
    y = jax.vmap(grouped_matmul, (0, 0, None))(x, sizes, q)
    for i in range(3):
        close(y[i], grouped_matmul(x[i], sizes[i], q))


def test_explains():
    assert "windows" in explain_grouped(16, stacked("int4-g32"))
    assert "ragged_dot" in explain_grouped(16, random((2, 4, 4), 0))


def test_bad_input():
    q, x, sizes = stacked("int4-g32"), random((20, ROWS), 2), int32(SIZES)
    with pytest.raises(SpecError, match="cast it first"):
        grouped_matmul(x.astype(jnp.int32), sizes, q)
    with pytest.raises(SpecError, match="equal `in`"):
        grouped_matmul(x[:, 1:], sizes, q)
    with pytest.raises(SpecError, match="one per expert"):
        grouped_matmul(x, sizes[1:], q)
    with pytest.raises(SpecError, match="backend is 'best'"):
        grouped_matmul(x, sizes, q, backend="best")
    with pytest.raises(SpecError, match="activation is 'sine'"):
        grouped_gate_up(x, sizes, q, q, activation="sine")
    with pytest.raises(SpecError, match="equal shapes"):
        grouped_gate_up(x, sizes, q, stacked("int4-g32", matrix=(ROWS, 8)))
    with pytest.raises(SpecError, match=r"\[tokens, top\]"):
        gated_experts(x, sizes, sizes, q, q, q)
    with pytest.raises(UnsupportedError, match="WithOutliers"):
        grouped_matmul(x, sizes, WithOutliers(q, x, sizes, sizes))


def test_a_layer_of_a_stack():
    layers = quantize(random((3, EXPERTS, ROWS, COLS), 1), FORMATS["nvfp4"])
    x = random((20, ROWS), 2)

    @jax.jit
    def run(x, layers, i):
        return grouped_matmul(x, int32(SIZES), layer_of(layers, i))

    for i in range(3):
        want = expected(x, SIZES, layers[i].dequantize(jnp.float32))
        close(run(x, layers, int32(i)), want)
    got = gradients(lambda x, w: run(x, w, int32(1)), x, layers)
    want = gradients(lambda x, w: dense_groups(x, SIZES, w[1]), x, layers)
    same_gradients(got, want)


@pytest.mark.parametrize("kind", ["cpu", "TPU v6 lite", "NVIDIA H200"])
@pytest.mark.parametrize("name", ["int3-g32", "int4-g32", "nf4-double"])
def test_prepacked(name, kind):
    """Experts in the layout of any device, also those of one layer of a stack."""
    layers = quantize(random((2, EXPERTS, ROWS, COLS), 1), FORMATS[name])
    x, packed = random((20, ROWS), 2), prepack(layers, kind=kind)
    assert isinstance(packed, Prepacked) == (
        (name, kind) != ("int4-g32", "TPU v6 lite")
    )

    def run(x, layers):
        return grouped_matmul(x, int32(SIZES), layer_of(layers, int32(1)))

    def slope(layers):
        return jax.jit(jax.grad(lambda x: jnp.sum(run(x, layers) ** 2)))(x)

    close(run(x, packed), expected(x, SIZES, layers[1].dequantize(jnp.float32)))
    close(slope(packed), slope(layers))
    one = prepack(layers[1], kind=kind)
    close(grouped_matmul(x, int32(SIZES), one), run(x, layers))


@pytest.mark.parametrize("name", ["int4-g128", "nf4", "nvfp4"])
def test_kernels_of_a_tpu(name, monkeypatch):
    """The programs for a TPU hold kernels and nothing of the size of the experts."""
    formats = {"int4-g128": Int(4, 128), "nf4": NF4(64), "nvfp4": NVFP4()}
    experts, rows, cols, m = 16, 512, 1024, 32
    sharding = device_sharding("v6e", monkeypatch)

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    dense = jax.ShapeDtypeStruct((experts, rows, cols), jnp.float32)
    q = jax.eval_shape(lambda w: quantize(w, formats[name]), dense)
    q = jax.tree.map(place, q)
    x = place(jax.ShapeDtypeStruct((m, rows), jnp.bfloat16))
    sizes = place(jax.ShapeDtypeStruct((experts,), jnp.int32))

    def gradient(x, sizes, q):
        return jax.grad(lambda x: jnp.sum(grouped_gate_up(x, sizes, q, q) ** 2))(x)

    with target("TPU v6 lite"):
        assert explain_grouped(m, q, jnp.bfloat16).startswith("tpu")
        for function, kernels in ((grouped_gate_up, 1), (gradient, 5)):
            arguments = (x, sizes, q, q) if kernels == 1 else (x, sizes, q)
            compiled = jax.jit(function).lower(*arguments).compile()
            fused = 2 if name == "nvfp4" and kernels == 1 else kernels
            assert compiled.as_text().count("tpu_custom_call") == fused
            temporaries = compiled.memory_analysis().temp_size_in_bytes
            assert temporaries < 0.1 * 2 * experts * rows * cols

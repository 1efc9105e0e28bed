"""One table: every format and wrapper goes through everything a JAX array does.

Each row is built once, `[3, 64, 16]` (three stacked layers; more inputs where blocks
need them). The transformations must
give exactly what `dequantize` gives, and the leaves must survive unchanged.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.additive import AdditiveTensor
from qjax.formats import (
    FP4,
    FP8,
    MXFP4,
    MXFP8,
    NF4,
    NVFP4,
    Additive,
    Cast,
    Ggml,
    Int,
    KMeans,
    Trellis,
)
from qjax.io.safetensors import SafetensorsFile, write_safetensors
from qjax.methods import RTN, quantize
from qjax.tensor import assemble
from qjax.wrappers import (
    InputScaled,
    LowRank,
    Permuted,
    Rotated,
    RoundedInputs,
    RowParts,
    SplitInputs,
    Transposed,
    WithOutliers,
)
from tests.ggml_blocks import random_blocks

LAYERS, ROWS, COLS = 3, 64, 16
SHAPE = (LAYERS, ROWS, COLS)

FORMATS = {
    "int8-channel": Int(8, "channel"),
    "int4-group": Int(4, 8),
    "int4-nested": Int(4, 16, scale_dtype="uint8"),
    "int3-asymmetric": Int(3, 16, symmetric=False, scale_dtype="bfloat16"),
    "int2-tensor": Int(2, "tensor"),
    "int1-short-group": Int(1, 24),
    "int4-out": Int(4, 8, symmetric=False, axis="out", zero_dtype="uint8"),
    "nf4": NF4(32),
    "nf4-double": NF4(32, double=True),
    "nf4-flat": NF4(128, double=True),
    "fp4": FP4(64, scale_dtype="float16"),
    "fp8-channel": FP8(),
    "fp8-block": FP8("e5m2", "block"),
    "mxfp4": MXFP4(),
    "mxfp8": MXFP8(),
    "nvfp4": NVFP4(),
    "bfloat16": Cast("bfloat16"),
    "normal3-group": KMeans(3, 16),
}
LEARNED = ("kmeans3", "kmeans6", "kmeans4-group", "additive2x8", "additive1x12")


def learned(name: str):
    """Random codes of random tables: what methods learn, without the methods."""
    rng = np.random.default_rng(5)
    floats = lambda *s: jnp.asarray(rng.normal(size=(LAYERS, *s)), jnp.float32)  # noqa: E731
    codes = lambda top, *s: jnp.asarray(rng.integers(0, top, (LAYERS, *s)))  # noqa: E731
    if name.startswith("additive"):
        count, bits = (2, 8) if name == "additive2x8" else (1, 12)
        fmt = Additive(count, bits, 8)
        index = codes(2**bits, ROWS // 8 * count, COLS).astype(f"uint{fmt.code_bits}")
        books = floats(count, 2**bits, 8).astype(jnp.float16)
        scale = jnp.abs(floats(1, COLS)).astype(jnp.float16)
        return AdditiveTensor(index, scale, books, fmt, (ROWS, COLS))
    fmt = KMeans(4, 16) if name == "kmeans4-group" else KMeans(int(name[6]))
    index = codes(fmt.levels, ROWS, COLS).astype(jnp.uint8)
    scale, table = None, jnp.sort(floats(fmt.levels, COLS), 1).astype(jnp.float16)
    if fmt.group:
        scale = jnp.abs(floats(ROWS // 16, COLS)).astype(jnp.float16)
        table = jnp.sort(floats(fmt.levels), 1)
    return assemble(fmt, index, scale, (ROWS, COLS), codebook=table)


def wrapped(name: str, base, rng):
    vector = lambda: jnp.asarray(rng.uniform(0.5, 2, (LAYERS, ROWS)), jnp.float32)  # noqa: E731
    perm = jnp.asarray(np.stack([rng.permutation(ROWS) for _ in range(LAYERS)]))
    index = lambda n: jnp.asarray(rng.integers(0, n, (LAYERS, 5)), jnp.int32)  # noqa: E731
    floats = lambda *s: jnp.asarray(rng.normal(size=(LAYERS, *s)), jnp.float32)  # noqa: E731
    return {
        "transposed": lambda: Transposed(base),
        "permuted": lambda: Permuted(base, perm.astype(jnp.int32)),
        "input-scaled": lambda: InputScaled(base, vector()),
        "rotated": lambda: Rotated(base, jnp.sign(vector() - 1.0)),
        "rotated-int8": lambda: Rotated(
            base, jnp.sign(vector() - 1.0).astype(jnp.int8)
        ),
        "rounded-inputs": lambda: RoundedInputs(base),
        "static-inputs": lambda: RoundedInputs(base, "int8", vector()[:, 0]),
        "split-inputs": lambda: SplitInputs(
            base, floats(3, COLS), jnp.full((LAYERS, 1), 1) * jnp.array([4, 40, ROWS])
        ),
        "outliers": lambda: WithOutliers(base, floats(5), index(ROWS), index(COLS)),
        "row-parts": lambda: RowParts((base, base), (0, 0), base.matrix),
        "low-rank": lambda: LowRank(base, floats(ROWS, 2), floats(2, COLS)),
        "scaled-permuted": lambda: InputScaled(
            Permuted(base, perm.astype(jnp.int32)), vector()
        ),
    }[name]()


WRAPPERS = (
    "transposed",
    "permuted",
    "input-scaled",
    "rotated",
    "rotated-int8",
    "rounded-inputs",
    "static-inputs",
    "split-inputs",
    "outliers",
    "row-parts",
    "low-rank",
    "scaled-permuted",
)
TRELLIS = ("trellis", "incoherent")
GGML = {
    "ggml-q4_0": 256,
    "ggml-mxfp4": 256,
    "ggml-q4_k": 1024,
    "ggml-q6_k": 1024,
    "ggml-iq2_xxs": 1024,
}
"""llama.cpp's blocks, and how many inputs."""
NAMES = (*FORMATS, *LEARNED, *WRAPPERS, *TRELLIS, *GGML)


@functools.cache
def weight() -> np.ndarray:
    return np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


@functools.cache
def build(name: str):
    if name in LEARNED:
        return learned(name)
    if name in GGML:
        return random_blocks(name[5:], (LAYERS,), (GGML[name], COLS))
    if name in FORMATS:
        return quantize(weight(), FORMATS[name])
    if name in TRELLIS:
        q = quantize(weight(), Trellis(2))
        return q if name == "incoherent" else q.base
    return wrapped(name, build("int3-asymmetric"), np.random.default_rng(2))


dense = jax.jit(lambda q: q.dequantize())


@functools.cache
def expected(name: str) -> np.ndarray:
    return np.asarray(dense(build(name)))


def same(a, b) -> None:
    """Equal structure, and equal leaves byte for byte."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def agree(name: str, got, want: np.ndarray) -> None:
    """Equal bit for bit, except where wrappers add products (order, contraction)."""
    if name in ("rotated", "rotated-int8", "low-rank", "outliers", "incoherent"):
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_array_equal(np.asarray(got), want)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_jit_vmap_scan(name):
    q, want = build(name), expected(name)
    assert want.shape == q.shape

    @jax.jit
    def both(q):
        _, scanned = jax.lax.scan(lambda c, layer: (c, layer.dequantize()), 0, q)
        return jax.vmap(lambda layer: layer.dequantize())(q), scanned

    for got in both(q):
        agree(name, got, want)


@pytest.mark.parametrize("name", ["int3-asymmetric", "nf4-double", "nvfp4"])
def test_values_do_not_depend_on_compilation(name):
    agree(name, build(name).dequantize(), expected(name))


def test_indexing(name):
    q, want = build(name), expected(name)
    assert q[1].shape == want[1].shape
    assert q[1:].shape == want[1:].shape
    assert q[None, 0].shape == want[None, 0].shape
    same(q[jnp.int32(2)], q[2])
    agree(name, dense(q[1]), want[1])
    assert q[1].bits_per_weight == pytest.approx(q.bits_per_weight)


def test_eval_shape_and_size(name):
    q = build(name)
    shapes = jax.eval_shape(lambda q: q, q)
    assert (shapes.shape, shapes.nbytes) == (q.shape, q.nbytes)
    assert repr(shapes) == repr(q)
    assert q.nbytes == sum(np.asarray(x).nbytes for x in jax.tree.leaves(q))
    out = jax.eval_shape(lambda q: q.dequantize(jnp.bfloat16), q)
    assert (out.shape, out.dtype) == (q.shape, jnp.bfloat16)


def test_tree_maps(name):
    q = build(name)
    leaves, structure = jax.tree.flatten(q)
    same(jax.tree.unflatten(structure, leaves), q)
    same(jax.tree.map(lambda x: x, q), q)
    jax.tree.unflatten(structure, [object()] * len(leaves))  # no validation
    assert hash(structure) == hash(jax.tree.structure(jax.tree.map(np.asarray, q)))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(q)]
    assert len(set(paths)) == len(leaves)


def test_donation(name):
    q = jax.tree.map(jnp.copy, build(name))
    leaves = jax.tree.leaves(q)
    roll = jax.jit(
        lambda q: jax.tree.map(lambda x: jnp.roll(x, 1, 0), q), donate_argnums=0
    )
    rolled = roll(q)
    assert all(leaf.is_deleted() for leaf in leaves)
    same(rolled[0], build(name)[2])


@pytest.mark.parametrize("axis", ["in", "out"])
def test_sharding(name, axis):
    """Leaves split over eight devices where they divide decode to the same values."""
    q, want = build(name), expected(name)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        dim = (leaf.ndim - 2) if axis == "in" else (leaf.ndim - 1)
        divides = dim > 0 and leaf.shape[dim] % 8 == 0
        spec = [None] * leaf.ndim
        if divides:
            spec[dim] = "x"
        return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))

    placed = jax.tree.map(place, q)
    split = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed)]
    tiled = axis == "in" and name in ("trellis", "incoherent")  # four rows of tiles
    assert any(split) or tiled or name in ("nf4-flat", "fp4")
    agree(name, dense(placed), want)


@pytest.mark.parametrize("name", [*FORMATS])
def test_sharded_quantization_is_bitwise_equal(name):
    mesh = jax.make_mesh(
        (4, 2), ("i", "o"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    w = jax.device_put(weight(), NamedSharding(mesh, P(None, "i", "o")))
    same(quantize(w, FORMATS[name]), build(name))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("conformance")


def test_orbax(directory):
    """Save and restore with a template, every row in one checkpoint."""
    tree = {name: build(name) for name in NAMES}
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "orbax", tree)
        checkpointer.wait_until_finished()
        same(checkpointer.restore(directory / "orbax", template), tree)


def test_safetensors(directory):
    """Leaves by path, read back into the template's structure."""
    tree = {name: build(name) for name in NAMES}
    flat, structure = jax.tree.flatten_with_path(tree)
    tensors = {jax.tree_util.keystr(path): leaf for path, leaf in flat}
    write_safetensors(directory / "leaves.safetensors", tensors)
    with SafetensorsFile(directory / "leaves.safetensors") as file:
        leaves = [np.array(file.read(name)) for name in tensors]
    same(jax.tree.unflatten(structure, leaves), tree)


def test_export(name):
    """A serialized program takes the tensor itself."""
    q = build(name)
    exported = jax.export.export(dense)(q)
    loaded = jax.export.deserialize(exported.serialize())
    agree(name, loaded.call(q), expected(name))


def test_exported_static_fields_are_json():
    from qjax.tensor import _dump_static, _load_static

    static = jax.tree.structure(build("int3-asymmetric")).node_data()[1]
    assert json.loads(_dump_static(static))[1] == [ROWS, COLS]
    assert _load_static(_dump_static(static)) == static


def test_optax_masks():
    """Adam moves the float32 leaves, and only them."""
    rows = ("int4-nested", "int3-asymmetric", "nf4-double", "nvfp4", "low-rank")
    params = {name: build(name) for name in rows}
    labels = jax.tree.map(
        lambda x: "train" if x.dtype == jnp.float32 else "freeze", params
    )
    optimizer = optax.partition(
        {"train": optax.adam(0.1), "freeze": optax.set_to_zero()}, labels
    )
    grads = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on promotion
        state = optimizer.init(params)
        updates, _ = optimizer.update(grads, state, params)
        moved = optax.apply_updates(params, updates)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    for label, old, new in zip(
        jax.tree.leaves(labels),
        jax.tree.leaves(params),
        jax.tree.leaves(moved),
        strict=True,
    ):
        changed = np.asarray(old).tobytes() != np.asarray(new).tobytes()
        assert changed == (label == "train")


DTYPES = ("float16", "bfloat16", "float32", "float64", ">f4", ">f2")


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_any_float_dtype(dtype):
    half = weight().astype(np.float16)
    q = quantize(half.astype(jnp.bfloat16 if dtype == "bfloat16" else dtype), Int(4, 8))
    kinds = {"float64": "float32", ">f4": "float32", ">f2": "float16"}
    assert q.dtype == kinds.get(dtype, dtype)
    assert q.dequantize().dtype == q.dtype
    if dtype != "bfloat16":
        same(q.codes, quantize(half.astype(np.float32), Int(4, 8)).codes)


def test_inputs_of_any_layout():
    w = weight()
    frozen = w.copy()
    frozen.flags.writeable = False
    strided = np.zeros((LAYERS, ROWS, 2 * COLS), np.float32)[..., ::2]
    strided[:] = w
    want = build("int4-group")
    layouts = (np.asfortranarray(w), strided, frozen, w[::-1][::-1], jnp.asarray(w))
    for array in layouts:
        same(quantize(array, Int(4, 8)), want)


@pytest.mark.parametrize("lead", [(), (2,), (2, 1), (0,), (0, 3)])
def test_leading_axes(lead):
    w = np.ones((*lead, ROWS, COLS), np.float32)
    q = quantize(w, Int(4, 8))
    assert q.shape == w.shape
    np.testing.assert_allclose(np.asarray(q.dequantize()), w, atol=0.51 / 7.5)


EMPTY = {
    **FORMATS,
    "int4-channel": Int(4, "channel"),
    "kmeans3": KMeans(3),
    "additive": Additive(2, 8, 8),
    "ggml": Ggml("q5_1"),
}


@pytest.mark.parametrize("fmt", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("shape", [(0, 16), (2, 64, 0)])
def test_empty_axes(fmt, shape):
    q = quantize(np.zeros(shape, np.float32), fmt)
    assert q.shape == shape
    assert q.size == 0
    assert q.bits_per_weight == 0
    assert q.dequantize().shape == shape


ODD = {
    "int4": Int(4, 1),
    "int3-channel": Int(3, "channel"),
    "nf4": NF4(64, double=True),
    "fp8-block": FP8(granularity="block"),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
}


@pytest.mark.parametrize("fmt", ODD.values(), ids=ODD)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (129, 5)])
def test_odd_sizes(fmt, shape):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    q = quantize(w, fmt, RTN())
    got = np.asarray(q.dequantize())
    assert got.shape == shape
    assert np.abs(got - w).max() <= 0.5 * np.abs(w).max()

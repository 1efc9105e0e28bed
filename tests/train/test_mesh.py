"""Steps on a mesh: the same numbers as on one device, packed weights moved as bytes."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qjax.errors import SpecError, UnsupportedError
from qjax.nn import QuantizedParam
from qjax.train import mesh as meshes
from qjax.train.layout import Layout
from qjax.train.mesh import (
    AXES,
    Mesh,
    automatic,
    make_mesh,
    place_batch,
    process_share,
)
from qjax.wrappers import InputScaled, Permuted
from tests.train import small

GATHERED = re.compile(r"= ([a-z0-9]+)\[([0-9,]*)\]\S* all-gather\(")


@pytest.fixture(scope="module")
def alone():
    """Losses, gradient norms and trained values of two steps on one device."""
    state, measured = small.steps(small.step_of(small.model()), small.batch())
    return measured, jax.tree.map(np.asarray, state.trainable)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 2, 2)])
def test_a_mesh_changes_no_number_and_gathers_bytes(alone, sizes):
    made = small.model()
    step = small.step_of(made, make_mesh(Mesh(*sizes)))
    rows = small.batch()
    if sizes[2] == 2:  # micro-batches change no number either
        rows = {name: x.reshape(2, -1, small.TIME) for name, x in rows.items()}
    compiled = step.lower(rows).compile()
    state, measured = step.init(jax.random.key(0)), []
    for _ in range(2):
        state, metrics = compiled(state, step.frozen, step.placed(rows))
        measured.append([float(metrics.loss), float(metrics.grad_norm)])
    np.testing.assert_allclose(measured, alone[0], rtol=1e-5)
    got = jax.tree.leaves(state.trainable)
    for one, other in zip(got, jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_allclose(np.asarray(one), other, atol=1e-4)

    found = GATHERED.findall(compiled.as_text())
    packed = [shape for kind, shape in found if kind == "u8"]
    assert len(packed) >= 2 * 7  # of seven weights, forward and again backward
    # Floats that move are adapters and the head; no weight of a layer does.
    sizes_of = [int(np.prod([int(n) for n in s.split(",") if n])) for k, s in found]
    floats = [n for n, (k, _) in zip(sizes_of, found, strict=True) if k[0] in "fb"]
    assert max(floats) == 128 * 320 and sorted(floats)[-2] <= 4 * 256

    adapter = state.trainable["layers"][0]["attn"]["q"]["lora"]["a"].get_value()
    moments = [
        leaf
        for leaf in jax.tree.leaves(state.optimizer)
        if leaf.shape == adapter.shape and leaf.sharding == adapter.sharding
    ]
    assert adapter.sharding.shard_shape(adapter.shape) == (2, 64, 4) and moments
    codes = step.frozen["layers"][0]["attn"]["q"]["kernel"].get_value().codes
    here = codes.addressable_shards[0].data
    assert here.nbytes == codes.nbytes // (sizes[1] * sizes[2])


@pytest.mark.slow
def test_other_weights_and_evaluation():
    """Float8 codes, a wrapped weight and DoRA over `fsdp`, a mesh of explicit axes."""
    explicit = jax.make_mesh(
        (1, 4, 1), AXES, devices=jax.devices()[:4], axis_types=(AxisType.Explicit,) * 3
    )

    def step_on(mesh):
        made = small.model("fp8", variant="dora")
        layer = made.layers[0].attn.v
        turned = jnp.tile(jnp.arange(128, dtype=jnp.int32)[::-1], (2, 1))
        scaled = InputScaled(layer.kernel.get_value(), jnp.full((2, 128), 1.5))
        layer.kernel = QuantizedParam(Permuted(scaled, turned))
        return small.step_of(made, mesh)

    one, many = step_on(None), step_on(explicit)
    losses = [
        step.evaluate(step.trainable, step.frozen, small.batch())
        for step in (one, many)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    text = many.lower(small.batch()).as_text()
    moved = set(re.findall(r"stablehlo.all_gather.*: \(tensor<[^>]*x(\w+)>\)", text))
    assert moved == {"ui8", "f32", "i32"}  # codes, adapters and head, token ids


def test_sizes():
    assert Mesh(fsdp=-1).resolved(8) == Mesh(fsdp=8)
    assert Mesh(data=2, fsdp=-1, tensor=2).resolved(8) == Mesh(2, 2, 2)
    made = make_mesh(Mesh(data=2, tensor=2))
    assert dict(made.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert set(made.axis_types) == {AxisType.Auto}
    for sizes, text in (
        ({"data": 0}, "data is 0"),
        ({"fsdp": "all"}, "fsdp is 'all'"),
        ({"data": -1, "fsdp": -1}, "only one"),
    ):
        with pytest.raises(SpecError, match=text):
            Mesh(**sizes)
    with pytest.raises(SpecError, match="8 devices do not divide by 3"):
        make_mesh(Mesh(data=3, fsdp=-1))
    with pytest.raises(SpecError, match="takes 16 devices; there are 8"):
        make_mesh(Mesh(data=16))
    with pytest.raises(SpecError, match=r"expected .*'data', 'fsdp', 'tensor'"):
        automatic(jax.make_mesh((8,), ("x",)))


def test_a_run_on_several_hosts_takes_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SpecError, match="takes 4 of 8 devices; with 2 processes"):
        make_mesh(Mesh(data=4))


@pytest.mark.parametrize(
    ("sizes", "process", "share"),
    [
        ((1, 4, 1), 1, (1, 2)),  # two devices a host, a row each
        ((1, 2, 2), 1, (1, 2)),  # a row's heads on one host
        ((1, 1, 4), 1, (0, 1)),  # on both hosts: they feed the same rows
    ],
)
def test_hosts_feed_their_rows(monkeypatch, sizes, process, share):
    devices = [types.SimpleNamespace(process_index=i // 2) for i in range(4)]
    fake = types.SimpleNamespace(
        devices=np.array(devices, object).reshape(sizes),
        shape=dict(zip(AXES, sizes, strict=True)),
    )
    monkeypatch.setattr(jax, "process_index", lambda: process)
    assert process_share(fake) == share
    assert process_share(None) == (0, 1)


def test_uneven_hosts_are_refused(monkeypatch):
    devices = [types.SimpleNamespace(process_index=i) for i in (0, 1, 1, 0)]
    fake = types.SimpleNamespace(
        devices=np.array(devices, object).reshape(1, 4, 1),
        shape={"data": 1, "fsdp": 4, "tensor": 1},
    )
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(SpecError, match=r"parts \[0, 3\] of 4 of the rows"):
        process_share(fake)


def test_rows_that_do_not_divide():
    mesh = make_mesh(Mesh(data=2, fsdp=4))
    with pytest.raises(SpecError, match=r"6 rows of tokens .* data=2 \* fsdp=4"):
        place_batch({"tokens": np.zeros((1, 6, 4), np.int32)}, mesh)
    placed = place_batch(small.batch(), mesh)
    assert placed["tokens"].sharding == NamedSharding(mesh, meshes.BATCH)
    assert place_batch(placed, mesh)["tokens"] is placed["tokens"]


def test_what_cannot_be_split():
    with pytest.raises(SpecError, match="tensor=4 does not divide 2 key/value heads"):
        Layout(make_mesh(Mesh(tensor=4)), small.shapes())
    with pytest.raises(UnsupportedError, match=r"DoRA over rows of layers\.0\.attn\.o"):
        Layout(make_mesh(Mesh(tensor=2)), small.shapes(variant="dora"))
    with pytest.raises(SpecError, match=r"tensor=2 cuts groups of layers\.0\.attn\.o"):
        Layout(make_mesh(Mesh(tensor=2)), small.shapes("int4-g128"))
    with pytest.raises(UnsupportedError, match="for a Decoder, not for a int"):
        Layout(make_mesh(Mesh()), 1)


def test_vectors_are_everywhere_and_the_table_is_split_by_columns():
    layout = Layout(make_mesh(Mesh(fsdp=4)), small.shapes())
    assert layout.spec(("norm", "scale")) == PartitionSpec(None)
    assert layout.spec(("embed", "tokens", "embedding")) == PartitionSpec(None, "fsdp")
    assert layout.spec(("head", "kernel")) == PartitionSpec("fsdp", None)
    assert layout.spec(("layers", 0, "attn_norm", "scale")) == PartitionSpec(None, None)

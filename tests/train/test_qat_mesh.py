"""Training for a format on a mesh: the numbers, and the codes, of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from qjax.abstract import abstract_decoder
from qjax.errors import UnsupportedError
from qjax.formats import NF4, NVFP4, Int
from qjax.methods import HQQ, RTN
from qjax.models import Decoder, ModelConfig, param_shapes
from qjax.recipes import Recipe, Rule
from qjax.train.layout import Layout
from qjax.train.mesh import Mesh, make_mesh
from qjax.train.optimizers import relaxed
from qjax.train.qat import QAT, convert, prepare
from qjax.train.step import Step
from tests.train import small

SIZES = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
CONFIG = ModelConfig.from_hf(small.CONFIG | SIZES)
FMT = Int(4, 8, symmetric=False, scale_dtype="float16", zero_dtype="float16")
RULES = (Rule("*embed*", Int(4, 8)), Rule("*kernel", FMT))


def rows():
    made = small.batch()
    return made | {name: made[name] % 64 for name in ("tokens", "targets")}


def prepared(config):
    rng = np.random.default_rng(0)
    shapes = param_shapes(CONFIG).items()
    params = {
        path: (rng.standard_normal(shape) * 0.2).astype(np.float32)
        for path, shape in shapes
    }
    model = Decoder(CONFIG, params)
    prepare(model, config)
    return model


def step_of(model, wrt, mesh=None):
    return Step(model, relaxed(optax.sgd(0.1)), wrt=wrt, mesh=mesh)


@pytest.mark.slow
def test_a_mesh_trains_the_same_and_converts_bit_for_bit():
    config = QAT(Recipe(RULES), learn="lsq", others=True, start_step=1)
    alone, measured = small.steps(step_of(prepared(config), config.wrt), rows())
    mesh, model = make_mesh(Mesh(1, 2, 2)), prepared(config)
    step = step_of(model, config.wrt, mesh)
    state, got = small.steps(step, rows())
    np.testing.assert_allclose(got, measured, rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (state, alone)), strict=True):
        if jnp.issubdtype(one.dtype, jnp.floating):
            np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-5)
    own = state.trainable["layers"][0]["mlp"]["down"]
    for leaf in (own["kernel"], own["qat"]["scale"], own["qat"]["offset"]):
        spec = leaf.get_value().sharding.spec
        assert tuple(spec)[:2] == (None, ("tensor", "fsdp"))

    step.install(state)
    made = convert(model)
    assert len(made.params()["layers.1.mlp.up.kernel"].codes.sharding.device_set) == 1
    again = step_of(made, nnx.Param, mesh)
    sums = [
        one.evaluate(trainable, one.frozen, rows())[0]
        for one, trainable in ((step, state.trainable), (again, again.trainable))
    ]
    np.testing.assert_array_equal(*sums)


def layout(config, **sizes):
    def change(model):
        prepare(model, config, key=jax.random.key(0))

    shapes = abstract_decoder(CONFIG, None, change=change)
    return Layout(make_mesh(Mesh(**sizes)), shapes)


@pytest.mark.parametrize(
    ("fmt", "method", "more", "text"),
    [
        (Int(4, "channel"), RTN(), {}, "what rtn rounds together in .* its inputs"),
        (NVFP4(), RTN(), {}, "nvfp4"),
        (NF4(64, double=True), RTN(), {}, "nf4"),
        (FMT, HQQ(), {}, "what hqq rounds together"),
        (FMT, RTN(), {"activations": "int8"}, "cuts the rows that .* to int8"),
    ],
)
def test_parts_that_are_not_rounded_alone_are_refused(fmt, method, more, text):
    config = QAT(Recipe((Rule("layers.*kernel", fmt, method),)), **more)
    with pytest.raises(UnsupportedError, match=rf"mesh: tensor=2 {text}|mesh.*{text}"):
        layout(config, tensor=2)
    layout(config, fsdp=2)  # rounds whole layers


def test_a_table_that_is_trained_for_a_format_is_not_split_by_columns():
    path = ("embed", "tokens", "embedding")
    assert layout(QAT(FMT), fsdp=2).spec(path) == PartitionSpec(None, "fsdp")
    made = layout(QAT(Recipe(RULES)), fsdp=2)
    assert not made.split_table and made.spec(path) == PartitionSpec("fsdp", None)

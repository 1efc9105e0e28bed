"""Models with adapters beside models whose weights were merged by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.errors import SpecError, UnsupportedError
from qjax.formats import Int
from qjax.models import Decoder
from qjax.nn.lora import with_dropout_key
from qjax.tensor import QuantizedTensor
from qjax.train.lora import LoRA, adapter_tree, attach, detach, load_adapter_tree
from tests.train.lora_models import (
    CLOSE,
    CONFIG,
    KEY,
    TIED,
    TOKENS,
    dense,
    logits,
    merged,
    packed_params,
    random_params,
    shaken,
)

ALIKE: dict[str, LoRA] = {
    "lora": LoRA(rank=4, alpha=8.0),
    "rslora": LoRA(rank=4, variant="rslora", targets=("q_proj", "embed", "head")),
    "dora": LoRA(rank=4, variant="dora", targets=("q", "down", "lm_head")),
    "qalora": LoRA(rank=4, variant="qalora", pool=8, init="gaussian"),
    "patterns": LoRA(
        rank=2,
        targets=("q_proj", "layers.1.mlp.down", "model.layers.2.mlp.down_proj"),
        rank_pattern={r"layers\.1\.mlp\.down": 5, "q_proj": 3},
        alpha_pattern={r"model\.layers\.[01]\.self_attn\.q_proj": 3.0},
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_packed_model_is_its_merged_weights(name):
    model = Decoder(CONFIG, packed_params())
    before, params = logits(model), model.params()
    report = attach(model, ALIKE[name], KEY)
    np.testing.assert_allclose(logits(model), before, rtol=1e-5, atol=1e-5)
    held = model.params()
    assert held.keys() == params.keys()
    assert all(
        a is b or np.array_equal(dense(a), dense(b))
        for a, b in zip(held.values(), params.values(), strict=True)
    )
    shaken(model)
    after = logits(model)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(after, logits(merged(model)), **CLOSE)
    tree = adapter_tree(model)
    assert sum(one.parameters for one in report.modules) == report.parameters
    for one in report.modules:
        own = tree[one.path]
        assert own["rank"] == one.rank == own["a"].shape[1] == own["b"].shape[0]
        assert own["alpha"] == one.alpha
        rows = params[f"{one.path}.{'embedding' if one.path == 'embed' else 'kernel'}"]
        assert one.shape == rows.shape
    detach(model)
    np.testing.assert_array_equal(logits(model), before)
    with pytest.raises(SpecError, match="has no adapters"):
        detach(model)


def test_ranks_and_factors_of_patterns():
    model = Decoder(CONFIG, random_params())
    report = attach(model, ALIKE["patterns"], KEY)
    ranks = {one.path: (one.rank, one.alpha) for one in report.modules}
    assert ranks == {
        "layers.0.attn.q": (3, 3.0),
        "layers.1.attn.q": (3, 3.0),
        "layers.2.attn.q": (3, 16.0),
        "layers.1.mlp.down": (5, 16.0),
        "layers.2.mlp.down": (2, 16.0),
    }
    tree = adapter_tree(model)
    assert tree["layers.1.mlp.down"]["scale"] == pytest.approx(16 / 5)
    assert dict(report.kept)["layers.0.mlp.down"] == "not a target"
    # One stack: the greatest rank, the rest zeros; layer 0 is not adapted.
    lora = vars(model.layers[0].mlp.down)["lora"]
    assert lora.a.get_value().shape == (3, 64, 5)
    np.testing.assert_array_equal(lora.a.get_value()[2, :, 2:], 0)
    np.testing.assert_array_equal(
        lora.scale.get_value(), np.asarray([0, 16 / 5, 8], np.float32)
    )


def test_only_adapters_have_gradients_and_padding_has_none():
    model = Decoder(CONFIG, packed_params())
    attach(model, ALIKE["patterns"], KEY)
    shaken(model)
    graph, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)
    assert all(isinstance(v, nnx.LoRAParam) for _, v in nnx.to_flat_state(trained))
    stacks = [leaf.get_value() for _, leaf in nnx.to_flat_state(frozen)]
    stacks = [q for q in stacks if isinstance(q, QuantizedTensor) and q.ndim == 3]
    assert len(stacks) == 7  # whole, as they were

    def loss(trained, tokens):
        return jnp.sum(nnx.merge(graph, trained, frozen)(tokens)[0] ** 2)

    slopes = jax.jit(jax.grad(loss))(trained, TOKENS)
    for _, leaf in nnx.to_flat_state(slopes):
        assert leaf.get_value().dtype == jnp.float32
    down = slopes["layers"][0]["mlp"]["down"]["lora"]
    for slope in (down["a"].get_value(), jnp.swapaxes(down["b"].get_value(), 1, 2)):
        assert [int(jnp.any(x, 0).sum()) for x in slope] == [0, 5, 2]


def test_no_dense_weight_is_stored_for_the_gradient():
    model = Decoder(CONFIG, packed_params())
    attach(model, LoRA(rank=2), KEY)
    graph, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)
    held = model.params().values()
    shapes = {x.shape for x in held if isinstance(x, QuantizedTensor)}

    def stored(trained, frozen, tokens):
        run = lambda t: nnx.merge(graph, t, frozen)(tokens)[0]  # noqa: E731
        return jax.tree.leaves(jax.vjp(run, trained)[1])

    # 12 tokens: no activation has the shape of a weight.
    found = jax.eval_shape(stored, trained, frozen, TOKENS)
    floating = [x.shape for x in found if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floating
    wide = {(3, *shape) for shape in shapes} | shapes
    assert not [shape for shape in floating if shape in wide]


def test_a_tied_head_keeps_the_table():
    model = Decoder(TIED, random_params(TIED))
    report = attach(model, LoRA(rank=2, targets=("embed_tokens",)), KEY)
    assert [one.path for one in report.modules] == ["embed"]
    own = adapter_tree(model)["embed"]
    np.testing.assert_array_equal(own["a"], 0)
    assert 0.5 < own["b"].std() < 1.5
    shaken(model)
    np.testing.assert_allclose(logits(model), logits(merged(model)), **CLOSE)


def test_layers_of_other_formats_are_runs_of_their_own():
    mixed = {
        path: qjax.quantize(random_params()[path], Int(4, 32))
        for path in packed_params()
        if path.startswith("layers.1.mlp") and path.endswith("kernel")
    }
    model = Decoder(CONFIG, packed_params() | mixed)
    assert len(model.layers) == 3
    report = attach(
        model, LoRA(rank=2, variant="dora", exclude=("layers.1.attn.q",)), KEY
    )
    assert len(report.modules) == 20
    shaken(model)
    np.testing.assert_allclose(logits(model), logits(merged(model)), **CLOSE)


def test_a_rank_above_the_weight_is_plain_training_of_it():
    model = Decoder(CONFIG, random_params())
    attach(model, LoRA(rank=40, targets=("k",)), KEY)
    shaken(model)
    np.testing.assert_allclose(logits(model), logits(merged(model)), **CLOSE)


def test_trees_go_in_again():
    model = Decoder(CONFIG, packed_params())
    attach(model, LoRA(rank=2, variant="dora", targets=("q", "down")), KEY)
    shaken(model)
    tree, want = adapter_tree(model), logits(model)
    with pytest.raises(SpecError, match="has an adapter already"):
        attach(model, LoRA(rank=2), KEY)
    fresh = Decoder(CONFIG, packed_params())
    attach(fresh, LoRA(rank=3, targets=("up", "q")), KEY)
    report = load_adapter_tree(fresh, tree, dropout=0.5)
    assert {one.path for one in report.modules} == tree.keys()
    assert dict(report.kept)["layers.0.mlp.up"] == "not in the tree"
    assert adapter_tree(fresh).keys() == tree.keys()  # those on `up` are off
    np.testing.assert_array_equal(logits(fresh), want)
    assert vars(fresh.layers[0].attn.q)["lora"].rate == 0.5
    one = tree["layers.0.attn.q"]
    for own, error, message in (
        ({"a": one["a"]}, SpecError, "lacks b, scale; it has a"),
        (one | {"a": one["a"][:5]}, SpecError, r"a \[5, 2\] and b \[2, 32\]; expected"),
        (one | {"b": one["b"].T}, SpecError, "expected"),
        (one | {"magnitude": np.ones(3)}, SpecError, r"magnitude \[3\]"),
        ({k: one[k] for k in ("a", "b", "scale")}, UnsupportedError, "another variant"),
    ):
        with pytest.raises(error, match=message):
            load_adapter_tree(fresh, tree | {"layers.0.attn.q": own})
    with pytest.raises(
        SpecError, match=r"'layers\.9\.attn\.q' is no weight of this model"
    ):
        load_adapter_tree(fresh, {"layers.9.attn.q": one})
    with pytest.raises(SpecError, match="there are no adapters"):
        load_adapter_tree(fresh, {})
    np.testing.assert_array_equal(logits(fresh), want)  # nothing was changed
    with pytest.raises(SpecError, match="attach some first"):
        adapter_tree(Decoder(CONFIG, random_params()))


def test_dropout_of_a_scanned_stack():
    model = Decoder(CONFIG, packed_params())
    attach(model, LoRA(rank=2, dropout=0.3), KEY)
    shaken(model)  # loads without dropout
    assert vars(model.layers[0].attn.q)["lora"].key is None
    load_adapter_tree(model, adapter_tree(model), dropout=0.3)
    plain = logits(model)
    np.testing.assert_allclose(plain, logits(merged(model)), **CLOSE)
    one, two = (logits(with_dropout_key(model, jax.random.key(i))) for i in (1, 2))
    assert np.abs(one - plain).max() > 0.01
    assert np.abs(one - two).max() > 0.01
    np.testing.assert_array_equal(
        one, logits(with_dropout_key(model, jax.random.key(1)))
    )
    np.testing.assert_array_equal(plain, logits(with_dropout_key(model, None)))

"""What adapters start with, and what becomes of the weights below them."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import SpecError
from qjax.formats import Int
from qjax.models import Decoder
from qjax.nn import quantize_module
from qjax.tensor import QuantizedTensor
from qjax.train.lora import LoRA, adapter_tree, attach, detach
from tests.train.lora_models import (
    CONFIG,
    KEY,
    Mixed,
    dense,
    logits,
    packed_params,
    random_params,
)


def test_first_values_are_those_of_peft():
    model = Decoder(CONFIG, random_params())
    attach(model, LoRA(rank=16), KEY)
    first = adapter_tree(model)
    bound = 1 / np.sqrt(64)
    a = first["layers.0.mlp.down"]["a"]
    assert 0.95 * bound < np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert all(not own["b"].any() for own in first.values())
    detach(model)
    attach(model, LoRA(rank=16, targets=("down",)), KEY)  # whatever else is adapted
    np.testing.assert_array_equal(adapter_tree(model)["layers.0.mlp.down"]["a"], a)
    detach(model)
    attach(model, LoRA(rank=16, init="gaussian"), KEY)
    a = adapter_tree(model)["layers.0.mlp.down"]["a"]
    assert a.std() == pytest.approx(1 / 16, rel=0.1)


@pytest.mark.parametrize("packed", [False, True])
def test_pissa_takes_the_greatest_parts_out_of_the_weight(packed):
    params = packed_params(Int(8, 32)) if packed else random_params()
    model = Decoder(CONFIG, params)
    before = logits(model)
    report = attach(
        model, LoRA(rank=4, alpha=2.0, init="pissa", targets=("q", "up")), KEY
    )
    kinds = {one.base for one in report.modules}
    assert kinds == {"requantized" if packed else "changed"}
    own, path = adapter_tree(model)["layers.1.mlp.up"], "layers.1.mlp.up.kernel"
    w = dense(params[path])
    u, s, v = np.linalg.svd(w, full_matrices=False)
    product = 0.5 * np.float64(own["a"]) @ own["b"]
    np.testing.assert_allclose(product, u[:, :4] * s[:4] @ v[:4], atol=1e-4)
    left = dense(model.params()[path])
    assert np.abs(left + product - w).max() < (0.02 if packed else 1e-5)
    other = "layers.1.mlp.down.kernel"
    np.testing.assert_array_equal(dense(model.params()[other]), dense(params[other]))
    assert np.abs(logits(model) - before).max() < (0.5 if packed else 1e-3)
    assert isinstance(model.params()[path], QuantizedTensor) == packed


def test_loftq_repairs_what_rounding_lost():
    params, original = packed_params(), random_params()
    path = "layers.2.attn.o"
    w, q = dense(original[f"{path}.kernel"]), dense(params[f"{path}.kernel"])
    errors = {}
    for rounds in (0, 3):
        model = Decoder(CONFIG, params)
        config = LoRA(rank=4, init="loftq", loftq_rounds=rounds)
        held = original if rounds else Decoder(CONFIG, original)
        report = attach(model, config, KEY, original=held)
        assert {one.base for one in report.modules} == {
            "requantized" if rounds else "kept"
        }
        own = adapter_tree(model)[path]
        product = own["scale"] * np.float64(own["a"]) @ own["b"]
        left = dense(model.params()[f"{path}.kernel"])
        errors[rounds] = np.linalg.norm(w - left - product)
        if not rounds:
            np.testing.assert_array_equal(left, q)
            rest = np.linalg.svd(w - q, compute_uv=False)[4:]
            assert errors[0] == pytest.approx(np.linalg.norm(rest), rel=1e-4)
    assert errors[3] < errors[0] < np.linalg.norm(w - q)


def test_originals_of_loftq_are_checked():
    config, params = LoRA(rank=2, init="loftq"), random_params()
    with pytest.raises(SpecError, match="this one is dense; quantize the model first"):
        attach(Decoder(CONFIG, params), config, KEY, original=params)
    model = Decoder(CONFIG, packed_params())
    lacking = {p: x for p, x in params.items() if p != "layers.0.attn.q.kernel"}
    with pytest.raises(SpecError, match=r"original lacks layers\.0\.attn\.q"):
        attach(model, config, KEY, original=lacking)
    short = params | {"layers.0.attn.q.kernel": jnp.ones((4, 4))}
    with pytest.raises(SpecError, match=r"original has shape \[4, 4\]"):
        attach(model, config, KEY, original=short)
    other = params | {"layers.1.mlp.up.kernel": -params["layers.1.mlp.up.kernel"]}
    message = r"layers\.1\.mlp\.up: the weight is farther from the original than zeros"
    with pytest.raises(SpecError, match=message):
        attach(model, config, KEY, original=other)
    with pytest.raises(SpecError, match=r"say where they are with original="):
        attach(model, config, KEY)
    with pytest.raises(SpecError, match=r"init is 'kaiming': leave one out"):
        LoRA(original="model")


def test_kernels_layouts_are_read():
    """A model whose weights were rewritten for a device's kernels."""
    q = qjax.ops.prepack(Decoder(CONFIG, packed_params(Int(4, 32))), kind="TPU v6 lite")
    plain = Decoder(CONFIG, packed_params(Int(4, 32)))
    config = LoRA(rank=2, init="pissa", targets=("q",))
    for model in (q, plain):
        attach(model, config, KEY)
    for path, own in adapter_tree(plain).items():
        np.testing.assert_array_equal(own["a"], adapter_tree(q)[path]["a"])


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_experts_start_from_their_own_weights(init):
    model = Mixed()
    w = np.asarray(model.experts.kernel[...], np.float64)
    original = {"experts": model.experts.kernel[...]}
    recipe = qjax.Recipe((qjax.Rule("experts.*", Int(4, 8)),))
    packed = quantize_module(model, recipe, freeze=True)
    config = LoRA(rank=2, init=init, targets=("experts",))
    for module in (packed, model) if init == "pissa" else (packed,):
        q = dense(module.experts.kernel.get_value())
        attach(module, config, KEY, original=original)
        own = adapter_tree(module)["experts"]
        left = dense(module.experts.kernel.get_value())
        product = own["scale"] * np.float64(own["a"]) @ own["b"]
        wanted = w - q if init == "loftq" else w
        for e in range(3):
            u, s, v = np.linalg.svd(wanted[e])
            np.testing.assert_allclose(product[e], u[:, :2] * s[:2] @ v[:2], atol=1e-4)
        if module is model:
            np.testing.assert_allclose(left + product, w, atol=1e-5)

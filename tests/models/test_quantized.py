"""The decoder over quantized parameters: the same numbers, packed leaves, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.formats import NF4, Int
from qjax.methods import quantize
from qjax.models import Decoder, ModelConfig, from_hf
from qjax.tensor import QuantizedTensor


def _quantized(params, fmt, keep=()):
    def pack(path, leaf):
        if path.startswith("embed.") and path not in keep:
            return quantize(leaf, fmt, axis=-1, name=path)
        if path.endswith(".kernel") and path not in keep:
            return quantize(leaf, fmt, name=path)
        return leaf

    return {path: pack(path, leaf) for path, leaf in params.items()}


def _dense(params):
    return {
        path: leaf.dequantize(jnp.float32)
        if isinstance(leaf, QuantizedTensor)
        else leaf
        for path, leaf in params.items()
    }


@nnx.jit
def _run(model, tokens, cache=None):
    return model(tokens, cache)


@pytest.mark.parametrize(
    "name, fmt", [("llama-yarn-mscale", Int(4, 16)), ("gpt2", NF4(32))]
)
@jax.default_matmul_precision("float32")  # products keep float32 activations
def test_packed_model_equals_its_dequantized_self(name, fmt, golden, tensors_of):
    config = ModelConfig.from_hf(golden.CASES[name])
    params = _quantized(from_hf(config, tensors_of(name)), fmt)
    model, tokens = Decoder(config, params), golden.make_tokens()
    expected = _run(Decoder(config, _dense(params)), tokens)[0]
    logits, _ = _run(model, tokens)
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=2e-4)


def test_runs_form_where_formats_agree(golden, tensors_of):
    config = ModelConfig.from_hf(golden.CASES["llama"])
    keep = ("layers.2.mlp.down.kernel",)
    params = _quantized(from_hf(config, tensors_of("llama")), Int(4, 16), keep)
    model = Decoder(config, params)
    assert model.runs == ((0, 2), (2, 3))
    again = model.params()
    assert again.keys() == params.keys()
    for path, leaf in params.items():
        pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(again[path]), strict=True)
        assert type(again[path]) is type(leaf) or path in keep or "norm" in path
        assert all(np.array_equal(a, b) for a, b in pairs)


def test_state_holds_packed_leaves_and_gradients_skip_them(golden, tensors_of):
    config = ModelConfig.from_hf(golden.CASES["llama"])
    params = _quantized(from_hf(config, tensors_of("llama")), Int(4, 16))
    model, tokens = Decoder(config, params), golden.make_tokens()
    leaves = jax.tree.leaves(nnx.state(model))
    assert any(leaf.dtype == jnp.uint8 and leaf.shape == (3, 16, 48) for leaf in leaves)

    def loss(model):
        return -jax.nn.log_softmax(model(tokens)[0]).mean()

    grads = jax.tree.leaves(nnx.jit(nnx.grad(loss))(model))
    assert grads and all(jnp.issubdtype(g.dtype, jnp.floating) for g in grads)
    assert sum(g.size for g in grads) == 7 * 32

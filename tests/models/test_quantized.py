"""The decoder over quantized parameters: the same numbers, packed leaves, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.formats import NF4, Int
from qjax.methods import quantize
from qjax.models import Decoder, ModelConfig, from_hf
from qjax.ops import target
from qjax.ops.prepack import Prepacked
from qjax.tensor import AffineTensor, QuantizedTensor
from qjax.wrappers import Transposed


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


@pytest.mark.parametrize("name, tied", [("llama", False), ("qwen2", True)])
def test_prepacked_model_keeps_its_embedding(name, tied, golden, tensors_of):
    """Rows are gathered from the layout at rest, which a tied head multiplies by."""
    config = ModelConfig.from_hf(golden.CASES[name])
    assert config.tied == tied
    params = _quantized(from_hf(config, tensors_of(name)), Int(4, 16))
    model, tokens = Decoder(config, params), golden.make_tokens()
    packed = qjax.prepack(model)
    table = packed.embed.tokens.weight()
    assert isinstance(table, Transposed) and isinstance(table.base, AffineTensor)
    np.testing.assert_array_equal(
        packed.embed.tokens(tokens), model.embed.tokens(tokens)
    )
    rows = np.asarray(table.dequantize())[np.asarray(tokens)]
    np.testing.assert_array_equal(qjax.ops.embed(tokens, table), rows)
    expected = _run(model, tokens)[0]
    logits, _ = _run(packed, tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    with target("NVIDIA H200"):  # layouts of other devices are for other weights too
        away = qjax.prepack(model)
    kinds = [isinstance(leaf, Prepacked) for leaf in _packed_leaves(away)]
    assert any(kinds) and not isinstance(away.embed.tokens.weight().base, Prepacked)
    np.testing.assert_allclose(_run(away, tokens)[0], expected, rtol=1e-2, atol=1e-3)


def _packed_leaves(model):
    is_leaf = lambda v: isinstance(v, Prepacked)  # noqa: E731
    return jax.tree.leaves(nnx.state(model), is_leaf=is_leaf)


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

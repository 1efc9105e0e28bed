"""A rotated model computes what the original does."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import SpecError, UnsupportedError
from qjax.formats import Int
from qjax.models import Decoder, ModelConfig, from_hf
from qjax.models.rotate import (
    head_rotation,
    random_rotation,
    rotate_embeddings,
    rotate_final,
    rotate_layer,
    rotate_params,
)

quantize: Any = qjax.quantize  # typed loosely

TOKENS = jnp.array([[1, 2, 3, 4, 5, 6, 7, 8]])


def case_of(golden, tensors_of, family, **changes):
    config = ModelConfig.from_hf(golden.CASES[family] | changes)
    params: dict[str, Any] = {
        path: jnp.asarray(leaf, jnp.float32)
        for path, leaf in from_hf(config, tensors_of(family)).items()
    }
    return config, params


def logits(config, params):
    return np.asarray(Decoder(config, params, dtype=jnp.float32)(TOKENS)[0])


@pytest.mark.parametrize("n", [1, 6, 16, 24, 7])
def test_random_rotations_are_orthogonal(n):
    r = np.asarray(random_rotation(n, 3))
    np.testing.assert_allclose(r @ r.T, np.eye(n), atol=1e-5)
    np.testing.assert_array_equal(r, random_rotation(n, 3))
    if n > 1:
        assert np.abs(r - np.asarray(random_rotation(n, 4))).max() > 0.1
    if n == 16:
        np.testing.assert_allclose(np.abs(r), 0.25, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_logits_are_equal(family, golden, tensors_of):
    config, params = case_of(golden, tensors_of, family)
    rng = np.random.default_rng(0)
    for path in params:  # scales of 1 would hide a missing fold
        if path.endswith("norm.scale"):
            draw = rng.uniform(0.5, 2, params[path].shape)
            params[path] = jnp.asarray(draw, jnp.float32)
    want = logits(config, params)
    turned = rotate_params(config, params, seed=1)
    np.testing.assert_allclose(
        logits(config, turned), want, atol=1e-4 * np.abs(want).max()
    )
    w = "layers.0.mlp.up.kernel"
    assert np.abs(np.asarray(turned[w]) - np.asarray(params[w])).max() > 1e-2
    scale = np.asarray(turned["layers.0.attn_norm.scale"])
    np.testing.assert_array_equal(scale, np.ones_like(scale))


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "gpt2", "opt"])
def test_heads_rotate_in_any_family(family, golden, tensors_of):
    config, params = case_of(golden, tensors_of, family)
    want = logits(config, params)
    turned = rotate_params(config, params, seed=2, residual=False)
    np.testing.assert_allclose(
        logits(config, turned), want, atol=1e-4 * np.abs(want).max()
    )
    v = "layers.0.attn.v.kernel"
    assert np.abs(np.asarray(turned[v]) - np.asarray(params[v])).max() > 1e-3


def test_parts_make_the_whole(golden, tensors_of):
    config, params = case_of(golden, tensors_of, "llama")
    whole = rotate_params(config, params, seed=4)
    r = random_rotation(config.dim, 4)
    parts: dict = {}
    for _, part in Decoder(config, params, dtype=jnp.float32).parts():
        first = next(iter(part))
        if first.startswith("embed."):
            parts |= rotate_embeddings(config, part, r)
        elif first.startswith("layers."):
            index = int(first.split(".")[1])
            parts |= rotate_layer(config, part, r, head_rotation(config, 4, index))
        else:
            parts |= rotate_final(config, part, r, params["embed.embedding"])
    assert parts.keys() == whole.keys()
    for path, leaf in whole.items():
        np.testing.assert_array_equal(leaf, parts[path])


def test_tied_heads_and_given_rotations(golden, tensors_of):
    config, params = case_of(golden, tensors_of, "llama", tie_word_embeddings=True)
    params.pop("head.kernel", None)
    assert config.tied
    want = logits(config, params)
    r = random_rotation(config.dim, 9)
    turned = rotate_params(config, params, heads=False, rotation=r)
    assert "head.kernel" in turned
    np.testing.assert_allclose(
        logits(config, turned), want, atol=1e-4 * np.abs(want).max()
    )
    table = np.asarray(params["embed.embedding"]) @ np.asarray(r)
    np.testing.assert_allclose(turned["embed.embedding"], table, atol=1e-5)
    with pytest.raises(SpecError, match="the head is tied to the embedding; pass"):
        rotate_final(config, {"norm.scale": jnp.ones(config.dim)}, r)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("gpt2", "gpt2 model cannot be rotated: its layer norms subtract the mean"),
        ("gpt_neox", "its layer norms subtract the mean"),
        ("gemma2", "norms with scales of their own follow attention and MLP"),
    ],
)
def test_models_that_rotation_would_change_are_refused(family, text, golden):
    config = ModelConfig.from_hf(golden.CASES[family])
    with pytest.raises(UnsupportedError, match=text):
        rotate_params(config, {})


def test_messages(golden, tensors_of):
    config, params = case_of(golden, tensors_of, "llama")
    with pytest.raises(SpecError, match=r"the rotation has shape \[3, 3\], expected"):
        rotate_params(config, params, rotation=jnp.eye(3))
    path = "layers.0.attn.q.kernel"
    params[path] = quantize(params[path], Int(4, 8))
    with pytest.raises(UnsupportedError, match=f"{path} is quantized already"):
        rotate_params(config, params)

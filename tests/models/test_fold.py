"""Absorbed input scales leave a block's function as it is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import SpecError, UnsupportedError
from qjax.formats import Cast, Int
from qjax.methods import fold_into_norm, fold_into_previous
from qjax.models import Decoder, ModelConfig, from_hf
from qjax.models.fold import fold_layer, fold_params
from qjax.wrappers import InputScaled

quantize: Any = qjax.quantize  # typed loosely

FMT = Int(4, 8)
TOKENS = jnp.array([[1, 2, 3, 4, 5, 6]])


def scaled(w, s, fmt=FMT):
    """`w` as `InputScaled`, `s` being what activations are multiplied by."""
    w = jnp.asarray(w, jnp.float32)
    return InputScaled(quantize(w / s[:, None], fmt), s)


def scales(rng, n):
    return jnp.asarray(rng.uniform(0.3, 3, n), jnp.float32)


def quantized_layer(config, layer, rng, dense=()):
    """A layer as AWQ leaves it; the kernels named in `dense` are kept."""
    at_norm = {name: scales(rng, config.dim) for name in ("attn", "mlp")}
    group = config.heads // config.kv_heads
    values = scales(rng, config.kv_dim).reshape(config.kv_heads, 1, -1)
    repeated = jnp.tile(values, (1, group, 1)).reshape(-1)
    own = {"o": repeated, "down": scales(rng, config.mlp_dim)}
    out: dict[str, Any] = dict(layer)
    for path, w in layer.items():
        parts = path.split(".")
        if parts[-1] != "kernel":
            continue
        part, name = parts[-3], parts[-2]
        s = own.get(name, at_norm[part])
        out[path] = InputScaled(jnp.asarray(w), s) if name in dense else scaled(w, s)
        if name in dense:
            out[path] = jnp.asarray(w, jnp.float32)
    return out


def logits(config, params):
    """By exact activations: kernels for CPUs take them in 16-bit fixed point."""
    with jax.default_matmul_precision("float32"):
        return Decoder(config, params, dtype=jnp.float32)(TOKENS)[0]


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt"]
)
def test_decoder_computes_the_same(family, golden, tensors_of, rng):
    config = ModelConfig.from_hf(golden.CASES[family])
    params: dict[str, Any] = dict(from_hf(config, tensors_of(family)))
    layers = range(config.layers)
    for i in layers:
        layer = {p: v for p, v in params.items() if p.startswith(f"layers.{i}.")}
        params |= quantized_layer(config, layer, rng)
    if not config.tied:
        params["head.kernel"] = scaled(params["head.kernel"], scales(rng, config.dim))
    before = logits(config, params)
    params = fold_params(config, params)
    wrapped = {
        p.split(".")[-2] for p, v in params.items() if isinstance(v, InputScaled)
    }
    assert wrapped == {"o", "down"}  # what no norm precedes
    after = logits(config, params)
    size = float(jnp.max(jnp.abs(before)))
    np.testing.assert_allclose(after / size, before / size, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_dense_values_and_up_absorb_scales(family, golden, tensors_of, rng):
    config = ModelConfig.from_hf(golden.CASES[family])
    params: dict[str, Any] = dict(from_hf(config, tensors_of(family)))
    layer = {p: v for p, v in params.items() if p.startswith("layers.0.")}
    layer = quantized_layer(config, layer, rng, dense=("v", "up", "q", "k", "gate"))
    # The norm's readers stay dense, so that only v -> o and up -> down can fold.
    before = logits(config, params | layer)
    folded = fold_layer(config, layer)
    wrapped = {
        p.split(".")[-2] for p, v in folded.items() if isinstance(v, InputScaled)
    }
    linear = config.gated or config.activation == "relu"
    assert wrapped == (set() if linear else {"down"})  # gelu(s x) is not s gelu(x)
    after = logits(config, params | folded)
    size = float(jnp.max(jnp.abs(before)))
    np.testing.assert_allclose(after / size, before / size, atol=2e-5)


def test_norms_are_left_alone_unless_all_readers_agree(rng):
    w = rng.standard_normal((16, 8)).astype(np.float32)
    s, other = scales(rng, 16), scales(rng, 16)
    scale, bias = jnp.ones(16), jnp.zeros(16)
    a, b, plain = scaled(w, s), scaled(w, other), quantize(w, FMT)
    for consumers in ([a, b], [a, plain], [plain], [w], []):
        got = fold_into_norm(scale, consumers, bias=bias)
        assert got[0] is scale
        assert got[1] is bias
        assert all(x is y for x, y in zip(got[2], consumers, strict=True))
    assert fold_into_norm(None, [a])[2][0] is a
    folded, moved, consumers = fold_into_norm(scale, [a, a], bias=bias + 2, offset=1.0)
    np.testing.assert_allclose(folded + 1, 2 * s, rtol=1e-6)
    np.testing.assert_allclose(moved, 2 * s, rtol=1e-6)
    assert consumers == [a.base, a.base]


def test_a_norm_after_the_sum_absorbs_nothing(golden, rng):
    config = ModelConfig.from_hf(golden.CASES["opt"] | {"do_layer_norm_before": False})
    assert config.norm_after
    dim, mlp = config.dim, config.mlp_dim
    shapes = {"attn.q": (dim, dim), "attn.k": (dim, dim), "attn.v": (dim, dim)}
    shapes |= {"attn.o": (dim, dim), "mlp.up": (dim, mlp), "mlp.down": (mlp, dim)}
    layer = {
        f"{p}.kernel": rng.standard_normal(shape).astype(np.float32)
        for p, shape in shapes.items()
    }
    layer |= {"attn_norm.scale": jnp.ones(dim), "mlp_norm.scale": jnp.ones(dim)}
    layer = {f"layers.10.{p}": v for p, v in layer.items()}
    layer = quantized_layer(config, layer, rng)
    folded = fold_layer(config, layer)
    assert all(folded[p] is layer[p] for p in layer)


def test_messages(rng):
    k = rng.standard_normal((4, 16)).astype(np.float32)
    w = rng.standard_normal((16, 8)).astype(np.float32)
    q = scaled(w, scales(rng, 16))
    with pytest.raises(SpecError, match="expected InputScaled"):
        fold_into_previous(jnp.asarray(k), q.base)
    with pytest.raises(UnsupportedError, match="codes cannot absorb a scale exactly"):
        fold_into_previous(quantize(k, Cast()), q)
    with pytest.raises(SpecError, match="reads 16 features, expected 12 times 1/1"):
        fold_into_previous(jnp.asarray(k[:, :12]), q)
    with pytest.raises(UnsupportedError, match="query heads that share a value head"):
        fold_into_previous(jnp.asarray(k[:, :8]), q, heads=(1, 2))

"""Small models with adapters, and the same models with weights merged by NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qjax
from qjax.formats import NF4, Format
from qjax.models import Decoder, ModelConfig
from qjax.models.weights import param_shapes
from qjax.tensor import QuantizedTensor
from qjax.train.lora import adapter_tree, load_adapter_tree

SIZES = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 48,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CONFIG = ModelConfig.from_hf(SIZES)
TIED = ModelConfig.from_hf(SIZES | {"tie_word_embeddings": True})
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 48, (2, 6)), jnp.int32)
KEY = jax.random.key(7)
NF4_32 = NF4(32)
CLOSE: Any = {"rtol": 2e-4, "atol": 2e-4}


@functools.cache
def random_params(config=CONFIG) -> dict[str, Any]:
    shapes = param_shapes(config)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        path: 0.3 * jax.random.normal(key, shape) + float(len(shape) == 1)
        for (path, shape), key in zip(shapes.items(), keys, strict=True)
    }


@functools.cache
def packed_params(fmt: Format = NF4_32) -> dict[str, Any]:
    return {
        path: qjax.quantize(w, fmt) if path.endswith("kernel") else w
        for path, w in random_params().items()
    }


def logits(model) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda s, t: nnx.merge(graph, s)(t)[0])(state, TOKENS))


def shaken(model, seed=0) -> None:
    """Trained values that are not the first ones; what is padding stays zero."""
    tree = adapter_tree(model)
    rng = np.random.default_rng(seed)
    for own in tree.values():
        for name in ("a", "b", "magnitude"):
            if name in own:
                noise = rng.standard_normal(own[name].shape).astype(np.float32)
                own[name] = own[name] + 0.2 * noise
    load_adapter_tree(model, tree)


def dense(leaf) -> np.ndarray:
    if isinstance(leaf, QuantizedTensor):
        leaf = leaf.dequantize("float32")
    return np.asarray(leaf, np.float64)


def merged(model) -> Decoder:
    """The same model without adapters, its weights merged in float64."""
    params, tied = model.params(), model.head is None
    for path, own in adapter_tree(model).items():
        name = f"{path}.embedding" if path == "embed" else f"{path}.kernel"
        w = dense(params[name])
        pool = w.shape[0] // own["a"].shape[0]
        a = np.repeat(np.float64(own["a"]), pool, 0) / pool
        w = w + own["scale"] * a @ np.float64(own["b"])
        if "magnitude" in own:
            w = w * (own["magnitude"] / np.linalg.norm(w, axis=0))
        if path == "embed" and tied:
            params["head.kernel"] = jnp.asarray(dense(params[name]).T, jnp.float32)
        params[name] = jnp.asarray(w, jnp.float32)
    params = {path: jnp.asarray(dense(x), jnp.float32) for path, x in params.items()}
    return Decoder(model.config, params)


class Custom(nnx.Linear):
    """Computes something of its own."""


class Mixed(nnx.Module):
    """Layers in all kinds of places."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        line = lambda **settings: nnx.Linear(8, 8, rngs=rngs, **settings)  # noqa: E731
        self.one = line()
        self.again = self.one
        self.seq = nnx.Sequential(line(), jax.nn.relu, line(use_bias=False))
        self.held = nnx.Dict(a=line())
        self.pair = nnx.data({"b": line()})
        self.fixed = nnx.data((line(),))
        self.general = nnx.LinearGeneral((8,), (2, 4), rngs=rngs)
        self.experts = nnx.Einsum("ecd,edf->ecf", (3, 8, 8), rngs=rngs)
        self.heads = nnx.Einsum("cd,dd->c", (8, 8), rngs=rngs)
        self.table = nnx.Embed(5, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.custom = Custom(8, 8, rngs=rngs)
        self.product = line(
            dot_general=lambda *a, **k: 2 * jax.lax.dot_general(*a, **k)
        )

    def __call__(self, ids):
        x = self.again(self.one(self.table(ids)))
        x = self.fixed[0](self.pair["b"](self.held["a"](self.seq(x))))
        x = self.general(x).reshape(-1, 8)
        x = self.experts(jnp.broadcast_to(x, (3, *x.shape))).sum(0)
        return self.product(self.custom(self.conv(x[None])[0]))

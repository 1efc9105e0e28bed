"""Small models of every architecture that GGUF has, written as GGUF files."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.checkpoint import checkpoint_parts
from qjax.converters.gguf import GGUFCheckpoint
from qjax.converters.gguf_model import write_model
from qjax.converters.gguf_names import is_matrix
from qjax.converters.gguf_recipe import tensors
from qjax.formats import Ggml
from qjax.ggml import GgmlTensor
from qjax.models import Decoder, ModelConfig, from_hf, plan
from qjax.wrappers import Transposed
from tests.models.conftest import golden_module

_SCALED = {"query_pre_attn_scalar": 16}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-llama3": {},
    "llama-linear": {},
    "llama-yarn": {},
    "mistral-head-dim": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": _SCALED,
    "gemma3-old": _SCALED,
    "gemma3-new": _SCALED,
    "phi3": {},
    "phi3-partial": {},
    "phi3-long": {},
    "phi3-short": {},
    "gpt_neox": {},
    "gpt2": {},
}
"""Golden cases, and what is changed so that llama.cpp computes them."""
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-bias": ("llama", BIASED),
    "llama-long": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_scaling": {
                **golden_module.CASES["phi3-long"]["rope_scaling"],
                "original_max_position_embeddings": 8,
            },
        },
    ),
    "llama-yarn-factor": (
        "llama-yarn",
        {
            "rope_scaling": {
                **golden_module.CASES["llama-yarn"]["rope_scaling"],
                "attention_factor": 1.5,
            }
        },
    ),
    "gemma2-27b": (
        "gemma2",
        {"num_hidden_layers": 46, "query_pre_attn_scalar": 8, "hidden_size": 32},
    ),
    "gemma3-full": ("gemma3-old", {**_SCALED, "layer_types": ["full_attention"] * 3}),
    "gpt_neox-tanh": ("gpt_neox", {"hidden_act": "gelu_new"}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2-untied": ("gpt2", {"n_inner": 40, "tie_word_embeddings": False}),
}
"""Further models: a golden case and what is changed."""


def config_of(case: str, **changes: Any) -> ModelConfig:
    """The configuration of a case."""
    base, own = MORE.get(case, (case, CASES.get(case, {})))
    return ModelConfig.from_hf({**golden_module.CASES[base], **own, **changes})


def params_of(config: ModelConfig) -> dict[str, Any]:
    """Parameters of a model by path, drawn by name."""
    drawn = {
        entry.name: golden_module.make_weight(entry.name, entry.shape)
        for entry in plan(config)
        if not entry.optional
    }
    return from_hf(config, drawn)


def packed_of(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The same parameters with all matrices in blocks of q8_0."""
    paths = {
        path
        for entry, place, shape in tensors(config)
        if is_matrix(place, shape)
        for path in entry.paths
    }
    made = dict(params)
    for path in paths:
        if path == "embed.embedding":
            made[path] = Transposed(q8_0(params[path].T))
        else:
            made[path] = q8_0(params[path])
    return made


def q8_0(kernel: np.ndarray) -> GgmlTensor:
    """Rounds `[in, out]` to blocks of 32: a float16 scale, then int8 codes."""
    rows, cols = kernel.shape
    blocks = np.asarray(kernel, np.float32).reshape(-1, 32, cols)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    codes = np.rint(blocks / scale.astype(np.float32)).astype(np.int8)
    head = np.moveaxis(np.moveaxis(scale, 1, 2).copy().view(np.uint8), 2, 1)
    data = np.concatenate([head, codes.view(np.uint8)], axis=1)
    flat = jnp.asarray(data.reshape(-1, cols))
    return GgmlTensor(flat, Ggml("q8_0"), (rows, cols))


def written(
    path: Path, config: ModelConfig, params: dict[str, Any], kind: str = "f32", **more
) -> Path:
    """Writes a model without a tokenizer; all matrices in one type."""
    write_model(path, config, iter([params]), {}, lambda *_: kind, **more)
    return path


def opened(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and parameters of a GGUF file."""
    with GGUFCheckpoint(path) as source:
        config = ModelConfig.from_hf(source.config)
        return config, {
            k: v for _, part in checkpoint_parts(source) for k, v in part.items()
        }


@nnx.jit
def _logits(model: Decoder, tokens: Any) -> Any:
    return model(tokens)[0]


def logits(config: ModelConfig, params: dict[str, Any]) -> np.ndarray:
    """What a model computes for the golden tokens."""
    return np.asarray(_logits(Decoder(config, params), golden_module.make_tokens()))

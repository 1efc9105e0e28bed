"""A small quantized model with adapters and a batch, for tests of training steps."""

import functools

import jax
import numpy as np
import optax
from flax import nnx

import qjax
from qjax.abstract import abstract_decoder
from qjax.models import Decoder, ModelConfig, param_shapes
from qjax.train.lora import LoRA, attach
from qjax.train.optimizers import relaxed
from qjax.train.step import Step

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "attention_bias": True,
}
ROWS, TIME = 8, 16


def model(recipe="nf4", **lora):
    """A packed model with adapters that are not zero, the same at every call."""
    return nnx.clone(_model(recipe, **lora))


@functools.cache
def _model(recipe, **lora):
    config = ModelConfig.from_hf(CONFIG)
    rng = np.random.default_rng(0)
    params = {
        path: (rng.standard_normal(shape) * 0.1).astype(np.float32)
        for path, shape in param_shapes(config).items()
    }
    made = qjax.quantize_model(Decoder(config, params), recipe)
    attach(made, LoRA(rank=4, **lora), jax.random.key(1))
    for path, leaf in nnx.to_flat_state(nnx.state(made, nnx.LoRAParam)):
        if path[-1] == "b":
            value = rng.standard_normal(leaf.get_value().shape).astype(np.float32)
            leaf.set_value(jax.numpy.asarray(value * 0.05))
    return made


def shapes(recipe="nf4", **lora):
    """Such a model without arrays."""
    return abstract_decoder(
        ModelConfig.from_hf(CONFIG),
        recipe,
        change=lambda made: attach(made, LoRA(rank=4, **lora), jax.random.key(1)),
    )


def batch(rows=ROWS, first=0):
    """Some rows of a batch."""
    rng = np.random.default_rng(1)
    shape, own = (1, ROWS, TIME), slice(first, first + rows)
    tokens, targets = (rng.integers(0, 320, shape, np.int32) for _ in range(2))
    weights = (rng.random(shape) > 0.3).astype(np.float32)
    positions = np.broadcast_to(np.arange(TIME, dtype=np.int32), shape)
    arrays = {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "positions": positions,
        "segments": np.ones(shape, np.int32),
    }
    return {name: array[:, own] for name, array in arrays.items()}


def step_of(made, mesh=None):
    """A step with AdamW after clipping."""
    clip, adamw = optax.clip_by_global_norm(1.0), optax.adamw(1e-2)
    return Step(made, relaxed(optax.chain(clip, adamw)), mesh=mesh)


def steps(step, rows, count=2):
    """The state after some steps, and what each measured."""
    state, measured = step.init(jax.random.key(0)), []
    for _ in range(count):
        state, metrics = step(state, step.frozen, rows)
        measured.append([float(metrics.loss), float(metrics.grad_norm)])
    return state, measured

"""What a program's memory is for, and the least time that its work takes.

Temporaries of devices without a compiler are estimated from what the largest of them
are: saved inputs of blocks, one block's activations, logits of a chunk, gradients. The
estimate is on the high side: it adds what compilers share.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.devices import Device
from qjax.models import ModelConfig
from qjax.models.attention import MAX_SCORES
from qjax.nn.qat import Learned
from qjax.tensor import QuantizedTensor
from qjax.train.metrics import flops_per_token
from qjax.train.offload import peak_bytes


@dataclasses.dataclass(frozen=True)
class Parts:
    """Memory of one device.

    Attributes:
      bytes: By what it is for.
      host: Bytes in the host's memory.
      compiled: Whether a compiler said so.
    """

    bytes: dict[str, int]
    host: int
    compiled: bool


def shard_bytes(tree: Any) -> int:
    """Bytes of arrays on one device, without those that are on the host."""
    return sum(_bytes(x) for x in jax.tree.leaves(tree) if not _on_host(x))


def host_bytes(tree: Any) -> int:
    """Bytes of arrays that are on the host, for one device."""
    return sum(_bytes(x) for x in jax.tree.leaves(tree) if _on_host(x))


def weight_bytes(state: Any) -> dict[str, int]:
    """Bytes of a model's variables on one device, by kind."""
    found: dict[str, int] = {"packed weights": 0, "scales": 0, "dense weights": 0}
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    for leaf in leaves:
        if not isinstance(leaf, QuantizedTensor):
            found["dense weights"] += shard_bytes(leaf)
            continue
        for path, part in jax.tree.leaves_with_path(leaf):
            names = [getattr(key, "name", "") for key in path]
            codes = names[-1] == "codes" and "scale" not in names
            found["packed weights" if codes else "scales"] += shard_bytes(part)
    return found


def trained_bytes(state: Any) -> dict[str, int]:
    """Bytes of what is trained on one device, by kind."""
    found = {"trained weights": 0, "learned scales": 0, "adapters": 0}
    for _, variable in nnx.to_flat_state(state):
        kind = "trained weights"
        if isinstance(variable, Learned | nnx.LoRAParam):
            kind = "learned scales" if isinstance(variable, Learned) else "adapters"
        found[kind] += shard_bytes(variable)
    return {kind: size for kind, size in found.items() if size}


def compiled_parts(arguments: dict[str, int], memory: Any) -> Parts:
    """Parts of a compiled program.

    Args:
      arguments: Bytes of what it takes, by kind.
      memory: Its `memory_analysis()`.
    """
    temporaries = memory.temp_size_in_bytes
    program = memory.generated_code_size_in_bytes
    rest = peak_bytes(memory) - temporaries - program - sum(arguments.values())
    found = {**arguments, "padding and results": rest, "temporaries": temporaries}
    host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    host += memory.host_output_size_in_bytes - memory.host_alias_size_in_bytes
    return Parts({**found, "program": program}, host, True)


def train_temporaries(
    config: ModelConfig, rows: int, context: int, chunk: int, gradient: int, layer: int
) -> int:
    """Bytes that a training step needs beside its arguments, estimated.

    Args:
      config: The model.
      rows: Rows of a device.
      context: Tokens of a row.
      chunk: Tokens whose logits exist at a time.
      gradient: Bytes of the gradient.
      layer: Bytes of a layer that is gathered.
    """
    tokens = rows * context
    saved = 2 * config.layers * tokens * config.dim
    return saved + gradient + layer + _working(config, rows, context, chunk, 3)


def rounding_temporaries(config: ModelConfig, tensor: int) -> int:
    """Bytes of one layer's weights while they are rounded, in training for a format.

    In float32: gathered, merged with adapters, decoded again, and their gradient.

    Args:
      config: The model.
      tensor: Devices that share its heads and hidden features.
    """
    heads = config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    mlp = config.mlp_dim * (3 if config.gated else 2)
    return 4 * 4 * config.dim * (heads + mlp) // tensor


def serve_temporaries(config: ModelConfig, rows: int, length: int) -> int:
    """The same of generation, without its cache."""
    part = min(length, 512)
    return _working(config, rows, part, rows, 1) + rows * config.vocab_size


def _working(
    config: ModelConfig, rows: int, time: int, logits: int, copies: int
) -> int:
    """Bytes of one block's activations, or of logits, whichever is more."""
    width = 4 * config.dim + 2 * config.q_dim + 2 * config.kv_dim + 3 * config.mlp_dim
    scores = min(MAX_SCORES, rows * config.heads * time * time)
    block = copies * (2 * rows * time * width // 2 + 4 * scores)
    return max(block, copies * 4 * min(logits, rows * time) * config.vocab_size)


def train_bound(
    config: ModelConfig, context: int, device: Device, *, frozen: bool = True
) -> float:
    """Tokens per second of one device at its peak: forward, again, and backward.

    Args:
      config: The model.
      context: Tokens of a row.
      device: The device.
      frozen: Whether weights have no gradient, as under adapters.
    """
    again = flops_per_token(config, context, frozen=True) / 2
    work = flops_per_token(config, context, frozen=frozen) + again
    return device.flops / work


def decode_bound(config: ModelConfig, rows: int, parts: Parts, device: Device) -> float:
    """Tokens per second of all rows when decoding reads weights and cache once."""
    table = 0 if config.tied else config.vocab_size * config.dim * 2
    read = sum(parts.bytes.get(k, 0) for k in ("packed weights", "scales", "cache"))
    read += max(parts.bytes["dense weights"] - table, 0)
    step = flops_per_token(config, 1, frozen=True) / 2 * rows
    return rows / max(read / device.bandwidth, step / device.flops)


def _bytes(x: Any) -> int:
    where = getattr(x, "sharding", None)
    shape = x.shape if where is None else where.shard_shape(x.shape)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return 8 * math.prod(shape)
    return math.prod(shape) * jnp.dtype(x.dtype).itemsize


def _on_host(x: Any) -> bool:
    where = getattr(x, "sharding", None)
    return getattr(where, "memory_kind", None) == "pinned_host"

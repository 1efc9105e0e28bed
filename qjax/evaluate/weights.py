"""What a model's weights tell without running it: size by part, error by tensor.

Costs: layers are taken out of their stacks one at a time, and at most one matrix is
dense at once.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import SpecError
from qjax.models import Decoder
from qjax.models.layers import leaves_of
from qjax.tensor import QuantizedTensor

_PARTS = {"embed": "embedding", "attn": "attention", "mlp": "MLP", "head": "head"}


def memory_by_component(model: Decoder) -> dict[str, int]:
    """Return the bytes of a decoder's parts in memory: codes, scales and all.

    Returns:
        Bytes of `embedding`, `attention`, `MLP`, `head`, `norms`, as far as present.
    """
    return by_component({path: int(leaf.nbytes) for path, leaf in _leaves(model)})


def by_component(nbytes: Mapping[str, int]) -> dict[str, int]:
    """Sum bytes of tensors, given by name, as `memory_by_component` does."""
    sizes: dict[str, int] = {}
    for path, size in nbytes.items():
        words = path.split(".")
        part = next((_PARTS[word] for word in words if word in _PARTS), "other")
        if any(word.endswith("norm") for word in words):
            part = "norms"
        sizes[part] = sizes.get(part, 0) + size
    order = [*_PARTS.values(), "norms", "other"]
    return {part: sizes[part] for part in order if part in sizes}


def bits_per_weight(model: Decoder) -> tuple[float, int]:
    """Return all stored bits over all parameters, and the stored bytes."""
    sizes = [(int(leaf.nbytes), math.prod(leaf.shape)) for _, leaf in _leaves(model)]
    stored, count = (sum(column) for column in zip(*sizes, strict=True))
    return 8 * stored / count, stored


def compare_weights(model: Decoder, baseline: Decoder) -> list[dict[str, Any]]:
    """Return the error of every quantized tensor against the original.

    Args:
        model: The quantized model.
        baseline: The model it was made from.

    Returns:
        One dict per tensor that is packed in `model` but not in `baseline`: `name`,
        `format`, `bits_per_weight`, `error = |W - W_q| / |W|` (Frobenius).

    Raises:
        SpecError: A tensor differs in shape, or is in one model only.
    """
    tensors = []
    for (path, leaf), (other, original) in zip(
        _leaves(model), _leaves(baseline), strict=False
    ):
        if path != other or leaf.shape != original.shape:
            raise SpecError(
                f"compare: {path} {tuple(leaf.shape)} in the model meets {other} "
                f"{tuple(original.shape)} in the baseline; compare a model with the "
                "one it was made from"
            )
        if isinstance(leaf, QuantizedTensor) and not isinstance(
            original, QuantizedTensor
        ):
            tensors.append(
                {
                    "name": path,
                    "format": leaf.format.name,
                    "bits_per_weight": leaf.bits_per_weight,
                    "error": float(_error(leaf, original)),
                }
            )
    return tensors


def choose_tensor(tensors: Sequence[dict[str, Any]], name: str | None) -> str:
    """Return the full name of a tensor: the one asked for, or the worst.

    Raises:
        SpecError: No quantized tensor has that name; near matches are listed.
    """
    if name is None:
        return max(tensors, key=lambda tensor: tensor["error"])["name"]
    names = [tensor["name"] for tensor in tensors]
    for candidate in (name, f"{name}.kernel"):
        if candidate in names:
            return candidate
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    raise SpecError(
        f"report: no quantized tensor is called {name!r}; did you mean "
        f"{', '.join(near)}?"
    )


def dense_matrix(model: Decoder, name: str) -> np.ndarray:
    """Return one tensor of a model as a float32 matrix."""
    for path, leaf in _leaves(model):
        if path == name:
            return np.asarray(_dense(leaf), np.float32)
    raise SpecError(f"report: the model has no tensor {name!r}")


def _leaves(model: Decoder) -> Iterator[tuple[str, Any]]:
    """Yield path and value of every parameter, layer by layer."""
    for path, leaf in leaves_of(model.embed).items():
        yield f"embed.{path}", leaf
    for layer, block, _ in model.blocks():
        for path, leaf in leaves_of(block).items():
            yield f"layers.{layer}.{path}", leaf
    for name, module in (("norm", model.norm), ("head", model.head)):
        if module is not None:
            for path, leaf in leaves_of(module).items():
                yield f"{name}.{path}", leaf


def _dense(leaf: Any) -> Any:
    if isinstance(leaf, QuantizedTensor):
        return leaf.dequantize(jnp.float32)
    return jnp.asarray(leaf, jnp.float32)


@jax.jit
def _error(leaf: Any, original: Any) -> Any:
    """Return the relative error in Frobenius norm; 0 for a zero matrix."""
    original = _dense(original)
    norm = jnp.linalg.norm(original)
    error = jnp.linalg.norm(_dense(leaf) - original)
    return jnp.where(norm > 0, error / jnp.where(norm > 0, norm, 1.0), error)

"""Adapters over a model, not merged into packed weights.

A packed weight with an adapter is `LowRank(base, a, s b)`; with magnitudes (DoRA) its
columns are scaled, `Transposed(InputScaled(Transposed(...), m / norm))`: the norm of
`W + s a b` is a constant then, as DoRA has it in its gradient. A dense weight takes the
adapter in: `W + s a b` in float32, rounded to its dtype once.

A tensor of several weights (`qkv_proj`, `gate_up_proj`) has one adapter: its weights
share `a`, and each has its columns of `b`.
"""

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.converters.peft import Adapter, Factors
from qjax.errors import FormatError, UnsupportedError
from qjax.models import Decoder, Entry, ModelConfig, plan
from qjax.models.layouts import LAYOUTS
from qjax.models.weights import EMBEDDING, HEAD
from qjax.tensor import QuantizedTensor
from qjax.wrappers import InputScaled, LowRank, Transposed

_log = logging.getLogger(__name__)
FOLDING = ("AWQ", "SmoothQuant")
"""Methods whose input scales norms may have absorbed."""
Parts = Iterable[tuple[Any, Mapping[str, Any]]]


def attach(model: Decoder, adapter: Adapter) -> Decoder:
    """A model with an adapter applied; see the module's header.

    Args:
      model: the base model.
      adapter: from `qjax.converters.peft.read_adapter`.

    Returns:
      A new model; weights without an adapter are those of `model`.

    Raises:
      FormatError: the adapter has layers that the model does not, or other shapes.
      UnsupportedError: the base was transformed after the adapter had been trained.
    """
    recipe = None if model.assets is None else model.assets.recipe
    params: dict[str, Any] = {}
    for _, part in attached(model.config, model.parts(), adapter, recipe):
        params |= part
    made = Decoder(model.config, params, dtype=model.dtype)
    made.assets = model.assets
    return made


def attached(
    config: ModelConfig, parts: Parts, adapter: Adapter, recipe: str | None = None
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The same as `attach`, part by part.

    Args:
      config: the base model.
      parts: names of parts and their parameters by path, the embeddings first.
      adapter: the adapter.
      recipe: JSON of the recipe that the base was quantized with, or None.

    Yields:
      The same names with the adapted parameters. A tied head that no longer equals the
      embedding comes last, in a part of its own.

    Raises:
      FormatError, UnsupportedError: see `attach`.
    """
    _check_recipe(recipe)
    factors, saved, base = _by_path(config, adapter)
    tied = True
    embedding: Any = None
    counts = {"packed": 0, "dense": 0}

    def apply(path: str, leaf: Any) -> Any:
        for tensors in (base, saved):
            if path in tensors:
                leaf = jnp.asarray(tensors[path]).astype(leaf.dtype)
        if path in factors:
            packed = isinstance(leaf, QuantizedTensor)
            counts["packed" if packed else "dense"] += 1
            leaf = _adapted(leaf, factors[path])
        return leaf

    if config.tied and HEAD in base:
        base.setdefault(EMBEDDING, base[HEAD].T)
    for layer, part in parts:
        tied &= HEAD not in part
        if EMBEDDING in part:
            embedding = part[EMBEDDING]
        yield layer, {path: apply(path, leaf) for path, leaf in part.items()}
    changed = {EMBEDDING, HEAD} & (factors.keys() | saved.keys())
    if tied and changed:
        base.pop(HEAD, None)
        if EMBEDDING in base:
            embedding = jnp.asarray(base[EMBEDDING]).astype(embedding.dtype)
        yield None, {HEAD: apply(HEAD, _turned(embedding))}
    _log.info(
        "adapter: over %d packed weights, merged into %d dense ones%s",
        counts["packed"],
        counts["dense"],
        "; the head is no longer tied to the embedding" if tied and changed else "",
    )


def _check_recipe(recipe: str | None) -> None:
    """Refuses a base whose inputs of layers are not those of the original model."""
    spec = json.loads(recipe) if recipe else None
    rotated = isinstance(spec, Mapping) and spec.get("rotate") is not None
    if rotated or any(f'"kind": "{kind}"' in json.dumps(spec) for kind in FOLDING):
        raise UnsupportedError(
            "adapter: the base model was rotated, or scales were folded into its "
            "norms, when it was quantized; an adapter of the original does not fit. "
            "Quantize with a recipe that leaves activations as they are"
        )


def _by_path(
    config: ModelConfig, adapter: Adapter
) -> tuple[dict[str, Factors], dict[str, Any], dict[str, Any]]:
    """Factors, replacing tensors and those of the base by path of the parameter."""
    names = _names(config)
    wanted = [f"{name}.weight" for name in adapter.layers]
    wanted += [*adapter.saved, *adapter.base]
    if unknown := [name for name in wanted if name not in names]:
        raise FormatError(
            f"adapter: {len(unknown)} of {len(wanted)} tensors are for weights that "
            f"this {config.family} model does not have, for example "
            f"{unknown[0]!r:.200}"
        )
    factors: dict[str, Factors] = {}
    for name, own in adapter.layers.items():
        factors |= _pieces(names[f"{name}.weight"], own, name)
    whole: list[dict[str, Any]] = [{}, {}]
    for made, tensors in zip(whole, (adapter.saved, adapter.base), strict=True):
        for name, tensor in tensors.items():
            if tensor.shape != names[name].shape:
                raise FormatError(
                    f"adapter: {name} has shape {list(tensor.shape)}, expected "
                    f"{list(names[name].shape)}; a vocabulary that was resized does "
                    "not fit the base model"
                )
            made |= names[name].read(tensor)
    return factors, whole[0], whole[1]


def _names(config: ModelConfig) -> dict[str, Entry]:
    """Tensors of the model by every name that checkpoints have for them."""
    layout = LAYOUTS[config.family]
    found: dict[str, Entry] = {}
    for entry in plan(config):
        tail = entry.name.removeprefix(layout.base)
        inside = tail != entry.name or not layout.base
        others = [base + tail for base in layout.bases] if inside else []
        for name in (entry.name, *entry.aliases, *others):
            found.setdefault(name, entry)
    return found


def _pieces(entry: Entry, own: Factors, name: str) -> dict[str, Factors]:
    """The factors of each weight that a tensor holds."""
    rows = entry.shapes[0][0]
    cols = sum(shape[-1] for shape in entry.shapes)
    if len(entry.shape) != 2 or (own.a.shape[0], own.b.shape[1]) != (rows, cols):
        raise FormatError(
            f"adapter: {name:.200} is for a weight [{own.a.shape[0]}, "
            f"{own.b.shape[1]}], the model has [{rows}, {cols}]"
        )

    def split(x: np.ndarray) -> dict[str, Any]:
        return entry.read(x.T if entry.kind.transposed else x)

    b = split(own.b)
    norms = {} if own.magnitude is None else split(own.magnitude[None])
    return {
        path: dataclasses.replace(
            own, b=part, magnitude=norms[path][0] if norms else None
        )
        for path, part in b.items()
    }


def _adapted(leaf: Any, own: Factors) -> Any:
    """One weight `[in, out]` with its adapter."""
    a = jnp.asarray(own.a).astype(jnp.float32)
    b = jnp.asarray(own.b).astype(jnp.float32) * np.float32(own.scaling)
    packed = isinstance(leaf, QuantizedTensor)
    if packed:
        q = LowRank(leaf, a, b)
        if own.magnitude is None:
            return q
        scale = _column_scale(q.dequantize(jnp.float32), own.magnitude)
        return Transposed(InputScaled(Transposed(q), scale))
    w = jnp.asarray(leaf).astype(jnp.float32)
    w = w + jnp.matmul(a, b, precision="highest")
    if own.magnitude is not None:
        w = w * _column_scale(w, own.magnitude)
    return w.astype(leaf.dtype)


def _column_scale(w: Any, magnitude: Any) -> Any:
    """What gives every column of `w` its magnitude; a column of zeros stays one."""
    norm = jnp.sqrt(jnp.sum(w * w, axis=0))
    wanted = jnp.asarray(magnitude).astype(jnp.float32)
    return jnp.where(norm > 0, wanted / jnp.where(norm > 0, norm, 1), 0)


def _turned(embedding: Any) -> Any:
    """The head `[dim, vocab]` that is tied to a table of embeddings."""
    if isinstance(embedding, Transposed):
        return embedding.base
    if isinstance(embedding, QuantizedTensor):
        return Transposed(embedding)
    return jnp.asarray(embedding).T

"""Adapters over a model, not merged into packed weights.

A packed weight with an adapter is `LowRank(base, a, s b)`; with magnitudes (DoRA) its
columns are scaled, `Transposed(InputScaled(Transposed(...), m / norm))`: the norm of
`W + s a b` is a constant then, as DoRA has it in its gradient. A dense weight takes the
adapter in: `W + s a b` in float32, rounded to its dtype once.

A tensor of several weights (`qkv_proj`, `gate_up_proj`) has one adapter: its weights
share `a`, and each has its columns of `b`.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
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
CHANGED = "changed_for_adapter"
"""Key of a recipe whose weights were changed for one adapter."""
Parts = Iterable[tuple[Any, Mapping[str, Any]]]
Adapt = Callable[[str, Any, Factors], Any]


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
    config: ModelConfig,
    parts: Parts,
    adapter: Adapter,
    recipe: str | None = None,
    adapt: Adapt | None = None,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The same as `attach`, part by part.

    Args:
      config: the base model.
      parts: names of parts and their parameters by path, the embeddings first.
      adapter: the adapter.
      recipe: JSON of the recipe that the base was quantized with, or None.
      adapt: what makes the adapted weight of path, weight and factors; by default
        `adapted`.

    Yields:
      The same names with the adapted parameters. A tied head that no longer equals the
      embedding comes last, in a part of its own.

    Raises:
      FormatError, UnsupportedError: see `attach`.
    """
    check_recipe(recipe, adapter)
    factors, saved, base = by_path(config, adapter)
    adapt = adapt or (lambda _, leaf, own: adapted(leaf, own))
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
            leaf = adapt(path, leaf, factors[path])
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


def recipe_digest(recipe: str | None) -> str | None:
    """Digest of a recipe that an adapter of the original model does not fit, or None.

    Args:
      recipe: its JSON, or None.
    """
    spec = json.loads(recipe) if recipe else None
    text = json.dumps(spec, sort_keys=True)
    keys = spec if isinstance(spec, Mapping) else {}
    changed = any(keys.get(key) is not None for key in ("rotate", CHANGED))
    if changed or any(f'"kind": "{kind}"' in text for kind in FOLDING):
        return hashlib.sha256(text.encode()).hexdigest()
    return None


def changed_recipe(recipe: str | None, why: Mapping[str, Any]) -> str:
    """The recipe of a base that was changed for an adapter (PiSSA, LoftQ's rounds).

    Args:
      recipe: JSON of the recipe that the base was quantized with, or None.
      why: what it was changed for, JSON-ready.
    """
    spec = json.loads(recipe) if recipe else None
    return json.dumps({**(spec or {}), CHANGED: why})


def check_recipe(recipe: str | None, adapter: Adapter) -> None:
    """Refuses a base that is not what the adapter was trained over.

    Args:
      recipe: JSON of the recipe that the base was quantized with, or None.
      adapter: the adapter.
    """
    digest = recipe_digest(recipe)
    if digest == adapter.trained_over:
        return
    if adapter.trained_over is not None:
        raise UnsupportedError(
            "adapter: it was trained over a base that was rotated, had scales folded "
            "into its norms, or was changed for it (PiSSA, LoftQ); it fits no other "
            "base: give the one that it was trained over"
        )
    raise UnsupportedError(
        "adapter: the base model was rotated, or scales were folded into its norms, "
        "when it was quantized, or it was changed for another adapter (PiSSA, LoftQ); "
        "an adapter of the original does not fit. Quantize with a recipe that leaves "
        "activations as they are"
    )


def by_path(
    config: ModelConfig, adapter: Adapter
) -> tuple[dict[str, Factors], dict[str, Any], dict[str, Any]]:
    """Factors, replacing tensors and those of the base by path of the parameter.

    Args:
      config: the base model.
      adapter: the adapter.

    Raises:
      FormatError: the adapter has layers that the model does not, or other shapes.
    """
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
    if len(entry.shape) != 2 or (own.inputs, own.b.shape[1]) != (rows, cols):
        raise FormatError(
            f"adapter: {name:.200} is for a weight [{own.inputs}, "
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


def adapted(leaf: Any, own: Factors) -> Any:
    """One weight `[in, out]` with its adapter; packed codes stay what they are."""
    if not isinstance(leaf, QuantizedTensor):
        return merged(jnp.asarray(leaf), own).astype(leaf.dtype)
    q = LowRank(leaf, *_product(own))
    if own.magnitude is None:
        return q
    scale = _column_scale(q.dequantize(jnp.float32), own.magnitude)
    return Transposed(InputScaled(Transposed(q), scale))


def merged(w: Any, own: Factors) -> Any:
    """The dense weight `[in, out]` with its adapter, float32."""
    a, b = _product(own)
    w = w.astype(jnp.float32) + jnp.matmul(a, b, precision="highest")
    if own.magnitude is None:
        return w
    return w * _column_scale(w, own.magnitude)


def _product(own: Factors) -> tuple[Any, Any]:
    """Factors `[in, r]` and `[r, out]` whose product is added, float32."""
    a = jnp.asarray(own.plain().a).astype(jnp.float32)
    return a, jnp.asarray(own.b).astype(jnp.float32) * np.float32(own.scaling)


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

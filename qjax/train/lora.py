"""Adapters of a model: put on, taken off, in and out as arrays by path.

`qjax.train.lora_targets` decides where adapters go, `lora_own` what they start with,
`lora_place` puts them there; `qjax.nn.lora` computes with them. Nothing is adapted
silently: `attach` reports every weight, and a target that names none is an error.

Costs: the factors in float32; DoRA, `pissa` and `loftq` decode one weight at a time.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from qjax.converters.adapters import changed_recipe
from qjax.errors import SpecError
from qjax.nn.lora import without_adapter
from qjax.train.lora_config import FROM_WEIGHTS
from qjax.train.lora_config import AttachReport as AttachReport
from qjax.train.lora_config import LoRA as LoRA
from qjax.train.lora_own import first, given
from qjax.train.lora_place import install
from qjax.train.lora_sites import sites
from qjax.train.lora_targets import Targets
from qjax.train.sources import parts_of


def attach(
    model: Any, config: LoRA, key: Array, *, original: Any = None
) -> AttachReport:
    """Puts adapters on a model, in place.

    Args:
      model: A `Decoder`, or any NNX module; weights may be packed.
      config: The settings.
      key: PRNG key of the first values; those of a weight do not depend on the others.
      original: For `init="loftq"` and `"pissa"`: the weights before they were
        quantized, by path as `Decoder.params` gives them; a `Decoder`; or where one
        lies on disk, which is read layer by layer. `config.original` by default.

    Returns:
      What was adapted, and what was not.

    Raises:
      SpecError: A target names nothing (near names are listed), adapters are there
        already, the settings do not fit a weight, or the original is another model's.
      UnsupportedError: A kind of weight cannot have this variant.

    Example:
      >>> report = qjax.train.attach(model, LoRA(rank=8), jax.random.key(0))
    """
    found = sites(model)
    if taken := [site.paths[0] for site in found if site.adapter is not None]:
        raise SpecError(
            f"attach: {taken[0]} has an adapter already; detach, or merge it, first"
        )
    targets = Targets(found, config.targets, config.exclude)
    ranks = targets.setting("rank_pattern", config.rank_pattern, config.rank)
    alphas = targets.setting("alpha_pattern", config.alpha_pattern, config.alpha)
    owns: dict[str, Any] = {}
    wanted = {
        path: (site, index)
        for site in found
        for index, path in enumerate(site.paths)
        if path in ranks
    }
    for part in _originals(original, config):
        for path, place in wanted.items():
            if part is None or path in part:
                numbers, own = (ranks[path], alphas[path]), part and part[path]
                owns[path] = first(*place, config, numbers, key, own)
    if lacking := [path for path in wanted if path not in owns]:
        raise SpecError(
            f"attach: the original lacks {lacking[0]}; pass the model that it was "
            "quantized from"
        )
    modules = tuple(install(found, owns))
    if any(one.base != "kept" for one in modules):
        _mark(model, config)
    return AttachReport(modules, tuple(targets.kept.items()))


def _mark(model: Any, config: LoRA) -> None:
    """Notes in a model's recipe that its weights fit these adapters only."""
    assets = getattr(model, "assets", None)
    if assets is not None:
        why = dataclasses.asdict(dataclasses.replace(config, original=None))
        recipe = changed_recipe(assets.recipe, why)
        model.assets = dataclasses.replace(assets, recipe=recipe)


def detach(model: Any) -> None:
    """Takes the adapters off a model, in place; its weights are what they were.

    After `init="pissa"`, or LoftQ's with rounds, the weights are those that the
    adapters were trained over.

    Raises:
      SpecError: The model has none.
    """
    found = [site for site in sites(model) if site.adapter is not None]
    if not found:
        raise SpecError("detach: the model has no adapters")
    for site in found:
        site.replace(without_adapter(site.layer))


def adapter_tree(model: Any) -> dict[str, dict[str, Any]]:
    """The adapters of a model by the path of their weight.

    Returns:
      For `"layers.3.attn.q"` and so on: float32 `a [in / pool, rank]` and `b [rank,
      out]`, with DoRA `magnitude [out]`; and `rank`, `alpha` and `scale`.

    Raises:
      SpecError: The model has no adapters.
    """
    tree: dict[str, dict[str, Any]] = {}
    for site in sites(model):
        lora = site.adapter
        if lora is None:
            continue
        names = ("a", "b", "magnitude", "rank", "alpha", "scale")
        held = {name: getattr(lora, name) for name in names}
        arrays = {
            n: np.asarray(v.get_value()) for n, v in held.items() if v is not None
        }
        for index, path in enumerate(site.paths):
            own = {n: x[index] if site.stacked else x for n, x in arrays.items()}
            rank = int(own["rank"].reshape(-1)[0])
            if rank == 0:
                continue
            numbers = {"rank": rank}
            numbers |= {n: float(own[n].reshape(-1)[0]) for n in ("alpha", "scale")}
            tree[path] = own | numbers
            tree[path] |= {"a": own["a"][..., :rank], "b": own["b"][..., :rank, :]}
    if not tree:
        raise SpecError("adapter_tree: the model has no adapters; attach some first")
    return tree


def load_adapter_tree(
    model: Any, tree: Mapping[str, Mapping[str, Any]], *, dropout: float = 0.0
) -> AttachReport:
    """Puts adapters of `adapter_tree` on a model, in place of those it has.

    Args:
      model: The model that they belong to.
      tree: The adapters.
      dropout: See `LoRA`, for further training.

    Raises:
      SpecError: The tree is empty or does not fit the model.
    """
    found = [site for site in sites(model) if not site.reason]
    places = {
        path: (site, index) for site in found for index, path in enumerate(site.paths)
    }
    unknown = sorted(tree.keys() - places.keys())
    if unknown or not tree:
        raise SpecError(
            f"load_adapter_tree: {unknown[0]!r} is no weight of this model that can "
            f"have an adapter; it has {', '.join(list(places)[:5])}"
            if unknown
            else "load_adapter_tree: there are no adapters"
        )
    owns = {path: given(*places[path], own, dropout) for path, own in tree.items()}
    kept = {path: "not in the tree" for path in places if path not in owns}
    return AttachReport(tuple(install(found, owns)), tuple(kept.items()))


def _originals(original: Any, config: LoRA) -> Iterator[Mapping[str, Any] | None]:
    """Weights before quantization by our path, part by part; None where none count."""
    original = config.original if original is None else original
    if config.init not in FROM_WEIGHTS or (config.init, original) == ("pissa", None):
        yield None
        return
    if original is None:
        raise SpecError(
            "attach: init='loftq' repairs rounding and needs the weights before it; "
            "say where they are with original=, the model that was quantized"
        )
    with contextlib.ExitStack() as stack:
        mapped = isinstance(original, Mapping)
        for _, part in [(0, original)] if mapped else parts_of(stack, original):
            yield {
                path.removesuffix(".kernel").removesuffix(".embedding"): w
                for path, w in part.items()
            }

"""Adapters of single weights joined to those of layers, and put on a model.

Layers of a scanned stack have factors of one shape: those of smaller rank are padded
with zeros, which have no gradient, and layers that are not adapted have the factor 0.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.errors import UnsupportedError
from qjax.nn.base import as_variable
from qjax.nn.lora import ADAPTED, Adapter, without_adapter
from qjax.train.lora_config import AdaptedModule
from qjax.train.lora_own import Own
from qjax.train.lora_sites import Site


def install(found: Sequence[Site], owns: Mapping[str, Own]) -> list[AdaptedModule]:
    """Puts adapters on a model, in place of those it has; first checks them all.

    Args:
      found: `sites` of the model.
      owns: The adapters by path.

    Returns:
      What was adapted.

    Raises:
      UnsupportedError: Weights of one stack have different kinds of adapters.
    """
    ready: list[tuple[Site, Any]] = []
    modules = []
    for site in found:
        here = [owns.get(path) for path in site.paths]
        if any(own is not None for own in here):
            ready.append((site, _layer(site, here)))
        elif site.adapter is not None:
            ready.append((site, without_adapter(site.layer)))
        for path, own in zip(site.paths, here, strict=True):
            if own is not None:
                numbers = (own.rank, own.alpha, own.parameters, own.change)
                modules.append(AdaptedModule(path, site.shape(), *numbers))
    for site, layer in ready:
        site.replace(layer)
    return modules


def _layer(site: Site, here: Sequence[Own | None]) -> Any:
    """A layer with its adapters."""
    lora = _adapter(site, here)
    layer = site.converted()
    if site.adapter is not None:
        layer = without_adapter(layer)
    made = ADAPTED[type(layer)](layer, lora)
    if any(own is not None and own.base is not None for own in here):
        setattr(made, made.weight_name, as_variable(_base(site, here)))
    return made


def _base(site: Site, here: Sequence[Own | None]) -> Any:
    """The weight below adapters, of a stack the others as they are."""
    bases = [
        site.leaf(index) if own is None or own.base is None else own.base
        for index, own in enumerate(here)
    ]
    value = bases[0]
    if site.stacked:
        value = jax.tree.map(lambda *parts: jnp.stack(parts), *bases)
    return site.unmatrix(value)


def _adapter(site: Site, here: Sequence[Own | None]) -> Adapter:
    """The adapters of one layer, those of a stack padded to one rank."""
    present = [own for own in here if own is not None]
    first = present[0]
    _check_alike(site, here)
    rank = max(own.rank for own in present)
    none = dataclasses.replace(
        first, a=first.a[..., :0], b=first.b[..., :0, :], scale=0.0, alpha=0.0
    )
    owns = [own or none for own in here]

    def padded(x: Array, axis: int) -> Array:
        width = [(0, 0)] * x.ndim
        width[axis] = (0, rank - x.shape[axis])
        return jnp.pad(x, width)

    def joined(parts: Sequence[Any]) -> Array:
        return jnp.stack(parts) if site.stacked else parts[0]

    lead = site.shape()[:-2]
    dora: dict[str, Any] = {}
    if first.magnitude is not None:
        for name in ("magnitude", "squares"):
            dora[name] = joined([getattr(own, name) for own in owns])
    return Adapter(
        joined([padded(own.a, -1) for own in owns]),
        joined([padded(own.b, -2) for own in owns]),
        joined([jnp.full(lead, own.scale, jnp.float32) for own in owns]),
        rank=joined([jnp.full(lead, own.rank, jnp.int32) for own in owns]),
        alpha=joined([jnp.full(lead, own.alpha, jnp.float32) for own in owns]),
        rate=first.rate,
        pool=first.pool,
        **dora,
    )


def _check_alike(site: Site, here: Sequence[Own | None]) -> None:
    """Refuses adapters of one stack that cannot be computed as one."""
    first = next(own for own in here if own is not None)
    for path, own in zip(site.paths, here, strict=True):
        if own is None and first.magnitude is not None:
            raise UnsupportedError(
                f"{path}: is not adapted while others of its stack have DoRA; adapt "
                "the same weights in every layer, or use variant='lora'"
            )
        if own is not None and (own.pool, own.magnitude is None) != (
            first.pool,
            first.magnitude is None,
        ):
            raise UnsupportedError(
                f"{path}: has another variant of adapter than others of its stack; "
                "give all layers the same"
            )

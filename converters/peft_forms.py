"""Adapters of PEFT in other forms that compute the same, with settings to match."""

import collections
import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.peft import read_adapter, write_adapter
from qjax.converters.peft_settings import Adapter, Factors
from qjax.errors import SpecError

FORMS = ("plain", "uniform", "pooled")
"""Names of forms: see `plain` and `uniform`; `pooled` leaves an adapter as it is."""


def convert_adapter(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    form: str = "plain",
    revision: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes an adapter as PEFT does, with safetensors.

    Args:
      source: directory or Hub id of a PEFT adapter.
      target: directory to write.
      form: `plain` writes QA-LoRA as LoRA, which more programs read; `uniform` also
        gives all layers one rank and scale, for servers that know no patterns;
        `pooled` leaves QA-LoRA as it is. All compute the same.
      revision: of a Hub id.
      overwrite: replace an existing adapter.

    Returns:
      Names of its layers.

    Raises:
      SpecError: no such adapter or form, or the target exists.
      FormatError, UnsupportedError: the adapter cannot be read.
    """
    adapter = in_form(read_adapter(source, revision), form)
    write_adapter(target, adapter, overwrite=overwrite)
    return list(adapter.layers)


def in_form(adapter: Adapter, form: str) -> Adapter:
    """An adapter in one of `FORMS`.

    Raises:
      SpecError: there is no such form.
    """
    if form not in FORMS:
        raise SpecError(f"adapter: form is {form!r}, expected one of {FORMS}")
    return {"plain": plain, "uniform": uniform}.get(form, lambda same: same)(adapter)


def plain(adapter: Adapter) -> Adapter:
    """QA-LoRA as LoRA that computes the same; other adapters as they are."""
    layers = {name: own.plain() for name, own in adapter.layers.items()}
    made = dataclasses.replace(adapter, layers=layers, pool=1)
    return with_settings(made, False) if adapter.pool > 1 else made


def uniform(adapter: Adapter) -> Adapter:
    """One rank and scale for all layers, for servers that know no patterns.

    Smaller ranks are filled up with zeros, and scales go into `b`.
    """
    made = plain(adapter)
    most = max((own.rank for own in made.layers.values()), default=made.r)
    kinds = {(own.rank, own.scaling) for own in made.layers.values()}
    if len(kinds) > 1:
        layers = {name: _filled_up(own, most) for name, own in made.layers.items()}
        made = dataclasses.replace(made, layers=layers)
    return with_settings(made, False)


def _filled_up(own: Factors, rank: int) -> Factors:
    """Factors of another rank and scale 1."""
    more = (0, rank - own.rank)
    b = np.asarray(own.b, np.float32) * np.float32(own.scaling)
    return dataclasses.replace(
        own,
        a=np.pad(np.asarray(own.a), ((0, 0), more)),
        b=np.pad(b, (more, (0, 0))),
        scaling=1.0,
    )


def with_settings(adapter: Adapter, use_rslora: bool) -> Adapter:
    """The adapter, with settings that give every layer the rank and scale it has.

    Args:
      adapter: its layers count, its settings of ranks and scales do not.
      use_rslora: whether scales are to be `alpha / sqrt(r)`.
    """
    ranks, alphas = {}, {}
    for name, own in adapter.layers.items():
        root = math.sqrt(own.rank) if use_rslora else own.rank
        ranks[name] = own.rank
        alphas[name] = short(own.scaling * root / own.averages)
    r, rank_pattern = _usual(ranks, adapter.r)
    alpha, alpha_pattern = _usual(alphas, adapter.alpha)
    return dataclasses.replace(
        adapter,
        r=r,
        alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=use_rslora,
    )


def _usual(values: Mapping[str, Any], otherwise: Any) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and patterns of names that have another.

    PEFT takes the first pattern that fits and sorts them; these do not overlap.
    """
    if not values:
        return otherwise, {}
    usual = collections.Counter(values.values()).most_common(1)[0][0]
    kinds: dict[str, set[Any]] = {}
    for name, value in values.items():
        kinds.setdefault(name.rpartition(".")[2], set()).add(value)
    patterns = {}
    for name, value in values.items():
        last = name.rpartition(".")[2]
        if value != usual:
            patterns[last if len(kinds[last]) == 1 else name] = value
    return usual, patterns


def short(number: float) -> float:
    """A number of few digits where only noise of its computation hides it."""
    few = float(f"{number:.9g}")
    return few if math.isclose(few, number, rel_tol=1e-12) else number

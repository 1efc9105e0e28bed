"""Adapters of a model under training as PEFT files, out and in."""

import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from qjax.checkpoint import write_artifact
from qjax.converters.adapter_tree import adapter_of_tree, tree_of
from qjax.converters.adapters import by_path, check_recipe, recipe_digest
from qjax.converters.peft import read_adapter, write_adapter
from qjax.converters.peft_forms import in_form
from qjax.converters.peft_settings import Adapter
from qjax.errors import SpecError, UnsupportedError
from qjax.models import Decoder
from qjax.models.weights import EMBEDDING, HEAD
from qjax.tensor import QuantizedTensor
from qjax.train.lora import AttachReport, adapter_tree, load_adapter_tree

_log = logging.getLogger(__name__)


def adapter_of(model: Decoder, base_model: str | None = None) -> Adapter:
    """The adapter that a model was trained with.

    Args:
      model: with adapters attached.
      base_model: name or directory of the base model, for the file.

    Raises:
      SpecError: the model has no adapters.
      NonFiniteError: they hold NaN or infinity.
    """
    made = adapter_of_tree(model.config, adapter_tree(model), base_model=base_model)
    recipe = None if model.assets is None else model.assets.recipe
    return dataclasses.replace(made, trained_over=recipe_digest(recipe))


def save_adapter(
    model: Decoder,
    directory: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    form: str = "plain",
    overwrite: bool = False,
) -> None:
    """Writes the adapters of a model as PEFT does.

    Args:
      model: with adapters attached.
      directory: target; missing or empty, or with `overwrite` an adapter's.
      base_model: name or directory of the base model, for the file.
      form: see `qjax.converters.peft_forms.convert_adapter`.
      overwrite: replace an existing adapter.

    Raises:
      SpecError: no adapters, an unknown form, or the target exists.
      NonFiniteError: the adapters hold NaN or infinity; nothing is written.
      UnsupportedError: DoRA over a part of a tensor that PEFT adapts as one.

    Example:
      >>> save_adapter(model, "adapter", base_model="meta-llama/Llama-3.1-8B")
      >>> PeftModel.from_pretrained(base, "adapter")
    """
    made = in_form(adapter_of(model, base_model), form)
    write_adapter(directory, made, overwrite=overwrite)


def save_base(
    model: Decoder, directory: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Writes the weights below the adapters of a model as a qjax artifact.

    Initial values of PiSSA, and of LoftQ with rounds, change them: such an adapter
    belongs to this base and is refused over any other.

    Args:
      model: with or without adapters.
      directory: target; missing or empty, or with `overwrite` a model directory.
      overwrite: replace an existing model directory.

    Raises:
      SpecError: the target exists, or the model has no config.json to copy.
    """
    if model.assets is None:
        raise SpecError(
            "save_base: the model was not made by qjax.load or qjax.quantize_model, so "
            "there is no config.json to store with it"
        )
    write_artifact(directory, detached_parts(model), model.assets, overwrite=overwrite)


def load_adapter(
    model: Decoder,
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dropout: float = 0.0,
) -> AttachReport:
    """Attaches a PEFT adapter to a model, to be trained on.

    Args:
      model: changed in place.
      source: directory or Hub id of the adapter.
      revision: of a Hub id.
      dropout: part of the inputs that is dropped in further training.

    Returns:
      What was adapted.

    Raises:
      FormatError, UnsupportedError: the adapter cannot be read, or does not fit.
      UnsupportedError: it also replaces whole tensors of the base.
    """
    adapter = read_adapter(source, revision)
    check_recipe(None if model.assets is None else model.assets.recipe, adapter)
    _check_whole(model, adapter)
    return load_adapter_tree(model, tree_of(model.config, adapter), dropout=dropout)


def _check_whole(model: Decoder, adapter: Adapter) -> None:
    """Refuses an adapter that changes the base itself; a copy of it is no change."""
    _, saved, base = by_path(model.config, adapter)
    wanted = saved.keys() | base.keys()
    params = {
        path: leaf
        for _, part in detached_parts(model)
        for path, leaf in part.items()
        if path in wanted or path == EMBEDDING
    }
    changed = set(saved)
    for path, tensor in base.items():
        tied = path == HEAD and HEAD not in params
        leaf, tensor = params[EMBEDDING if tied else path], tensor.T if tied else tensor
        if isinstance(leaf, QuantizedTensor):
            _log.warning("adapter: %s stays quantized, its copy is not used", path)
        elif not np.array_equal(np.asarray(leaf), tensor.astype(leaf.dtype)):
            changed.add(path)
    if changed:
        raise UnsupportedError(
            f"adapter: it replaces {', '.join(sorted(changed))[:200]} of the base "
            "model (modules_to_save, biases or changed embeddings), which is not "
            "trained on; merge it into the base first, or use it with "
            "qjax.load(adapter=)"
        )


def detached_parts(model: Decoder) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """The parts of a model as if it had no adapters; see `Decoder.parts`."""
    for layer, part in model.parts():
        yield layer, {p: x for p, x in part.items() if ".lora." not in p}

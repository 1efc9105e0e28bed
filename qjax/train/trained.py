"""What of a model is trained: put in place before a run, written out after it."""

import dataclasses
import json
import os
from typing import Any

import jax
from flax import nnx

from qjax.calibration.windows import WINDOWS, calibration_windows
from qjax.checkpoint import save
from qjax.errors import UnsupportedError
from qjax.recipes import load_recipe
from qjax.train.adapters import save_adapter, save_base
from qjax.train.config import Finetune
from qjax.train.data import LoadedData
from qjax.train.lora import attach
from qjax.train.qat import convert, prepare
from qjax.train.run_files import RunFiles


@dataclasses.dataclass(frozen=True)
class Trained:
    """What of a model is trained.

    Attributes:
      wrt: Filter of its variables.
      modules: One entry per module that is, as JSON.
      kept: What is not, as JSON.
      new_base: Whether weights below adapters were changed to begin with, so that the
        adapter is of no use over those that were given.
      recipe: What weights are trained for, as JSON; None under adapters.
    """

    wrt: Any
    modules: list[dict[str, Any]]
    kept: Any
    new_base: bool = False
    recipe: str | None = None


def calibration_of(config: Finetune, data: LoadedData, tokenizer: Any) -> Any:
    """The windows that static scales of activations come from, or None without them.

    Args:
      config: The run.
      data: What it trains on, whose first windows they are by default.
      tokenizer: The model's, for a file.

    Raises:
      SpecError: The file cannot be read or is too short.
    """
    if config.qat is None or not config.qat.static:
        return None
    context, source = config.data.context, config.qat.calibration
    if source is None:
        source = data.train.first(WINDOWS * context)
        context = min(context, len(source))
    return calibration_windows(source, tokenizer, context=context)


def prepare_model(
    model: Any,
    config: Finetune,
    key: jax.Array,
    original: Any = None,
    calibration: Any = None,
) -> Trained:
    """Puts adapters, or quantization-aware training, into a model.

    Args:
      model: Changed in place.
      config: The run.
      key: Of initial values.
      original: The weights before they were quantized, see `qjax.train.attach`.
      calibration: Token ids, for static scales of activations.

    Raises:
      SpecError: It does not apply to this model.
      UnsupportedError: The run has several processes and ends in a model, not only in
        an adapter.
    """
    trained = _prepare(model, config, key, original, calibration)
    if jax.process_count() > 1 and (trained.new_base or trained.recipe is not None):
        raise UnsupportedError(
            "finetune: a run of several processes writes adapters alone, and this one "
            "would write a model (qat, or an init that changes the base); run it in "
            "one process, or use lora with init='kaiming'"
        )
    return trained


def _prepare(
    model: Any, config: Finetune, key: jax.Array, original: Any, calibration: Any
) -> Trained:
    if config.qat is not None:
        more: Any = {"original": original, "calibration": calibration}
        report = dataclasses.asdict(prepare(model, config.qat, key=key, **more))
        recipe = json.dumps(load_recipe(config.qat.recipe).to_dict())
        wrt, modules = config.qat.wrt, report["weights"]
        return Trained(wrt, modules, report["kept"], recipe=recipe)
    assert config.lora is not None  # one of them is, see Finetune
    report = attach(model, config.lora, key, original=original).to_dict()
    modules = report["modules"]
    changed = any(one["base"] != "kept" for one in modules)
    return Trained(nnx.LoRAParam, modules, report["kept"], changed)


def export(
    model: Any, trained: Trained, files: RunFiles, base_model: str | None
) -> dict[str, str | None]:
    """Writes what was trained.

    Args:
      model: With the trained values.
      trained: From `prepare_model`.
      files: Where to.
      base_model: What an adapter says it belongs to.

    Returns:
      Directories of the `adapter`, if one was trained, and of the `model`: the trained
      one, or the base where the adapter needs one of its own.
    """
    adapters = trained.recipe is None
    base = os.fspath(files.model) if trained.new_base or not adapters else None
    if jax.process_index() == 0:
        if adapters:
            name = base or base_model
            save_adapter(model, files.adapter, base_model=name, overwrite=True)
        if trained.new_base:
            save_base(model, files.model, overwrite=True)
        if not adapters:
            made = convert(model)
            made.assets = dataclasses.replace(made.assets, recipe=trained.recipe)
            save(made, files.model, overwrite=True)
    return {"adapter": os.fspath(files.adapter) if adapters else None, "model": base}

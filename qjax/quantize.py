"""Quantizing whole models: from disk to artifact layer by layer, or in memory.

`quantize_checkpoint` streams: it maps the source, holds one layer at a time, writes
each part when it is done and can be killed at any moment; the same command continues
with the first missing part and ends with the same bytes. Its memory is one layer in
float32 with the method's temporaries, whatever the size of the model; calibration adds
the activations between two layers.

Every tensor is reported: what it became and at which error, or why it was kept.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from qjax.artifact import ArtifactWriter, is_artifact, part_name
from qjax.calibration import CONTEXT, calibration_windows
from qjax.checkpoint import Assets, dense_parts, hold, refuse_training, tokenizer_of
from qjax.converters.huggingface import open_checkpoint
from qjax.errors import SpecError
from qjax.formats import Format
from qjax.io.files import sha256_file
from qjax.methods import quantize as quantize
from qjax.models.rotate import rotate_parts
from qjax.parts import PartQuantizer
from qjax.recipes import Recipe, load_recipe
from qjax.reports import Progress as Progress
from qjax.reports import QuantizationReport as QuantizationReport


def quantize_model(
    source: Any,
    recipe: Recipe | Format | str | os.PathLike[str],
    *,
    calibration: Any = None,
    revision: str | None = None,
    dtype: Any = None,
    nonfinite: str = "raise",
    progress: Callable[[Progress], None] | None = None,
    mesh: Any = None,
) -> Any:
    """Quantizes a model in memory.

    Args:
      source: a dense `Decoder`, a Hugging Face directory or a Hub id. A directory or id
        is read layer by layer, so memory stays at packed size plus one layer.
      recipe: a recipe, a format for all kernels, a preset name or a JSON file.
      calibration: for recipes that need it: token ids `[windows, time]` or `[tokens]`,
        or the path of a text file; see `qjax.calibration.calibration_windows`. For
        llama.cpp's presets also the path of an importance matrix.
      revision: of a Hub id.
      dtype: compute dtype; default that of `source`, or `load`'s default.
      nonfinite: see `quantize`.
      progress: called after each part.
      mesh: a `jax.sharding.Mesh` whose first axis shares the calibration batches.

    Returns:
      A `Decoder` with packed weights; `model.report` is the `QuantizationReport`.

    Raises:
      SpecError: the recipe does not apply or needs calibration, there is too little of
        it, or `source` is already quantized or has adapters under training.
      NonFiniteError: a weight or a calibration activation is NaN or infinite.
    """
    from qjax.converters.gguf_recipe import mixture
    from qjax.models import Decoder, ModelConfig
    from qjax.models.stacks import Stacks

    chosen = load_recipe(recipe)
    default = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    entries: dict[str, Any] = {}

    def run(config: ModelConfig, parts: Iterator[Any], tokenizer: Any) -> Any:
        tokens, importances = _calibration(calibration, tokenizer, config)
        own = mixture(chosen, config, imatrix=calibration is not None)
        quantizer = PartQuantizer(
            own,
            config,
            tokens=tokens,
            dtype=compute,
            nonfinite=nonfinite,
            progress=progress,
            mesh=mesh,
            importances=importances,
        )
        params = Stacks(config.layers)
        rotated = rotate_parts(config, parts, own.rotate)
        for index, (layer, part) in enumerate(rotated):
            done = quantizer.part(layer, index == 0, part)
            quantizer.step(part_name(layer, index == 0))
            held = {path: hold(leaf, compute) for path, leaf in done.items()}
            params.add(held)
        entries.update(quantizer.entries)
        return params, quantizer.report(entries), own

    if isinstance(source, Decoder):
        refuse_training(source, "quantize_model")
        compute = jnp.dtype(dtype or source.dtype)
        config, directory = source.config, getattr(source.assets, "directory", None)
        tokenizer = _tokenizer(calibration, directory)
        params, report, chosen = run(config, source.parts(), tokenizer)
    else:
        compute = jnp.dtype(dtype or default)
        _refuse_artifact(source)
        with open_checkpoint(source, revision) as checkpoint:
            config = ModelConfig.from_hf(checkpoint.config)
            directory = str(checkpoint.directory)
            tokenizer = _tokenizer(calibration, directory)
            params, report, chosen = run(config, dense_parts(checkpoint), tokenizer)
    model = Decoder(config, params, dtype=compute)
    model.report = report
    if directory is not None:
        model.assets = Assets(directory, json.dumps(chosen.to_dict()))
    return model


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    recipe: Recipe | Format | str | os.PathLike[str],
    *,
    calibration: Any = None,
    revision: str | None = None,
    overwrite: bool = False,
    nonfinite: str = "raise",
    progress: Callable[[Progress], None] | None = None,
    mesh: Any = None,
) -> QuantizationReport:
    """Quantizes a model from disk to a qjax artifact, one layer in memory at a time.

    Args:
      source: Hugging Face directory or Hub id, dense.
      target: the artifact; missing or empty, or with `overwrite` a model directory. An
        interrupted run leaves `TARGET.partial`, which the same call continues.
      recipe: a recipe, a format for all kernels, a preset name or a JSON file.
      calibration: see `quantize_model`.
      revision: of a Hub id.
      overwrite: replace an existing model directory.
      nonfinite: see `quantize`.
      progress: called after each part.
      mesh: see `quantize_model`.

    Returns:
      The report.

    Raises:
      SpecError: the target exists, the recipe does not apply or needs calibration.
      FormatError, UnsupportedError: the source cannot be read; see `load`.
      NonFiniteError: a weight or a calibration activation is NaN or infinite.
      QjaxError: the disk is full; complete parts are kept.
    """
    from qjax.converters.gguf_recipe import mixture
    from qjax.models import ModelConfig

    named = load_recipe(recipe)
    _refuse_artifact(source)
    with open_checkpoint(source, revision) as checkpoint:
        config = ModelConfig.from_hf(checkpoint.config)
        tokenizer = None
        if checkpoint.tokenizer_files:
            tokenizer = tokenizer_of(checkpoint.directory)
            tokenizer.check_vocab(config.vocab_size)
        tokens, importances = _calibration(calibration, tokenizer, config)
        chosen = mixture(named, config, imatrix=calibration is not None)
        quantizer = PartQuantizer(
            chosen,
            config,
            tokens=tokens,
            dtype=jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16,
            nonfinite=nonfinite,
            progress=progress,
            mesh=mesh,
            importances=importances,
        )
        identity = {
            "source": checkpoint.fingerprint(),
            "recipe": chosen.to_dict(),
            "nonfinite": nonfinite,
        }
        if tokens is not None:
            identity["calibration"] = hashlib.sha256(tokens.tobytes()).hexdigest()
        elif importances:
            identity["calibration"] = sha256_file(calibration)
        with ArtifactWriter(target, identity, overwrite=overwrite) as out:
            parts = rotate_parts(config, dense_parts(checkpoint), chosen.rotate)
            for index, (layer, part) in enumerate(parts):
                name = part_name(layer, index == 0)
                if name in out.done:
                    with out.read(name) as packed:
                        quantizer.follow(layer, index == 0, packed, part)
                    quantizer.step(name, resumed=True)
                    continue
                done = quantizer.part(layer, index == 0, part)
                out.write(name, done, quantizer.entries)
                quantizer.step(name)
            report = quantizer.report(dict(out.reports()))
            header = {
                "recipe": chosen.to_dict(),
                "source": {"sha256": checkpoint.source_digest()},
            }
            out.finish(header, checkpoint.assets())
    return report


def _calibration(calibration: Any, tokenizer: Any, config: Any) -> tuple[Any, Any]:
    """Calibration windows of any source or None, and importances by path or None."""
    from qjax.converters.gguf_imatrix import is_imatrix, read_imatrix

    if calibration is None:
        return None, None
    if is_imatrix(calibration):
        return None, read_imatrix(calibration).by_path(config)
    windows = calibration_windows(
        calibration,
        tokenizer,
        context=min(CONTEXT, config.max_context),
        vocab_size=config.vocab_size,
    )
    if windows.shape[1] > config.max_context:
        raise SpecError(
            f"calibration: windows of {windows.shape[1]} tokens exceed the model's "
            f"context of {config.max_context}; cut them"
        )
    return windows, None


def _tokenizer(calibration: Any, directory: str | None) -> Any:
    """The tokenizer of a model directory, where calibration is a text."""
    if directory is None or not isinstance(calibration, str | os.PathLike):
        return None
    return tokenizer_of(directory)


def _refuse_artifact(source: Any) -> None:
    if is_artifact(source):
        raise SpecError(
            f"{os.fspath(source)}: is a qjax artifact, quantized already; quantize the "
            "original model instead"
        )

"""Quantizing whole models: from disk to artifact layer by layer, or in memory.

`quantize_checkpoint` streams: it maps the source, holds one layer at a time, writes
each part when it is done and can be killed at any moment; the same command continues
with the first missing part and ends with the same bytes. Its memory is one layer in
float32 with the method's temporaries, whatever the size of the model.

Every tensor is reported: what it became and at which error, or why it was kept.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.artifact import ArtifactWriter, is_artifact, part_name, tensor_report
from qjax.checkpoint import Assets, dense_parts, hold
from qjax.converters.huggingface import open_checkpoint
from qjax.errors import SpecError
from qjax.formats import Format
from qjax.methods import quantize as quantize
from qjax.methods.array import check_finite, count_nonfinite
from qjax.recipes import Recipe, load_recipe
from qjax.tensor import QuantizedTensor

TABLES = ("embed.embedding", "embed.position")


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
      done: parts finished (embeddings, each layer, the end).
      total: parts in all.
      part: file name of the part just finished.
      resumed: the part was already there from an interrupted run.
      seconds: since the start of this run.
    """

    done: int
    total: int
    part: str
    resumed: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """What a run did; `to_dict()` has the keys of `qjax quantize --json`.

    Attributes:
      recipe: name of the recipe.
      bits_per_weight: all stored bits over all parameters of the model.
      quantized_bits_per_weight: the same over quantized tensors only.
      size_bytes: bytes of weights written.
      source_bytes: bytes of the same weights in the source.
      seconds: wall time.
      peak_memory_bytes: high-water mark of the process's resident memory.
      tensors: one entry per quantized tensor: name, format, method, bits_per_weight,
        error (relative root-mean-square), shape, nbytes.
      kept: one entry per tensor kept in float: name, shape, dtype, nbytes, reason.

    Entries of tensors with NaN or infinite weights (which only `nonfinite="zero"` and
    `"clip"` let through) carry their count as `nonfinite`; kept tensors keep them.
    """

    recipe: str
    bits_per_weight: float
    quantized_bits_per_weight: float
    size_bytes: int
    source_bytes: int
    seconds: float
    peak_memory_bytes: int
    tensors: tuple[dict[str, Any], ...]
    kept: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        fields = dataclasses.asdict(self)
        return {**fields, "tensors": list(self.tensors), "kept": list(self.kept)}


def quantize_model(
    source: Any,
    recipe: Recipe | Format | str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: Any = None,
    nonfinite: str = "raise",
    progress: Callable[[Progress], None] | None = None,
) -> Any:
    """Quantizes a model in memory.

    Args:
      source: a dense `Decoder`, a Hugging Face directory or a Hub id. A directory or id
        is read layer by layer, so memory stays at packed size plus one layer.
      recipe: a recipe, a format for all kernels, a preset name or a JSON file.
      revision: of a Hub id.
      dtype: compute dtype; default that of `source`, or `load`'s default.
      nonfinite: see `quantize`.
      progress: called after each part.

    Returns:
      A `Decoder` with packed weights; `model.report` is the `QuantizationReport`.

    Raises:
      SpecError: the recipe does not apply, or `source` is already quantized.
      NonFiniteError: a weight is NaN or infinite.
    """
    from qjax.models import Decoder, ModelConfig

    recipe = load_recipe(recipe)
    default = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    log = _Log(recipe, nonfinite, progress)
    params: dict[str, Any] = {}
    if isinstance(source, Decoder):
        compute = jnp.dtype(dtype or source.dtype)
        config, directory = source.config, getattr(source.assets, "directory", None)
        for index, (layer, part) in enumerate(source.parts()):
            part = log.quantize(part)
            log.step(config.layers, part_name(layer, index == 0))
            params |= {path: hold(leaf, compute) for path, leaf in part.items()}
    else:
        compute = jnp.dtype(dtype or default)
        _refuse_artifact(source)
        with open_checkpoint(source, revision) as checkpoint:
            config = ModelConfig.from_hf(checkpoint.config)
            directory = str(checkpoint.directory)
            for index, (layer, part) in enumerate(dense_parts(checkpoint)):
                part = log.quantize(part)
                log.step(config.layers, part_name(layer, index == 0))
                params |= {path: hold(leaf, compute) for path, leaf in part.items()}
    model = Decoder(config, params, dtype=compute)
    if directory is not None:
        model.assets = Assets(directory, json.dumps(recipe.to_dict()))
    return model


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    recipe: Recipe | Format | str | os.PathLike[str],
    *,
    revision: str | None = None,
    overwrite: bool = False,
    nonfinite: str = "raise",
    progress: Callable[[Progress], None] | None = None,
) -> QuantizationReport:
    """Quantizes a model from disk to a qjax artifact, one layer in memory at a time.

    Args:
      source: Hugging Face directory or Hub id, dense.
      target: the artifact; missing or empty, or with `overwrite` a model directory. An
        interrupted run leaves `TARGET.partial`, which the same call continues.
      recipe: a recipe, a format for all kernels, a preset name or a JSON file.
      revision: of a Hub id.
      overwrite: replace an existing model directory.
      nonfinite: see `quantize`.
      progress: called after each part.

    Returns:
      The report.

    Raises:
      SpecError: the target exists, the recipe does not apply.
      FormatError, UnsupportedError: the source cannot be read; see `load`.
      NonFiniteError: a weight is NaN or infinite; names it.
      QjaxError: the disk is full; complete parts are kept.
    """
    from qjax.models import ModelConfig
    from qjax.text import load_tokenizer

    recipe = load_recipe(recipe)
    _refuse_artifact(source)
    log = _Log(recipe, nonfinite, progress)
    with open_checkpoint(source, revision) as checkpoint:
        config = ModelConfig.from_hf(checkpoint.config)
        if checkpoint.tokenizer_files:
            load_tokenizer(checkpoint.directory).check_vocab(config.vocab_size)
        identity = {
            "source": checkpoint.fingerprint(),
            "recipe": recipe.to_dict(),
            "nonfinite": nonfinite,
        }
        with ArtifactWriter(target, identity, overwrite=overwrite) as out:
            for index, (layer, part) in enumerate(dense_parts(checkpoint)):
                name = part_name(layer, index == 0)
                if name not in out.done:
                    out.write(name, log.quantize(part), log.entries)
                log.step(config.layers, name, resumed=name in out.done)
            report = log.report(dict(out.reports()))
            header = {
                "recipe": recipe.to_dict(),
                "source": {"sha256": checkpoint.source_digest()},
            }
            copied = checkpoint.tokenizer_files | {
                "config.json": checkpoint.directory / "config.json"
            }
            out.finish(header, copied)
    return report


class _Log:
    """Quantizes parts and keeps the books of one run."""

    def __init__(self, recipe: Recipe, nonfinite: str, progress: Any):
        self._recipe, self._nonfinite, self._progress = recipe, nonfinite, progress
        self._start = time.perf_counter()
        self._done = 0
        self.entries: dict[str, dict[str, Any]] = {}

    def quantize(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Quantizes one part by the recipe and records each tensor."""
        packed: dict[str, Any] = {}
        for path, w in part.items():
            packed[path], self.entries[path] = quantize_parameter(
                path, w, self._recipe, nonfinite=self._nonfinite
            )
        return packed

    def step(self, layers: int, name: str, *, resumed: bool = False) -> None:
        """Reports a finished part."""
        self._done += 1
        if self._progress is not None:
            seconds = time.perf_counter() - self._start
            self._progress(Progress(self._done, layers + 2, name, resumed, seconds))

    def report(self, entries: Mapping[str, dict[str, Any]]) -> QuantizationReport:
        """The report of a run from the entries of all its parts."""
        quantized = {p: e for p, e in entries.items() if "error" in e}
        kept = {p: e for p, e in entries.items() if "error" not in e}

        def bits(which: Mapping[str, dict[str, Any]]) -> float:
            count = sum(e["parameters"] for e in which.values())
            return 8 * sum(e["nbytes"] for e in which.values()) / max(count, 1)

        return QuantizationReport(
            recipe=self._recipe.name,
            bits_per_weight=bits(entries),
            quantized_bits_per_weight=bits(quantized),
            size_bytes=sum(e["nbytes"] for e in entries.values()),
            source_bytes=sum(e["source_bytes"] for e in entries.values()),
            seconds=time.perf_counter() - self._start,
            peak_memory_bytes=peak_memory_bytes(),
            tensors=tuple({"name": p, **e} for p, e in quantized.items()),
            kept=tuple({"name": p, **e} for p, e in kept.items()),
        )


def quantize_parameter(
    path: str, w: Any, recipe: Recipe, *, nonfinite: str = "raise"
) -> tuple[Any, dict[str, Any]]:
    """Quantizes or keeps one parameter by a recipe.

    Args:
      path: dotted path, which rules match.
      w: float array. Embedding tables `[vocab, dim]` are quantized along `dim`.
      recipe: the rules.
      nonfinite: see `quantize`.

    Returns:
      `(leaf, report)`: a quantized tensor with its format, method, error and size, or
      `w` itself with the reason it was kept.

    Raises:
      SpecError: `w` is quantized already, or the rule's format does not fit it.
      NonFiniteError: `w` holds NaN or infinity.
    """
    if isinstance(w, QuantizedTensor):
        raise SpecError(
            f"{path}: is already quantized ({w.format.name}); quantize the original "
            "model instead"
        )
    source = tensor_report(path, w)
    count = source["nbytes"] // jnp.dtype(w.dtype).itemsize
    base = {"parameters": count, "source_bytes": source["nbytes"]}
    if nonfinite != "raise" and (bad := count_nonfinite(w)):
        base["nonfinite"] = bad
    rule = recipe.match(path, w.shape)
    if rule is None or rule.format is None:
        if nonfinite == "raise":
            check_finite(w, path)
        reason = "vector" if len(w.shape) < 2 else "kept by the recipe"
        kept = {"shape": source["shape"], "dtype": source["format"], "reason": reason}
        return w, {**kept, "nbytes": source["nbytes"], **base}
    axis = -1 if path in TABLES else -2
    try:
        q = quantize(
            w, rule.format, rule.method, axis=axis, nonfinite=nonfinite, name=path
        )
    except SpecError as error:
        text = str(error)
        raise SpecError(text if path in text else f"{path}: {text}") from None
    error = float(_relative_error(jnp.asarray(w), q)) if count else 0.0
    made = tensor_report(path, q)
    return q, {**made, "method": rule.method.name, "error": error, **base}


@jax.jit
def _relative_error(w, q):
    """Root-mean-square error relative to that of the zero matrix."""
    w = jnp.nan_to_num(w.astype(jnp.float32))
    miss = jnp.sum(jnp.square(w - q.dequantize(jnp.float32)))
    return jnp.sqrt(miss / jnp.maximum(jnp.sum(jnp.square(w)), 1e-38))


def peak_memory_bytes() -> int:
    """High-water mark of resident memory, plus that of devices where they tell."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    for device in jax.local_devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        peak += (stats or {}).get("peak_bytes_in_use", 0)
    return peak


def _refuse_artifact(source: Any) -> None:
    if is_artifact(source):
        raise SpecError(
            f"{os.fspath(source)}: is a qjax artifact, quantized already; quantize the "
            "original model instead"
        )

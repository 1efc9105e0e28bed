"""Merging adapters: of a model in memory, or from disk to disk.

See `qjax.train.merge_parts` for what the modes `original`, `dequantized` and
`requantized` mean, and for what is measured.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from qjax.checkpoint import Assets, write_artifact
from qjax.convert import Converted, check_format, write_parts
from qjax.converters.peft import read_adapter
from qjax.converters.peft_settings import Adapter
from qjax.errors import SpecError
from qjax.models import Decoder, ModelConfig
from qjax.train.adapters import adapter_of, detached_parts
from qjax.train.merge_parts import MODES as MODES
from qjax.train.merge_parts import MergedTensor as MergedTensor
from qjax.train.merge_parts import MergeReport as MergeReport
from qjax.train.merge_parts import check_mode, merge_parts
from qjax.train.sources import Part, open_source, parts_of

Source = str | os.PathLike[str]


def merge(
    model: Decoder,
    adapter: Adapter | Source | None = None,
    mode: str = "dequantized",
    *,
    original: Decoder | Source | None = None,
) -> tuple[Decoder, MergeReport]:
    """Merges an adapter into a model in memory.

    Args:
      model: the base model; without `adapter`, one that was trained.
      adapter: a PEFT adapter, its directory or its Hub id.
      mode: `original`, `dequantized` or `requantized`.
      original: for `original`, the model before quantization or where it lies.

    Returns:
      A new model, and what was measured. `model` is not changed.

    Raises:
      SpecError: nothing to merge, an unknown mode, or another model's original.
      FormatError, UnsupportedError: the adapter does not fit, or weights of this format
        cannot be quantized again.

    Example:
      >>> merged, report = merge(model, "adapter", "requantized")
      >>> report.relative  # error over the norm of what the adapter changes
      0.31
    """
    check_mode(mode, original is not None)
    if adapter is None:
        adapter = adapter_of(model)
    elif not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter)
    report = MergeReport(mode)
    recipe = None if model.assets is None else model.assets.recipe
    with contextlib.ExitStack() as stack:
        originals = None if original is None else parts_of(stack, original)
        params: dict[str, Any] = {}
        for _, part in merge_parts(
            model.config,
            detached_parts(model),
            adapter,
            mode,
            report,
            originals=originals,
            recipe=recipe,
        ):
            params |= part
    made = Decoder(model.config, params, dtype=model.dtype)
    if model.assets is not None:
        made.assets = Assets(model.assets.directory, _recipe_after(mode, recipe))
    return made, report


def merge_checkpoint(
    base: Source,
    adapter: Source,
    target: Source,
    mode: str,
    *,
    fmt: str | None = None,
    original: Source | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    requantize: bool = False,
) -> tuple[MergeReport, Converted]:
    """Merges an adapter from disk to disk, one layer in memory.

    Args:
      base: qjax artifact, Hugging Face directory, GGUF file or Hub id.
      adapter: directory or Hub id of a PEFT adapter.
      target: directory to write.
      mode: `original`, `dequantized` or `requantized`.
      fmt: what to write, as in `qjax.convert`; by default `qjax` if weights are
        quantized again, else `safetensors`.
      original: for `original`, the model before quantization.
      revision: of the base's Hub id.
      overwrite: replace an existing model directory.
      requantize: see `qjax.convert`.

    Returns:
      What was measured, and what became of the weights.

    Raises:
      SpecError, FormatError, UnsupportedError: see `merge` and `qjax.convert`.
    """
    check_mode(mode, original is not None)
    fmt = fmt or ("qjax" if mode == "requantized" else "safetensors")
    check_format(fmt)
    if mode != "requantized" and fmt not in ("qjax", "safetensors"):
        raise SpecError(
            f"merge: mode {mode!r} makes dense weights, which {fmt!r} does not hold; "
            "expected format safetensors or qjax, or mode 'requantized'"
        )
    report, done = MergeReport(mode), Converted()
    with contextlib.ExitStack() as stack:
        source = open_source(stack, base, revision)
        parts = merge_parts(
            ModelConfig.from_hf(source.config),
            source.parts,
            read_adapter(adapter),
            mode,
            report,
            originals=None if original is None else parts_of(stack, original),
            recipe=source.recipe,
        )
        if fmt == "qjax":
            recipe = _recipe_after(mode, source.recipe)
            assets = Assets(source.directory, recipe)
            write_artifact(target, _closed(parts), assets, overwrite=overwrite)
        else:
            write_parts(
                target,
                source.config,
                (part for _, part in parts),
                source.files,
                fmt,
                overwrite,
                requantize,
                done,
            )
    return report, done


def _closed(parts: Iterable[Part]) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Parts with all that follows the layers in one."""
    layers = False
    last: dict[str, Any] = {}
    for layer, part in parts:
        layers |= layer is not None
        if layers and layer is None:
            last |= part
        else:
            yield layer, dict(part)
    yield None, last


def _recipe_after(mode: str, recipe: str | None) -> str | None:
    """The recipe that still says something of the merged weights."""
    return None if mode == "original" else recipe

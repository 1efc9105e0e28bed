"""Merging adapters: of a model in memory, or from disk to disk.

See `qjax.train.merge_parts` for what the modes `original`, `dequantized` and
`requantized` mean, and for what is measured.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from qjax.artifact import Artifact, is_artifact
from qjax.checkpoint import Assets, checkpoint_parts, write_artifact
from qjax.convert import Converted, check_format, write_parts
from qjax.converters.huggingface import TOKENIZER_FILES, open_checkpoint
from qjax.converters.peft import read_adapter
from qjax.converters.peft_settings import Adapter
from qjax.errors import SpecError
from qjax.models import Decoder, ModelConfig
from qjax.train.adapters import adapter_of, detached_parts
from qjax.train.merge_parts import MODES as MODES
from qjax.train.merge_parts import MergedTensor as MergedTensor
from qjax.train.merge_parts import MergeReport as MergeReport
from qjax.train.merge_parts import Part, check_mode, merge_parts

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
        originals = _parts_of(stack, original)
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
        source = _opened(stack, base, revision)
        parts = merge_parts(
            ModelConfig.from_hf(source.config),
            source.parts,
            read_adapter(adapter),
            mode,
            report,
            originals=_parts_of(stack, original),
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


class _Source(NamedTuple):
    directory: str
    config: dict[str, Any]
    files: dict[str, Any]
    recipe: str | None
    parts: Iterator[Part]


def _opened(stack: Any, source: Source, revision: str | None = None) -> _Source:
    """A model on disk, open until the stack is left."""
    if is_artifact(source):
        artifact = Artifact(source)
        recipe = artifact.manifest.get("recipe")
        return _Source(
            str(artifact.directory),
            artifact.config,
            {n: p for n, p in artifact.files.items() if n in TOKENIZER_FILES},
            None if recipe is None else json.dumps(recipe),
            _numbered(artifact.parts()),
        )
    checkpoint = stack.enter_context(open_checkpoint(source, revision))
    return _Source(
        str(checkpoint.directory),
        checkpoint.config,
        checkpoint.tokenizer_files,
        None,
        checkpoint_parts(checkpoint),
    )


def _numbered(parts: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Part]:
    """Parts of an artifact, by their layer."""
    for name, part in parts:
        number = name.removeprefix("layer-").removesuffix(".safetensors")
        yield int(number) if number.isdigit() else None, part


def _parts_of(stack: Any, model: Decoder | Source | None) -> Any:
    if model is None or isinstance(model, Decoder):
        return None if model is None else model.parts()
    return _opened(stack, model).parts


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

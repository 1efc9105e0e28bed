"""Writing a model in another container: qjax, dense safetensors, or another library's.

Works part by part, so memory is one layer. Packed weights are only ever expanded when
a dense format is asked for. Going to the format of another library moves the codes
themselves: what that format cannot hold exactly is refused, or, when asked for, rounded
again and reported.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from qjax.artifact import Artifact, is_artifact
from qjax.checkpoint import Assets, checkpoint_parts, open_packed, write_artifact
from qjax.converters.huggingface import (
    SETTINGS,
    TOKENIZER_FILES,
    open_checkpoint,
    write_checkpoint,
)
from qjax.errors import SpecError, UnsupportedError
from qjax.formats import Int
from qjax.methods import quantize
from qjax.quantize import quantize_checkpoint
from qjax.recipes import Recipe
from qjax.tensor import QuantizedTensor

OWN = ("qjax", "safetensors")
FORMATS = (*OWN, "gptq", "gptq_v2", "awq", "bnb", "hqq", "compressed-tensors")
FORMATS += ("quanto", "mlx")
"""Formats to write; those of other libraries as in `converters.packed_write`."""


@dataclasses.dataclass
class Converted:
    """What became of the weights.

    Attributes:
      exact: weights whose codes were moved as they are.
      rounded: weights that were rounded again, and why.
      dense: quantized weights that were written dense.
      kept: linear layers that were dense already.
      types: of GGUF, the type of every matrix by its name there.
    """

    exact: list[str] = dataclasses.field(default_factory=list)
    rounded: dict[str, str] = dataclasses.field(default_factory=dict)
    dense: list[str] = dataclasses.field(default_factory=list)
    kept: list[str] = dataclasses.field(default_factory=list)
    types: dict[str, str] = dataclasses.field(default_factory=dict)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    fmt: str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    requantize: bool = False,
    calibration: Any = None,
    form: str = "plain",
) -> Converted:
    """Writes `source` as `fmt`.

    Args:
      source: qjax artifact, Hugging Face directory or Hub id.
      target: directory to write; missing or empty, or with `overwrite` a model. For
        `gguf` a file.
      fmt: `qjax` (a checkpoint becomes an artifact, bit for bit; weights of a quantized
        one stay packed), `safetensors` (a dense Hugging Face directory that
        transformers loads; quantized weights are dequantized to the dtype of the
        original), or the format of another library: `gptq`, `gptq_v2`, `awq`, `bnb`,
        `hqq`, `compressed-tensors`, `quanto`, `mlx` (a Hugging Face directory whose
        codes are those of the source). `gguf` writes one file with the blocks, or the
        dense weights, of the source, `gguf:Q4_K_M` and its like quantize a dense one.
        `peft` writes an adapter, which the source is then; see
        `qjax.converters.peft_forms.convert_adapter`.
      revision: of a Hub id.
      overwrite: replace an existing model directory.
      requantize: round what the format of another library cannot hold exactly, rather
        than refuse it: the scales alone to float16 where that is enough, otherwise the
        weight to the format's usual settings.
      calibration: text or token ids, for presets of `gguf`; see `quantize_model`.
      form: of an adapter; see `convert_adapter`.

    Returns:
      What became of the weights.

    Raises:
      SpecError: unknown format, or the source is in that format already.
      UnsupportedError: a weight does not fit the format, or the source is not read.
      FormatError, IntegrityError: the source is damaged.
    """
    report = Converted()
    kind, _, name = fmt.partition(":")
    if kind == "gguf":
        from qjax.convert_gguf import write_gguf_model

        report.types = write_gguf_model(
            source,
            target,
            name,
            revision=revision,
            overwrite=overwrite,
            calibration=calibration,
        )
        return report
    if fmt != "peft":
        check_format(fmt)
    if calibration is not None:
        raise SpecError(f"format {fmt!r}: only presets of gguf take a calibration text")
    if form != "plain" and fmt != "peft":
        raise SpecError(f"format {fmt!r}: only peft has forms, got form={form!r}")
    if fmt == "peft":
        from qjax.converters.peft_forms import convert_adapter

        report.exact = convert_adapter(
            source, target, form=form, revision=revision, overwrite=overwrite
        )
        return report
    if is_artifact(source):
        if fmt == "qjax":
            raise SpecError(f"{os.fspath(source)}: is a qjax artifact already")
        artifact = Artifact(source)
        copied = {n: p for n, p in artifact.files.items() if n in TOKENIZER_FILES}
        parts = (part for _, part in artifact.parts())
        config = artifact.config
        write_parts(target, config, parts, copied, fmt, overwrite, requantize, report)
        return report
    with open_checkpoint(source, revision) as checkpoint:
        packed = open_packed(checkpoint)
        if fmt != "qjax":
            parts = (part for _, part in checkpoint_parts(packed))
            files = checkpoint.tokenizer_files
            config = checkpoint.config
            write_parts(
                target, config, parts, files, fmt, overwrite, requantize, report
            )
            return report
        if packed.kind is not None:
            assets = Assets(str(checkpoint.directory))
            parts = checkpoint_parts(packed)
            write_artifact(target, parts, assets, overwrite=overwrite)
            return report
    quantize_checkpoint(
        source, target, Recipe((), "dense"), revision=revision, overwrite=overwrite
    )
    return report


def check_format(fmt: str) -> None:
    """Refuses the name of a format that `write_parts` does not write."""
    if fmt not in FORMATS:
        raise SpecError(
            f"format {fmt!r}: expected one of {', '.join(FORMATS)}, gguf:PRESET, or "
            "peft for an adapter"
        )


def write_parts(
    target, config, parts, files, fmt, overwrite, requantize, report: Converted
) -> None:
    """A Hugging Face directory, whose config.json says how it is packed, if it is.

    Args:
      target: directory to write.
      config: config.json.
      parts: parameters by path, part by part.
      files: tokenizer files by name.
      fmt: `safetensors`, or the format of another library.
      overwrite: replace an existing model directory.
      requantize: see `convert`.
      report: is filled.
    """
    from qjax.converters.packed_write import EMBEDDINGS, WRITERS
    from qjax.converters.quanto import QuantoWriter

    plain = {k: v for k, v in config.items() if k not in (*SETTINGS, "quantization")}
    if fmt == "safetensors":
        tensors = _tensors(plain, parts, lambda *_: None, report)
        write_checkpoint(target, lambda: plain, tensors, files, overwrite=overwrite)
        return
    writer, where = WRITERS[fmt](), os.fspath(target)
    pack = _packer(writer, where, fmt in EMBEDDINGS, requantize)
    tensors = _tensors(plain, parts, pack, report)

    def content() -> Mapping[str, Any]:
        if not report.exact and not report.rounded:
            raise SpecError(
                f"{where}: the source has no quantized weights; quantize it first "
                "(qjax quantize), or convert it to safetensors"
            )
        settings = writer.settings(report.kept)
        own = {"quantization": settings} if fmt == "mlx" else {}
        return plain | {"quantization_config": settings} | own

    def more() -> Mapping[str, Any]:
        quanto = isinstance(writer, QuantoWriter)
        return {"quanto_qmap.json": writer.map()} if quanto else {}

    write_checkpoint(target, content, tensors, files, more=more, overwrite=overwrite)


def _tensors(
    config: dict[str, Any],
    parts: Iterator[dict[str, Any]],
    pack: Callable[..., Mapping[str, np.ndarray] | None],
    report: Converted,
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of every tensor of the directory, one part in memory.

    Args:
      config: config.json; is told when a head turns out not to be tied.
      parts: parameters by path.
      pack: gives the tensors of a quantized layer; None to write it dense.
      report: is filled.
    """
    from qjax.models import ModelConfig, plan
    from qjax.models.weights import HEAD

    entries = plan(ModelConfig.from_hf(config))
    for part in parts:
        if HEAD in part:
            config["tie_word_embeddings"] = False
        for entry in entries:
            if not all(path in part for path in entry.paths):
                continue
            packed = [isinstance(part[path], QuantizedTensor) for path in entry.paths]
            layer = entry.name.removesuffix(".weight")
            made = None
            if all(packed):
                made = pack(entry, part, report)
            if made is not None:
                yield from ((f"{layer}.{name}", leaf) for name, leaf in made.items())
                continue
            if any(packed):
                report.dense.append(layer)
            elif entry.kind.transposed and len(entry.shape) == 2:
                report.kept.append(layer)
            dense = {path: _dense(part[path]) for path in entry.paths}
            yield entry.name, entry.write(dense)


def _dense(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf)


def _packer(writer: Any, where: str, embeddings: bool, requantize: bool):
    """A function that packs one layer; None where its format keeps it dense."""
    from qjax.converters.affine import half_scales

    def pack(entry: Any, part: Mapping[str, Any], report: Converted):
        layer = entry.name.removesuffix(".weight")
        name = f"{where}: {layer}"
        try:
            if entry.embedding and not embeddings:
                raise UnsupportedError(f"{name}: this format keeps embeddings dense")
            made = writer.write(entry.write_packed(part), name)
            report.exact.append(layer)
            return made
        except UnsupportedError as error:
            if not requantize:
                raise UnsupportedError(
                    f"{error}. --requantize (requantize=True) rounds such weights "
                    "again, and writes embeddings dense"
                ) from None
            if entry.embedding and not embeddings:
                return None
            report.rounded[layer] = str(error)
        try:  # it may be the dtype of scales alone
            halved = half_scales(entry.write_packed(part))
            if halved is not None:
                return writer.write(halved, name)
        except UnsupportedError:
            pass
        dense = entry.write({path: _dense(part[path]) for path in entry.paths})
        kernel = dense if not entry.kind.transposed else dense.T
        kernel = dense.T if entry.embedding else kernel
        fmt = writer.fallback
        if isinstance(fmt, Int) and isinstance(fmt.group, int):
            fmt = dataclasses.replace(fmt, group=min(fmt.group, kernel.shape[0]))
        return writer.write(quantize(kernel, fmt), name)

    return pack

"""Loading and saving models: Hugging Face directories, Hub ids and qjax artifacts.

Everything is read part by part (embeddings, each layer, the end), as views of mapped
files. Packed weights stay packed; dense ones are held in the compute dtype.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.artifact import (
    Artifact,
    ArtifactWriter,
    is_artifact,
    part_name,
    tensor_report,
)
from qjax.converters.huggingface import (
    TOKENIZER_FILES,
    Checkpoint,
    is_gguf,
    open_checkpoint,
)
from qjax.converters.shards import contained
from qjax.errors import FormatError, SpecError, UnsupportedError
from qjax.io.files import shown
from qjax.nn.qat import Learned
from qjax.tensor import QuantizedTensor, with_dtype
from qjax.wrappers import Wrapper

if TYPE_CHECKING:  # many readers, imported when one is needed
    from qjax.converters.gguf import GGUFCheckpoint
    from qjax.converters.packed import PackedCheckpoint


def dense_parts(
    source: "Checkpoint | GGUFCheckpoint",
) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Parameters of a dense checkpoint, part by part, as views of mapped files.

    Args:
      source: an open Hugging Face checkpoint.

    Yields:
      Layer index (None for the embeddings, and again for what follows the layers) and
      parameters by path.

    Raises:
      UnsupportedError: the checkpoint is quantized already.
      FormatError: tensors are missing, unexpected, of the wrong shape or not floats.
    """
    packed = open_packed(source)
    if packed.kind is not None:
        raise UnsupportedError(
            f"{shown(source.directory)}: is already quantized ({packed.kind}); "
            "expected a dense checkpoint"
        )
    yield from _parts(packed)


def checkpoint_parts(
    source: "Checkpoint | PackedCheckpoint | GGUFCheckpoint",
) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Parameters of any checkpoint, part by part; quantized weights stay packed.

    Raises:
      UnsupportedError: it is quantized in a format that is not read.
      FormatError: see `dense_parts`; or packed tensors do not fit their format.
    """
    yield from _parts(open_packed(source))


def open_packed(source: Any) -> "PackedCheckpoint | GGUFCheckpoint":
    """The tensors of a checkpoint with quantized weights as one tensor each.

    Raises:
      UnsupportedError, FormatError: see `checkpoint_parts`.
    """
    from qjax.converters.packed import PackedCheckpoint
    from qjax.models import ModelConfig, plan

    if not isinstance(source, Checkpoint):
        return source
    entries = plan(ModelConfig.from_hf(source.config))
    return PackedCheckpoint(source, {entry.name: entry.shape for entry in entries})


def _parts(source: "PackedCheckpoint | GGUFCheckpoint"):
    from qjax.models import ModelConfig, match, read_parts

    config = ModelConfig.from_hf(source.config)
    found = match(config, {name: source.shape(name) for name in source.names()})
    found.check(shown(source.directory))
    for name in found.names.values():
        if not jnp.issubdtype(source.dtype(name), jnp.floating):
            raise FormatError(
                f"{shown(source.directory)}: tensor {name!r} has dtype "
                f"{source.dtype(name)}, expected a float"
            )
    for layer, part in read_parts(config, found, source.read):
        yield layer, part
        source.release()


@dataclasses.dataclass(frozen=True)
class Assets:
    """Files that belong to a model beside its weights; static, hashable.

    Attributes:
      directory: where `config.json` and the tokenizer were found: a directory, or a
        GGUF file, which has both in its metadata.
      recipe: JSON of the recipe the model was quantized with, or None.
    """

    directory: str
    recipe: str | None = None

    def files(self) -> dict[str, Path | bytes]:
        """`config.json` and tokenizer files by name: paths, or contents."""
        if is_gguf(self.directory):
            with open_checkpoint(self.directory) as source:
                return source.assets()  # pyright: ignore[reportReturnType]
        root = Path(self.directory)
        names = ("config.json", *TOKENIZER_FILES)
        return {n: contained(root, n) for n in names if os.path.lexists(root / n)}


def load(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: Any = None,
    verify: bool = True,
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any]:
    """Loads a model and its tokenizer.

    Args:
      source: qjax artifact, Hugging Face directory, GGUF file, or Hub id. Packed
        weights stay packed.
      revision: branch, tag or commit of a Hub id.
      dtype: compute dtype, which dense parameters are held in; default float32 on CPU,
        bfloat16 elsewhere.
      verify: check an artifact's digests.
      adapter: directory or Hub id of a PEFT adapter (LoRA, rsLoRA, DoRA, QA-LoRA).
        Packed weights stay packed under it, dense ones take it in.

    Returns:
      `(model, tokenizer)`: a `qjax.models.Decoder` and a `qjax.text.Tokenizer`.

    Raises:
      SpecError: no such model, or a tokenizer larger than the vocabulary.
      FormatError: a file breaks its format.
      IntegrityError: a file differs from its recorded digest.
      UnsupportedError: the architecture or the weights' format is not supported.
    """
    from qjax.models import Decoder, ModelConfig
    from qjax.models.stacks import Stacks

    default = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    compute = jnp.dtype(dtype or default)

    def stacked(layers: int, parts: Iterable[Any]) -> Stacks:
        made = Stacks(layers)
        held: Iterable[Any] = (
            (name, {path: hold(leaf, compute) for path, leaf in part.items()})
            for name, part in parts
        )
        if adapter is not None:
            from qjax.converters.adapters import attached
            from qjax.converters.peft import read_adapter

            held = attached(config, held, read_adapter(adapter), recipe)
        for _, part in held:
            made.add(part)
        return made

    if is_artifact(source):
        artifact = Artifact(source, verify=verify)
        directory, config = artifact.directory, ModelConfig.from_hf(artifact.config)
        recipe = json.dumps(artifact.manifest.get("recipe"))
        present = min(config.layers, len(artifact.files))  # a damaged one has fewer
        params = stacked(present, artifact.parts())
    else:
        with open_checkpoint(source, revision) as checkpoint:
            directory = checkpoint.directory
            config = ModelConfig.from_hf(checkpoint.config)
            recipe = None
            params = stacked(config.layers, checkpoint_parts(checkpoint))
    model = Decoder(config, params, dtype=compute)
    model.assets = Assets(str(directory), recipe)
    tokenizer = tokenizer_of(directory)
    tokenizer.check_vocab(model.config.vocab_size)
    return model, tokenizer


def tokenizer_of(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model directory or a GGUF file; see `load_tokenizer`."""
    from qjax.text import load_tokenizer, tokenizer_from

    if not is_gguf(directory):
        return load_tokenizer(directory)
    with open_checkpoint(directory) as source:
        return tokenizer_from(source.tokenizer_files, shown(directory))


def hold(leaf: Any, dtype: Any) -> Any:
    """A parameter as the model holds it: dense in the compute dtype, or packed.

    Packed leaves stay views of their file until the model stacks them.
    """
    if not isinstance(leaf, QuantizedTensor):
        return jnp.asarray(leaf).astype(dtype)
    if isinstance(leaf, Wrapper):
        return dataclasses.replace(leaf, base=hold(leaf.base, dtype))
    return with_dtype(leaf, jnp.dtype(dtype).name)


def refuse_training(model: Any, verb: str) -> None:
    """Refuses what would lose adapters, or learned scales, of a model.

    Raises:
      SpecError: it has some.
    """
    if jax.tree.leaves(nnx.state(model, Learned)):
        raise SpecError(
            f"{verb}: the model is in quantization-aware training; store its weights "
            "as codes first, with qjax.train.convert"
        )
    if jax.tree.leaves(nnx.state(model, nnx.LoRAParam)):
        raise SpecError(
            f"{verb}: the model has adapters under training; write them with "
            "qjax.train.save_adapter, or merge them first with qjax.train.merge"
        )


def save(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model as a qjax artifact, atomically.

    Args:
      model: a `Decoder` from `load` or `quantize_model`.
      directory: target; missing or empty, or with `overwrite` a model directory.
      overwrite: replace an existing model directory.

    Raises:
      SpecError: the target exists, the model has no config.json to copy, or it has
        adapters under training.
      QjaxError: no space left; the old state is intact.
    """
    assets = getattr(model, "assets", None)
    if assets is None:
        raise SpecError(
            "save: the model was not made by qjax.load or qjax.quantize_model, so "
            "there is no config.json to store with it"
        )
    refuse_training(model, "save")
    write_artifact(directory, model.parts(), assets, overwrite=overwrite)


def write_artifact(
    directory: str | os.PathLike[str],
    parts: Iterable[tuple[int | None, dict[str, Any]]],
    assets: Assets,
    *,
    overwrite: bool = False,
) -> None:
    """Writes parameters, part by part, as a qjax artifact; see `save`."""
    recipe = json.loads(assets.recipe) if assets.recipe else None
    identity = {"save": assets.directory}
    with ArtifactWriter(directory, identity, overwrite=overwrite, resume=False) as out:
        for index, (layer, part) in enumerate(parts):
            reports = {p: tensor_report(p, leaf) for p, leaf in part.items()}
            out.write(part_name(layer, index == 0), part, reports)
        out.finish({"recipe": recipe, "source": None}, assets.files())

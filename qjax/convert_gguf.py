"""Writing a model as a GGUF file.

A packed model goes over block by block, bit for bit. A dense one is written in 16 or 32
bits, or quantized first by one of llama.cpp's presets: into an artifact beside the
file, which a killed run continues from.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from qjax.artifact import Artifact, is_artifact
from qjax.checkpoint import checkpoint_parts, open_packed
from qjax.converters.huggingface import TOKENIZER_FILES, is_gguf, open_checkpoint
from qjax.errors import SpecError, UnsupportedError
from qjax.quantize import quantize_checkpoint
from qjax.recipes import LLAMA_CPP, preset
from qjax.reports import Progress

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_gguf_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    name: str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    calibration: Any = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, str]:
    """Writes `source` as one GGUF file.

    Args:
      source: qjax artifact, GGUF file, Hugging Face directory or Hub id.
      target: the file.
      name: a preset of llama.cpp, such as `Q4_K_M`, or `Q4_K_M-best` for better blocks;
        `F32`, `F16` or `BF16`; or empty for what the source holds: its blocks, or the
        dtype of its dense weights.
      revision: of a Hub id.
      overwrite: replace an existing file.
      calibration: see `quantize_model`; becomes the importance matrix of a preset.
      progress: called after each part that is quantized.

    Returns:
      Type of every packed or dense matrix, by its name in the file.

    Raises:
      SpecError: unknown preset, the file exists, or a preset for a packed source.
      UnsupportedError: the architecture, the tokenizer or a format is not in GGUF.
    """
    name = name.upper()
    mixture = name.removesuffix("-BEST")
    if name and name not in FLOATS and mixture not in LLAMA_CPP:
        known = ", ".join((*FLOATS, *LLAMA_CPP))
        raise SpecError(
            f"format gguf:{name}: expected one of {known}; or a preset with -best"
        )
    path = Path(target)
    if not is_gguf(path):
        raise SpecError(f"{path}: expected a file name that ends in .gguf")
    if path.exists() and not overwrite:
        raise SpecError(f"{path}: exists already; --force (overwrite=True) replaces it")
    if mixture not in LLAMA_CPP:
        return _written(source, path, name, revision, overwrite, None)
    stage = path.with_name(f"{path.name}.quantized")
    quantize_checkpoint(
        source,
        stage,
        preset(name),
        calibration=calibration,
        revision=revision,
        overwrite=True,
        progress=progress,
    )
    made = _written(stage, path, "", None, overwrite, mixture)
    shutil.rmtree(stage)
    return made


@contextlib.contextmanager
def _opened(source: Any, revision: str | None) -> Iterator[tuple[dict, Any, dict]]:
    """config.json, parameters part by part, and tokenizer files of any source."""
    if is_artifact(source):
        artifact = Artifact(source)
        files = {n: p for n, p in artifact.files.items() if n in TOKENIZER_FILES}
        yield artifact.config, (part for _, part in artifact.parts()), files
        return
    with open_checkpoint(source, revision) as checkpoint:
        parts = (part for _, part in checkpoint_parts(open_packed(checkpoint)))
        yield checkpoint.config, parts, dict(checkpoint.tokenizer_files)


def _kinds(source: Any, revision: str | None, name: str) -> dict[str, str]:
    """Type of every matrix by path, from one look at the source."""
    from qjax.formats import Cast, Ggml
    from qjax.tensor import QuantizedTensor

    short = {dtype: kind.lower() for kind, dtype in FLOATS.items()}
    found: dict[str, str] = {}
    with _opened(source, revision) as (_, parts, _):
        for part in parts:
            for path, leaf in part.items():
                if isinstance(leaf, QuantizedTensor):
                    fmt = leaf.format
                    if isinstance(fmt, Ggml) and not name:
                        found[path] = fmt.type
                    elif isinstance(fmt, Cast) and not name:
                        found[path] = short[fmt.dtype]
                    elif name:
                        found[path] = name.lower()
                    else:
                        raise UnsupportedError(
                            f"{os.fspath(source)}: {path} is {fmt.name}, which GGUF "
                            "has no type for; write it dense (gguf:F16), or quantize "
                            "the original model with a preset (gguf:Q4_K_M)"
                        )
                else:
                    dtype = jnp.dtype(leaf.dtype).name
                    found[path] = (name or short.get(dtype, "f32")).lower()
    return found


def _written(
    source: Any,
    path: Path,
    name: str,
    revision: str | None,
    overwrite: bool,
    preset_name: str | None,
) -> dict[str, str]:
    from qjax.converters.gguf_layout import Value
    from qjax.converters.gguf_mix import FILE_TYPES
    from qjax.converters.gguf_model import write_model
    from qjax.converters.gguf_names import is_matrix
    from qjax.converters.gguf_recipe import tensors
    from qjax.models import ModelConfig

    kinds = _kinds(source, revision, name)
    with _opened(source, revision) as (settings, parts, files):
        config = ModelConfig.from_hf(settings)
        types: dict[str, str] = {}
        for entry, place, shape in tensors(config):
            if is_matrix(place, shape):
                own = {kinds[path] for path in entry.paths if path in kinds}
                if len(own) != 1:
                    raise UnsupportedError(
                        f"{os.fspath(source)}: {place.name} is one tensor in GGUF, its "
                        f"parts are {sorted(own)}; they need one type"
                    )
                types[place.name] = own.pop()
        more: Mapping[str, Any] = {}
        wanted = preset_name or name
        if wanted in FILE_TYPES:
            more = {"general.file_type": Value("u32", FILE_TYPES[wanted])}
        write_model(
            path,
            config,
            parts,
            files,
            lambda tensor, _: types[tensor],
            more=more,
            overwrite=overwrite,
        )
    return types

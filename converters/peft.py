"""PEFT adapters on disk, read and written: LoRA, rsLoRA, DoRA and QA-LoRA.

A directory holds `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
Names are those of the base model's modules behind `base_model.model.`:

* linear layers: `lora_A.weight [r, in]` and `lora_B.weight [out, r]`; tables of
  embeddings: `lora_embedding_A [r, vocab]` and `lora_embedding_B [dim, r]`. The weight
  `[in, out]` is `W + s A^T B^T`; `s` is `alpha / r`, with rsLoRA `alpha / sqrt(r)`.
  `rank_pattern` and `alpha_pattern` change `r` and `alpha` of the layers whose names
  end in what their regular expressions match, the first that does.
* DoRA: `lora_magnitude_vector [out]`, the norm of every column of the adapted weight.
* QA-LoRA: `lora_A.weight [r, in / g]` meets the means of `g` inputs, times `in / g`.
* `modules_to_save` and `bias`: whole tensors, which replace those of the base model;
  `base_layer.weight` is what the base itself was when it was trained.

Adapters written here say in the file's metadata over which recipe they were trained,
where it changed what layers are given.

Reference: PEFT 0.21 `tuners/lora/{config,layer,dora,variants}.py`,
`utils/save_and_load.py`.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qjax.converters.checks import finite
from qjax.converters.hub import download_adapter, looks_like_hub_id
from qjax.converters.peft_settings import (
    CONFIG,
    Adapter,
    Factors,
    adapter_of,
    config_of,
)
from qjax.converters.shards import contained
from qjax.converters.torch_pickle import TorchFile
from qjax.errors import FormatError, SpecError
from qjax.io.atomic import atomic_directory, write_bytes
from qjax.io.files import shown
from qjax.io.json import encode_object, read_object
from qjax.io.safetensors import SafetensorsFile, write_safetensors

__all__ = ["Adapter", "Factors", "read_adapter", "write_adapter"]

_log = logging.getLogger(__name__)

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
TRAINED_OVER = "qjax_trained_over"
_EMBEDDINGS = ("embed_tokens", "embed_in", "embed_out", "lm_head", "wte", "wpe")
_ENDS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


def read_adapter(
    directory: str | os.PathLike[str], revision: str | None = None
) -> Adapter:
    """Reads a LoRA, rsLoRA, DoRA or QA-LoRA adapter.

    Args:
      directory: where it lies, or its id on the Hugging Face Hub.
      revision: branch, tag or commit of a Hub id.

    Raises:
      SpecError: no such adapter, or a setting with a value it cannot have.
      FormatError: a file is damaged, or its tensors do not fit its settings.
      UnsupportedError: an option that changes what the adapter computes.
    """
    root = Path(directory)
    if not root.is_dir():
        if root.exists() or not looks_like_hub_id(os.fspath(directory)):
            raise SpecError(
                f"{shown(directory)}: no such directory, and not a Hub id (owner/name)"
            )
        root = download_adapter(os.fspath(directory), revision)
    elif revision is not None:
        raise SpecError(
            f"{shown(root)}: is a local directory, revision {revision!r} is for the Hub"
        )
    if not os.path.lexists(root / CONFIG):
        raise SpecError(f"{shown(root)}: no {CONFIG}; expected a PEFT adapter")
    settings = read_object(root / CONFIG, resolved=contained(root, CONFIG))
    adapter = adapter_of(settings, shown(root / CONFIG))
    name = WEIGHTS if os.path.lexists(root / WEIGHTS) else PICKLED
    if not os.path.lexists(root / name):
        raise SpecError(f"{shown(root)}: holds neither {WEIGHTS} nor {PICKLED}")
    kind = SafetensorsFile if name == WEIGHTS else TorchFile
    with kind(root / name, contained(root, name)) as file:
        tensors = {tensor: file.read(tensor) for tensor in file.names()}
        if isinstance(file, SafetensorsFile):
            known = file.metadata.get(TRAINED_OVER)
            adapter = dataclasses.replace(adapter, trained_over=known)
    return _filled(adapter, tensors, shown(root / name))


def _filled(adapter: Adapter, tensors: Mapping[str, np.ndarray], where: str) -> Adapter:
    """Sorts the tensors of a file into the adapter, checking each."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[bool, dict[str, np.ndarray]] = {True: {}, False: {}}
    strange = []
    for name, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise FormatError(
                f"{where}: {name!r:.200} is {tensor.dtype}, expected floats"
            )
        finite(tensor, f"{where}: {name:.200}")
        own = name.removeprefix(PREFIX)
        end = next((end for end in _ENDS if own.endswith(f".{end}")), None)
        if own == name or "lora_B.bias" in own or "trainable_tokens" in own:
            strange.append(name)
        elif end is not None:
            layer = own.removesuffix(f".{end}")
            kind = "embedding." if "embedding" in end else ""
            parts.setdefault(layer, {})[kind + _ENDS[end]] = tensor
        elif (base := _replaced(adapter, own)) is not None:
            whole[base][own.replace(".base_layer.", ".")] = tensor
        else:
            strange.append(name)
    if strange:
        raise FormatError(
            f"{where}: {len(strange)} tensors that {CONFIG} does not explain, for "
            f"example {strange[0]!r:.200}; expected names like "
            f"{PREFIX}LAYER.lora_A.weight"
        )
    if not parts and not whole[True] and not whole[False]:
        raise FormatError(f"{where}: holds no tensors")
    layers = {n: _factors(adapter, n, own, where) for n, own in parts.items()}
    _warn_of_targets(adapter, layers, where)
    return dataclasses.replace(
        adapter, layers=layers, saved=whole[False], base=whole[True]
    )


def _replaced(adapter: Adapter, name: str) -> bool | None:
    """Whether a whole tensor is one of the base itself; None for neither."""
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if module.endswith(".base_layer"):
        return True
    for saved in adapter.modules_to_save:
        if f"{saved}." in f"{module}.":  # PEFT compares ends of names, not parts
            return False
    if leaf == "bias" and adapter.bias != "none":
        return True
    return True if module.rpartition(".")[2] in _EMBEDDINGS else None


def _factors(
    adapter: Adapter, name: str, parts: Mapping[str, np.ndarray], where: str
) -> Factors:
    """The arrays of one layer in the order of kernels."""
    embedding = any(part.startswith("embedding.") for part in parts)
    start = "embedding." if embedding else ""
    a, b = parts.get(f"{start}a"), parts.get(f"{start}b")
    magnitude = parts.get("magnitude")
    expected = {f"{start}a", f"{start}b"} | (
        {"magnitude"} if adapter.use_dora else set()
    )
    if a is None or b is None or set(parts) != expected:
        raise FormatError(
            f"{where}: {name!r:.200} has {sorted(parts)}, expected {sorted(expected)}"
        )
    if embedding and adapter.pool > 1:
        raise FormatError(
            f"{where}: {name!r:.200} is an embedding with use_qalora, which has none"
        )
    rank, scaling = adapter.rank_and_scaling(name, a.shape[-1] if a.ndim else 1)
    shapes = a.ndim == 2 and b.ndim == 2 and a.shape[0] == rank == b.shape[1]
    if not shapes or not a.size or not b.size:
        raise FormatError(
            f"{where}: {name!r:.200} has A {list(a.shape)} and B {list(b.shape)}, "
            f"expected [{rank}, in] and [out, {rank}] as {CONFIG} says"
        )
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise FormatError(
            f"{where}: {name!r:.200} has {list(magnitude.shape)} magnitudes, expected "
            f"{[b.shape[0]]}"
        )
    return Factors(a.T, b.T, scaling, magnitude, embedding, adapter.pool)


def _warn_of_targets(
    adapter: Adapter, layers: Mapping[str, Factors], where: str
) -> None:
    """PEFT itself passes over tensors of layers that are not targets."""
    targets = adapter.target_modules
    if not isinstance(targets, tuple):
        return
    ends = tuple(f".{target}" for target in targets)
    ends += (".lm_head",) * adapter.ensure_weight_tying
    others = [name for name in layers if not f".{name}".endswith(ends)]
    if others:
        _log.warning(
            "%s: %d layers are not among target_modules, for example %.200s; PEFT "
            "leaves them out, here they count",
            where,
            len(others),
            others[0],
        )


def write_adapter(
    directory: str | os.PathLike[str], adapter: Adapter, *, overwrite: bool = False
) -> None:
    """Writes an adapter that PEFT loads.

    Args:
      directory: target; missing or empty, or with `overwrite` an adapter's.
      adapter: what to write; 16-bit and 32-bit floats stay what they are.
      overwrite: replace an existing adapter.

    Raises:
      SpecError: the target exists, or the settings do not give the rank and the scale
        that a layer has.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, own in adapter.layers.items():
        _check_layer(adapter, name, own)
        a, b = ("embedding_A", "embedding_B") if own.embedding else ("A", "B")
        end = "" if own.embedding else ".weight"
        start = f"{PREFIX}{name}.lora_"
        tensors[f"{start}{a}{end}"] = own.a.T
        tensors[f"{start}{b}{end}"] = own.b.T
        if own.magnitude is not None:
            tensors[f"{start}magnitude_vector"] = own.magnitude
    for name, tensor in adapter.saved.items():
        tensors[PREFIX + name] = tensor
    for name, tensor in adapter.base.items():
        layer, _, leaf = name.rpartition(".")
        own = f"{layer}.base_layer.{leaf}" if layer in adapter.layers else name
        tensors[PREFIX + own] = tensor
    metadata = {"format": "pt"}
    if adapter.trained_over is not None:
        metadata[TRAINED_OVER] = adapter.trained_over
    with atomic_directory(directory, overwrite=overwrite) as work:
        write_safetensors(work / WEIGHTS, tensors, metadata=metadata)
        write_bytes(work / CONFIG, encode_object(config_of(adapter)))


def _check_layer(adapter: Adapter, name: str, own: Factors) -> None:
    """Refuses a layer that is not what the settings say."""
    stated = adapter.rank_and_scaling(name, own.a.shape[0])
    if stated[0] != own.rank or not math.isclose(stated[1], own.scaling):
        raise SpecError(
            f"write_adapter: {name} has rank {own.rank} and scale "
            f"{own.scaling:g}; r, alpha and their patterns give {stated[0]} and "
            f"{stated[1]:g}"
        )
    if own.pool != adapter.pool:
        raise SpecError(
            f"write_adapter: {name} averages {own.pool} inputs, the settings say "
            f"{adapter.pool}"
        )
    if (own.magnitude is not None) != adapter.use_dora:
        raise SpecError(
            f"write_adapter: {name} has {'' if adapter.use_dora else 'a '}magnitude"
            f"{' missing' if adapter.use_dora else ''}; use_dora is "
            f"{adapter.use_dora}"
        )

"""Models that are shapes only: architectures by name, packed weights that do not exist.

Everything that compiles a model can take one of these in its place.
"""

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.artifact import Artifact, is_artifact
from qjax.budget import packed_shapes
from qjax.converters.gguf_recipe import mixture
from qjax.converters.hub import download_config, looks_like_hub_id
from qjax.errors import SpecError
from qjax.io.json import read_object
from qjax.models import Decoder, ModelConfig, param_shapes
from qjax.parameter import TABLES
from qjax.recipes import Recipe, load_recipe, recipe_from_dict

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def _llama(dim: int, mlp: int, layers: int, heads: int, kv: int, **more: Any) -> Any:
    return {
        **_LLAMA,
        "hidden_size": dim,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        **more,
    }


_LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 5e5}
KNOWN: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, **_LLAMA3),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, **_LLAMA3),
}
"""Shapes of models by name, as their `config.json` has them."""


def find_config(
    source: str | os.PathLike[str], revision: str | None = None
) -> tuple[ModelConfig, Recipe | None]:
    """Returns the architecture of a model, and the recipe it is packed by if it is.

    Args:
      source: A name in `KNOWN`, a `config.json`, a model directory, a qjax artifact or
        a Hub id.
      revision: Of a Hub id.

    Raises:
      SpecError: There is no such model.
      FormatError, UnsupportedError: Its configuration cannot be read.
    """
    name = os.fspath(source)
    if name.lower() in KNOWN:
        return ModelConfig.from_hf(KNOWN[name.lower()]), None
    path = Path(name)
    if path.suffix == ".json":
        return ModelConfig.from_hf(read_object(path)), None
    if is_artifact(path):
        artifact = Artifact(path, verify=False)
        recipe = artifact.manifest.get("recipe")
        used = None if recipe is None else recipe_from_dict(recipe)
        return ModelConfig.from_hf(artifact.config), used
    if (path / "config.json").is_file():
        return ModelConfig.from_hf(read_object(path / "config.json")), None
    if not looks_like_hub_id(name) or "/" not in name:
        near = difflib.get_close_matches(name.lower(), KNOWN, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise SpecError(
            f"{name!r:.100}: no such model; {hint}expected one of {', '.join(KNOWN)}, "
            "a config.json, a model directory or a Hub id"
        )
    found = read_object(download_config(name, revision))
    return ModelConfig.from_hf(found), None


def abstract_decoder(
    config: ModelConfig,
    recipe: Recipe | str | None,
    *,
    dtype: Any = jnp.bfloat16,
    change: Callable[[Decoder], Any] | None = None,
) -> Decoder:
    """Returns a model whose arrays are `jax.ShapeDtypeStruct`s.

    Args:
      config: The architecture.
      recipe: How weights are packed; None for dense ones.
      dtype: Compute dtype, and that of dense weights.
      change: Done to the model before it is returned, such as attaching adapters.

    Raises:
      SpecError: There is no such recipe, or it does not fit a weight.
    """
    chosen = None
    if recipe is not None:
        chosen = mixture(load_recipe(recipe), config, imatrix=False)

    def leaf(path: str, shape: tuple[int, ...]) -> Any:
        rule = None if chosen is None else chosen.match(path, shape)
        if rule is None or rule.format is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        rows, cols = shape
        return packed_shapes((rows, cols), rule.format, rule.method, path in TABLES)

    params = {path: leaf(path, shape) for path, shape in param_shapes(config).items()}

    def make(params: Any) -> Decoder:
        model = Decoder(config, params, dtype=dtype)
        if change is not None:
            change(model)
        return model

    return nnx.eval_shape(make, params)

"""llama.cpp's presets as recipes: every matrix of one model with its type."""

from qjax.converters.gguf_export import family_of
from qjax.converters.gguf_mix import mix_for
from qjax.converters.gguf_names import Place, gguf_names, is_matrix, places
from qjax.formats import Cast, Format, Ggml
from qjax.formats.ggml import TYPES
from qjax.methods import RTN
from qjax.methods.ggml import GGML
from qjax.methods.ggml_kinds import BETTER
from qjax.models import ModelConfig, plan
from qjax.models.weights import Entry
from qjax.recipes import Recipe, Rule


def tensors(config: ModelConfig) -> list[tuple[Entry, Place, tuple[int, ...]]]:
    """Every tensor of a model: as in transformers, its place in GGUF, its shape there.

    Raises:
      UnsupportedError: llama.cpp has no such architecture.
    """
    family = family_of(config)
    sizes = {
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
    }
    found = places(gguf_names(family, config.layers), family, sizes)
    made = []
    for entry in plan(config):
        if not entry.optional:
            place = found[entry.name]
            shape = entry.shape[::-1] if place.turned else entry.shape
            made.append((entry, place, shape))
    return made


def mixture(recipe: Recipe, config: ModelConfig, *, imatrix: bool) -> Recipe:
    """A recipe that names a preset of llama.cpp, with a rule for every matrix.

    Args:
      recipe: any; without `mixture` it is returned as it is.
      config: the model.
      imatrix: whether there is calibration.

    Raises:
      UnsupportedError: llama.cpp has no such architecture.
    """
    if recipe.mixture is None:
        return recipe
    mix = mix_for(recipe.mixture, config, imatrix=imatrix)
    rules = []
    for entry, place, shape in tensors(config):
        if not is_matrix(place, shape):
            continue
        kind = mix.type_of(place.name, shape)
        own = TYPES[kind].dtype
        fmt: Format = Ggml(kind) if own is None else Cast(own)
        mode = "best" if recipe.best and kind in BETTER else "llamacpp"
        method = GGML(mode) if own is None else RTN()
        rules += [Rule(path, fmt, method) for path in entry.paths]
    return Recipe(tuple(rules), recipe.name)

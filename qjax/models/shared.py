"""Readers of what several families' configurations share.

Decides the ranges of sizes, how one rotary table is found under its old and new
spellings, and how sliding windows are laid over the layers.
"""

from collections.abc import Callable
from typing import Any

from qjax.errors import SpecError, UnsupportedError
from qjax.models.config import ACTIVATIONS
from qjax.models.reader import REQUIRED, ConfigReader
from qjax.models.rope import Rope, read_rope

MAX_DIM = 2**20
MAX_LAYERS = 2**13
MAX_HEADS = 2**14
MAX_VOCAB = 2**24


def read_sizes(
    r: ConfigReader,
    *,
    mlp: tuple[str, ...] = ("intermediate_size",),
    kv_heads: int | None = None,
    head_dim: int | None = None,
    context: Any = REQUIRED,
) -> dict[str, Any]:
    """Reads what every family has: widths, counts, context, special tokens."""
    dim = r.integer("hidden_size", "n_embd", high=MAX_DIM)
    heads = r.integer("num_attention_heads", "n_head", high=MAX_HEADS)
    if "head_dim" not in r.data and head_dim is None and dim % heads:
        raise SpecError(
            f"config.json: key 'hidden_size' is {dim}, not a multiple of "
            f"'num_attention_heads' ({heads}); expected a multiple, or 'head_dim'"
        )
    own = head_dim or dim // heads or 1
    shared = kv_heads or heads
    return {
        "vocab_size": r.integer("vocab_size", high=MAX_VOCAB),
        "dim": dim,
        "layers": r.integer("num_hidden_layers", "n_layer", high=MAX_LAYERS),
        "heads": heads,
        "kv_heads": r.integer(
            "num_key_value_heads", high=MAX_HEADS, default=shared, null=heads
        ),
        "head_dim": r.integer("head_dim", high=MAX_DIM, default=own, null=own),
        "mlp_dim": r.integer(*mlp, high=2**24),
        "max_context": r.integer(
            "max_position_embeddings", "n_positions", default=context
        ),
        "bos_id": next(iter(read_token_ids(r.data.get("bos_token_id"))), None),
        "eos_ids": read_token_ids(r.data.get("eos_token_id")),
    }


def read_token_ids(value: Any) -> tuple[int, ...]:
    """Returns the usable ids of a token entry: an id, a list of ids, null or -1."""
    several = value if isinstance(value, list) else [value]
    return tuple(v for v in several if type(v) is int and v >= 0)


def read_activation(r: ConfigReader, *keys: str, default: str) -> str:
    """Returns the decoder's name of an activation."""
    name = r.text(*keys, default=default, null=default)
    if name not in ACTIVATIONS:
        raise UnsupportedError(
            f"{r.where}: activation {name!r} is not supported; supported: "
            + ", ".join(sorted(ACTIVATIONS))
        )
    return ACTIVATIONS[name]


def read_single_rope(
    r: ConfigReader, sizes: dict[str, Any], part: float | None = None
) -> Rope:
    """Reads the one rotary table of a family; `part` is the default rotating share."""
    table = r.table("rope_scaling") or r.table("rope_parameters")
    if table and {"full_attention", "sliding_attention"} & set(table.data):
        raise UnsupportedError(
            f"{table.where}: rotary settings per layer type are not supported for this "
            "architecture"
        )
    inner = table or r
    share = inner.number(
        "partial_rotary_factor",
        high=1.0,
        default=r.number("partial_rotary_factor", "rotary_pct", high=1.0, default=part),
        null=part,
    )
    if part is None and share not in (None, 1.0):
        raise UnsupportedError(
            f"{r.where}: 'partial_rotary_factor' is {share}; this architecture "
            "rotates whole heads"
        )
    return read_rope(
        table,
        dim=int(sizes["head_dim"] * (share or 1.0)),
        theta=r.number("rope_theta", "rotary_emb_base", default=1e4, null=1e4),
        context=sizes["max_context"],
        pretrained=r.integer("original_max_position_embeddings", default=None),
    )


def read_windows(
    r: ConfigReader, layers: int, window: int | None, pattern: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """Returns the window per layer, from `layer_types` or else `pattern(layer)`."""
    kinds = r.texts("layer_types", layers, ("full_attention", "sliding_attention"))
    slides = (
        [pattern(i) for i in range(layers)]
        if kinds is None
        else [kind == "sliding_attention" for kind in kinds]
    )
    if window is None or not any(slides):
        return ()
    return tuple(window if slide else None for slide in slides)

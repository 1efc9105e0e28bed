"""Names and order of rows: the tensors of a GGUF file as those of transformers.

What llama.cpp's conversion changes, and how it is undone on packed rows:

* `llama`: rows of query and key are in the order of interleaved pairs, head by head
  (`[heads, 2, d / 2]` with the last two axes swapped), biases too;
* `gpt_neox`: query, key and value are one after the other, not head by head;
* `gpt2`: matrices are `[out, in]`, Conv1D's are `[in, out]`;
* `gemma`: 1 was added to the weights of norms.

Rows are outputs, so every one of these moves whole rows and no block is taken apart.

Reference: ggml-org/llama.cpp, `gguf-py/gguf/tensor_mapping.py` and `conversion/`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.errors import FormatError

_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,3})\.")
_SHARED = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    **_SHARED,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYERS: dict[str, dict[str, str]] = {
    "llama": _SHARED,
    "qwen2": _SHARED,
    "qwen3": _SHARED,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": {
        **_SHARED,
        "attn_qkv": "self_attn.qkv_proj",
        "ffn_up": "mlp.gate_up_proj",
    },
    "gpt_neox": {
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
    "gpt2": {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
}
_ENDS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_WHOLE: dict[str, tuple[str, dict[str, str]]] = {
    "gpt_neox": (
        "gpt_neox.layers.",
        {
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
    ),
    "gpt2": (
        "transformer.h.",
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of transformers lies in a GGUF file.

    Attributes:
      name: its name in the GGUF file.
      heads: number of heads whose rows were moved; 0 where rows are in order.
      joined: of rows that were moved, whether three parts (query, key and value of
        every head) stand one after the other; else pairs are interleaved.
      turned: stored as the transpose.
      added: what llama.cpp added to every number.
    """

    name: str
    heads: int = 0
    joined: bool = False
    turned: bool = False
    added: float = 0.0

    def rows(self, count: int) -> np.ndarray | None:
        """The row of the GGUF tensor that each row of the tensor is.

        Args:
          count: number of rows.

        Returns:
          Row numbers, or None where rows are in order.

        Raises:
          FormatError: so many rows do not belong to so many heads.
        """
        if not self.heads:
            return None
        parts = 3 if self.joined else 2
        if count % (parts * self.heads):
            raise FormatError(
                f"{self.name}: {count} rows, expected a multiple of {parts} times the "
                f"{self.heads} heads"
            )
        every = np.arange(count)
        if self.joined:
            return every.reshape(3, self.heads, -1).swapaxes(0, 1).reshape(-1)
        return every.reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)


def hf_name(name: str, family: str) -> str | None:
    """What transformers calls a tensor; None for one that it does not have.

    Args:
      name: as in the GGUF file, such as `blk.3.attn_q.weight`.
      family: `model_type`.
    """
    stem, _, end = name.rpartition(".")
    prefix, ends = _WHOLE.get(family, ("model.layers.", _ENDS))
    found = _LAYER.match(stem)
    if found is None:
        own = ends.get(stem)
    else:
        own = _LAYERS[family].get(stem[found.end() :])
        own = own and f"{prefix}{int(found[1])}.{own}"
    return own and f"{own}.{end}"


def gguf_names(family: str, layers: int) -> list[str]:
    """Every name that a tensor of an architecture can have in a GGUF file."""
    _, ends = _WHOLE.get(family, ("", _ENDS))
    stems = [*ends]
    stems += [f"blk.{i}.{own}" for i in range(layers) for own in _LAYERS[family]]
    return [f"{stem}.{end}" for stem in stems for end in ("weight", "bias")]


def places(names: Any, family: str, config: Mapping[str, Any]) -> dict[str, Place]:
    """Where every tensor of a model lies, by its name in transformers.

    Args:
      names: names of the tensors of a GGUF file.
      family: `model_type`.
      config: `config.json`, for numbers of heads.
    """
    heads = config["num_attention_heads"]
    found: dict[str, Place] = {}
    for name in names:
        own = hf_name(name, family)
        if own is None:
            continue
        place = Place(name)
        if family == "llama" and ".attn_q." in name:
            place = Place(name, heads=heads)
        elif family == "llama" and ".attn_k." in name:
            place = Place(name, heads=config["num_key_value_heads"])
        elif family == "gpt_neox" and ".attn_qkv." in name:
            place = Place(name, heads=heads, joined=True)
        elif family == "gpt2" and name.startswith("blk.") and name.endswith(".weight"):
            place = Place(name, turned="_norm" not in name)
        elif family.startswith("gemma") and name.endswith("norm.weight"):
            place = Place(name, added=1.0)
        found[own] = place
    return found


def is_matrix(place: Place, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is multiplied by, and may be packed; others are floats."""
    return len(shape) == 2 and place.name != "position_embd.weight"

"""Tables of tensor names: one `Layout` per family, read by `qjax.models.weights`.

A row is (suffix of the checkpoint name, how it is stored, parameter paths). Rows whose
parameters a configuration does not have (biases, gates, extra norms) are skipped.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kind:
    """How parameters lie in a checkpoint tensor.

    Attributes:
        transposed: Stored `[out, in]`.
        interleaved: Several parameters alternate head by head, rather than one after
            the other.
    """

    transposed: bool = False
    interleaved: bool = False


Row = tuple[str, Kind, tuple[str, ...]]

_PLAIN, _TORCH = Kind(), Kind(transposed=True)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names of one family.

    Attributes:
        base: Prefix of the base model.
        bases: Other prefixes seen in published files.
        layers: Name of the list of layers.
        embed: Rows of the embeddings; the token embedding first.
        layer: Rows of one layer.
        norm: Rows of the last norm.
        head: Name of the output head, then its other names.
    """

    base: str
    bases: tuple[str, ...]
    layers: str
    embed: tuple[Row, ...]
    layer: tuple[Row, ...]
    norm: tuple[Row, ...]
    head: tuple[str, ...] = ("lm_head.weight",)


def _norm(name: str, path: str) -> tuple[Row, ...]:
    return (
        (f"{name}.weight", _PLAIN, (f"{path}.scale",)),
        (f"{name}.bias", _PLAIN, (f"{path}.bias",)),
    )


def _linear(
    name: str, *paths: str, torch: bool = True, interleaved: bool = False
) -> tuple[Row, ...]:
    kernels = tuple(f"{path}.kernel" for path in paths)
    biases = tuple(f"{path}.bias" for path in paths)
    return (
        (f"{name}.weight", Kind(torch, interleaved), kernels),
        (f"{name}.bias", Kind(False, interleaved), biases),
    )


_QKV = ("attn.q", "attn.k", "attn.v")
_SELF = (
    *_linear("self_attn.q_proj", "attn.q"),
    *_linear("self_attn.k_proj", "attn.k"),
    *_linear("self_attn.v_proj", "attn.v"),
)
_QK_NORMS = (
    *_norm("self_attn.q_norm", "attn.q_norm"),
    *_norm("self_attn.k_norm", "attn.k_norm"),
)
_GATED = (
    *_linear("mlp.gate_proj", "mlp.gate"),
    *_linear("mlp.up_proj", "mlp.up"),
    *_linear("mlp.down_proj", "mlp.down"),
)
_OUT = _linear("self_attn.o_proj", "attn.o")
_TOKENS: tuple[Row, ...] = (("embed_tokens.weight", _PLAIN, ("embed.embedding",)),)


def _llama_like(*rows: Row) -> Layout:
    return Layout("model.", ("",), "layers", _TOKENS, rows, _norm("norm", "norm"))


_LLAMA = _llama_like(
    *_norm("input_layernorm", "attn_norm"),
    *_SELF,
    *_QK_NORMS,
    *_OUT,
    *_norm("post_attention_layernorm", "mlp_norm"),
    *_GATED,
)
_GEMMA = _llama_like(
    *_norm("input_layernorm", "attn_norm"),
    *_SELF,
    *_QK_NORMS,
    *_OUT,
    *_norm("post_attention_layernorm", "attn_post_norm"),
    *_norm("pre_feedforward_layernorm", "mlp_norm"),
    *_GATED,
    *_norm("post_feedforward_layernorm", "mlp_post_norm"),
)

LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _llama_like(
        *_norm("input_layernorm", "attn_norm"),
        *_linear("self_attn.qkv_proj", *_QKV),
        *_OUT,
        *_norm("post_attention_layernorm", "mlp_norm"),
        *_linear("mlp.gate_up_proj", "mlp.gate", "mlp.up"),
        *_linear("mlp.down_proj", "mlp.down"),
    ),
    "gpt_neox": Layout(
        "gpt_neox.",
        ("",),
        "layers",
        (("embed_in.weight", _PLAIN, ("embed.embedding",)),),
        (
            *_norm("input_layernorm", "attn_norm"),
            *_linear("attention.query_key_value", *_QKV, interleaved=True),
            *_linear("attention.dense", "attn.o"),
            *_norm("post_attention_layernorm", "mlp_norm"),
            *_linear("mlp.dense_h_to_4h", "mlp.up"),
            *_linear("mlp.dense_4h_to_h", "mlp.down"),
        ),
        _norm("final_layer_norm", "norm"),
        ("embed_out.weight", "lm_head.weight"),
    ),
    "gpt2": Layout(
        "transformer.",
        ("",),
        "h",
        (
            ("wte.weight", _PLAIN, ("embed.embedding",)),
            ("wpe.weight", _PLAIN, ("embed.position",)),
        ),
        (
            *_norm("ln_1", "attn_norm"),
            *_linear("attn.c_attn", *_QKV, torch=False),
            *_linear("attn.c_proj", "attn.o", torch=False),
            *_norm("ln_2", "mlp_norm"),
            *_linear("mlp.c_fc", "mlp.up", torch=False),
            *_linear("mlp.c_proj", "mlp.down", torch=False),
        ),
        _norm("ln_f", "norm"),
    ),
    "opt": Layout(
        "model.decoder.",
        ("decoder.", ""),
        "layers",
        (
            *_TOKENS,
            ("embed_positions.weight", _PLAIN, ("embed.position",)),
        ),
        (
            *_norm("self_attn_layer_norm", "attn_norm"),
            *_SELF,
            *_linear("self_attn.out_proj", "attn.o"),
            *_norm("final_layer_norm", "mlp_norm"),
            *_linear("fc1", "mlp.up"),
            *_linear("fc2", "mlp.down"),
        ),
        _norm("final_layer_norm", "norm"),
    ),
}
"""Tensor names by `model_type`."""


def turned(kind: object) -> tuple[str, ...]:
    """Ends of names of matrices that are stored `[in, out]`: transformers' Conv1D.

    Quantizers store them as those of linear layers, which are dense `[out, in]`.

    Args:
      kind: `model_type` of config.json.
    """
    rows = LAYOUTS[str(kind)].layer if str(kind) in LAYOUTS else ()
    return tuple(
        f".{name}"
        for name, stored, paths in rows
        if not stored.transposed and paths[0].endswith(".kernel")
    )

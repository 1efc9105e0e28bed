"""What a decoder is made of: `ModelConfig`, read from a Hugging Face `config.json`.

Decides which architectures exist for qjax and refuses the rest by name. Reading needs
no transformers and never runs code that a configuration names: `auto_map` is ignored
with a warning. Everything that distinguishes the families is data here, so the decoder
has no branch on a family's name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.errors import SpecError, UnsupportedError
from qjax.models.reader import ConfigReader
from qjax.models.rope import Rope, brief

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
"""Names of activations in configurations, and what the decoder calls them."""


@dataclasses.dataclass(frozen=True, repr=False)
class ModelConfig:
    """Shape and kind of one decoder-only language model; hashable, static under jit.

    Attributes:
        family: Which checkpoint layout the weights follow, such as `"llama"`.
        vocab_size: Rows of the embedding.
        dim: Width of the residual stream.
        layers: Number of blocks.
        heads: Query heads.
        kv_heads: Key and value heads; divides `heads`.
        head_dim: Width of one head.
        mlp_dim: Hidden width of the MLP.
        max_context: Positions the model was trained or configured for.
        norm: `"rms"` or `"layer"`.
        norm_eps: Added to the variance.
        norm_offset: Added to the stored scale (1 for Gemma).
        norm_affine: Whether norms have a scale (and a bias, for `"layer"`).
        norm_after: Norms follow the residual sum instead of preceding it (OPT-350m).
        final_norm: Whether a norm precedes the head.
        post_norms: Extra norms on what attention and MLP return (Gemma 2, 3).
        qk_norm: RMS norm of every query and key head (Qwen 3, Gemma 3).
        parallel_residual: Attention and MLP read the same input (GPT-NeoX).
        ropes: Rotary tables; empty for learned positions.
        rope_layers: Index into `ropes` per layer; empty if all use the first.
        position_offset: Rows skipped in a learned position table (2 for OPT).
        windows: Sliding window per layer, None for full attention; empty if all full.
        attention_scale: Multiplies query-key products.
        attention_scale_by_layer: Divide that further by layer number (from 1).
        attention_softcap: Bound c of `c tanh(score / c)`, or None.
        logit_softcap: The same for logits.
        activation: One of the values of `ACTIVATIONS`.
        gated: `down(act(gate x) * up x)` instead of `down(act(up x))`.
        qkv_bias: Biases on query, key and value.
        out_bias: Bias on the attention output.
        mlp_bias: Biases in the MLP.
        tied: The head is the embedding, transposed.
        embed_scale: Multiplies embeddings (sqrt(dim) for Gemma).
        bos_id: Beginning-of-text token, if any.
        eos_ids: End-of-text tokens.
    """

    family: str
    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    max_context: int
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_affine: bool = True
    norm_after: bool = False
    final_norm: bool = True
    post_norms: bool = False
    qk_norm: bool = False
    parallel_residual: bool = False
    ropes: tuple[Rope, ...] = ()
    rope_layers: tuple[int, ...] = ()
    position_offset: int = 0
    windows: tuple[int | None, ...] = ()
    attention_scale: float = 1.0
    attention_scale_by_layer: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    embed_scale: float = 1.0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise SpecError(
                f"model config: {self.heads} query heads cannot share "
                f"{self.kv_heads} key/value heads; expected a divisor of {self.heads}"
            )
        if self.norm not in ("rms", "layer"):
            raise SpecError(f"model config: norm {self.norm!r}; expected rms or layer")
        if self.activation not in ACTIVATIONS.values():
            raise UnsupportedError(
                f"activation {self.activation!r} is not supported; supported: "
                + ", ".join(sorted(ACTIVATIONS))
            )
        for name in ("rope_layers", "windows"):
            count = len(getattr(self, name))
            if count not in (0, self.layers):
                raise SpecError(
                    f"model config: {name} has {count} entries; expected one per "
                    f"layer ({self.layers}) or none"
                )
        for rope in self.ropes:
            if rope.dim > self.head_dim or rope.dim != self.ropes[0].dim:
                raise SpecError(
                    f"model config: {rope.dim} rotary dimensions do not fit heads of "
                    f"{self.head_dim} or differ between layers"
                )

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Reads a parsed `config.json`.

        Args:
            data: The JSON object. Both spellings of rotary settings are understood:
                `rope_theta` with `rope_scaling`, and `rope_parameters`.

        Returns:
            The configuration.

        Raises:
            SpecError: A key is missing, has the wrong type or is out of range.
            UnsupportedError: The architecture or one of its options is not supported.
        """
        from qjax.models.families import read_config  # which needs this class

        return read_config(ConfigReader(data))

    def __repr__(self) -> str:
        return brief(self)

    @property
    def q_dim(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads."""
        return self.kv_heads * self.head_dim

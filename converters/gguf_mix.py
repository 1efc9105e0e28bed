"""Which type every matrix gets under one of llama.cpp's presets.

`Q4_K_M` and its like are no types but mixtures: some matrices of some layers get more
bits. `MIXES` names the type that most get; `type_of` has the exceptions, for models
without experts. Which rows a preset's name stood for has changed over time, so files
are read by what they contain, never by these rules.

Reference: ggml-org/llama.cpp, `src/llama-quant.cpp` of August 2026.
"""

import dataclasses
import re

from qjax.errors import SpecError
from qjax.formats.ggml import TYPES
from qjax.models import ModelConfig

_PLAIN = "q4_0 q4_1 q5_0 q5_1 q8_0 q6_k q2_k iq1_s iq1_m iq2_xxs iq2_xs iq3_xxs"
_PLAIN += " iq3_s iq4_nl iq4_xs tq1_0 tq2_0"
MIXES: dict[str, str] = {
    **{name.upper(): name for name in _PLAIN.split()},
    **{f"Q2_K{end}": "q2_k" for end in ("", "_S")},
    **{f"Q3_K_{end}": "q3_k" for end in "SML"},
    **{f"Q4_K_{end}": "q4_k" for end in "SM"},
    **{f"Q5_K_{end}": "q5_k" for end in "SM"},
    **{"IQ2_S": "iq2_xs", "IQ2_M": "iq2_s", "IQ3_XS": "iq3_s", "IQ3_M": "iq3_s"},
    **{"F32": "f32", "F16": "f16", "BF16": "bf16"},
}
"""The type of most matrices, by preset."""
FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9},
    **{"Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14},
    **{"Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19},
    **{"IQ2_XS": 20, "Q2_K_S": 21, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24},
    **{"IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29},
    **{"IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37},
}
"""`general.file_type` of each preset."""
_SMALLER = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_SMALLER |= dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0")
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclasses.dataclass(frozen=True)
class Mix:
    """A preset for one model.

    Attributes:
      preset: one of `MIXES`.
      layers: blocks of the model.
      shared: query heads per key head.
      large: whether llama.cpp calls it a 70B model.
      imatrix: whether importances of inputs are known.
      tied: whether the embeddings are the head.
    """

    preset: str
    layers: int
    shared: int
    large: bool
    imatrix: bool
    tied: bool

    def type_of(self, name: str, shape: tuple[int, ...]) -> str:
        """The type of a matrix.

        Args:
          name: in the file.
          shape: `[out, in]`.
        """
        base = MIXES[self.preset]
        if TYPES[base].dtype is not None:
            return base
        found = _LAYER.fullmatch(name)
        if found is not None:
            kind = self._layer(base, int(found[1]), found[2])
        elif name == "output.weight" or self.tied:
            kind = self._output(base, shape[-1])
        else:
            kind = self._embedding(base)
        return _fitting(kind, shape[-1])

    def _output(self, base: str, width: int) -> str:
        if width % TYPES[base].elements:
            return "q8_0"
        if self.preset.startswith(("IQ1_", "IQ2_")) or self.preset == "IQ3_XXS":
            return "q5_k"
        return base if base == "q8_0" else "q6_k"

    def _embedding(self, base: str) -> str:
        if self.preset in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"):
            return "q2_k"
        if self.preset in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
            return "iq3_s"
        return "q4_k" if base in ("tq1_0", "tq2_0") else base

    def _layer(self, base: str, layer: int, name: str) -> str:
        count = self.layers
        early = layer < count // 8
        more = early or layer >= 7 * count // 8 or (layer - count // 8) % 3 == 2
        value = name in ("attn_v", "attn_qkv")
        kind = self._tiny(base, name, early, value)
        if kind is not None:
            return kind
        if value:
            kind = self._value(base, layer, more)
            raised = self.large and kind in ("q3_k", "q4_k")
            return "q5_k" if raised else kind
        if name == "ffn_down":
            return self._down(base, layer, early, more)
        if name == "attn_output":
            own = {"Q2_K": "q3_k", "Q3_K_M": "q4_k", "Q3_K_L": "q5_k", "IQ3_M": "q4_k"}
            return {**own, "IQ3_XXS": "iq3_s"}.get(self.preset, base)
        if name in ("attn_q", "attn_k"):
            own = {"IQ3_XS": "iq3_xxs", "IQ3_XXS": "iq2_s"}
            return own.get(self.preset, base)
        inner = count // 8 <= layer < 7 * count // 8
        if self.preset == "IQ3_XS" and name in ("ffn_gate", "ffn_up") and inner:
            return "iq3_xxs"
        return base

    def _tiny(self, base: str, name: str, early: bool, value: bool) -> str | None:
        """The presets of one and two bits, which have rules of their own."""
        if not self.preset.startswith(("IQ1_", "IQ2_")):
            return None
        wide = self.preset in ("IQ2_S", "IQ2_M")
        if value:
            return "q4_k" if self.shared >= 4 else "iq3_s" if wide else "q2_k"
        if name == "ffn_down" and early:
            return "iq3_s" if wide else "q2_k"
        if name == "attn_output" and wide:
            return "iq3_s"
        if name == "attn_output" and self.preset.startswith("IQ1_"):
            return "iq2_xxs"
        return base

    def _value(self, base: str, layer: int, more: bool) -> str:
        """Values, and query, key and value in one."""
        preset, grouped = self.preset, self.shared >= 4
        if preset == "Q2_K":
            return "q4_k" if grouped else "q3_k"
        if preset in ("Q2_K_S", "IQ3_S", "IQ3_XS") and grouped:
            return "q4_k"
        if preset == "Q3_K_M":
            return "q5_k" if layer < 2 else "q4_k"
        if preset == "IQ3_XXS":
            return "q4_k" if grouped else "iq3_xxs" if self.imatrix else "iq3_s"
        if preset in ("Q4_K_M", "Q5_K_M") and more:
            return "q6_k"
        if preset == "Q4_K_S" and layer < 4:
            return "q5_k"
        if preset in ("IQ4_NL", "IQ4_XS") and grouped:
            return "q5_k"
        return {"Q3_K_L": "q5_k", "IQ3_M": "q4_k"}.get(preset, base)

    def _down(self, base: str, layer: int, early: bool, more: bool) -> str:
        preset = self.preset
        if preset == "Q2_K":
            return "q3_k"
        if preset == "Q3_K_M":
            return "q5_k" if layer < self.layers // 16 else "q4_k"
        if preset == "Q3_K_L":
            return "q5_k"
        if preset in ("Q4_K_M", "Q5_K_M") and more:
            return "q6_k"
        if preset == "IQ3_XXS" and not self.imatrix:
            return "q4_k" if early else "q3_k"
        if early:
            plain = {"Q2_K_S": "q4_k", "Q4_K_S": "q5_k", "IQ3_M": "q4_k"}
            raised = {"Q4_0": "q4_1", "Q5_0": "q5_1"} if self.imatrix else {}
            bare = {} if self.imatrix else {"IQ4_NL": "q5_k", "IQ4_XS": "q5_k"}
            return {**plain, **raised, **bare}.get(preset, base)
        return base


def _fitting(kind: str, width: int) -> str:
    """The type itself, or one of smaller blocks where rows are no whole blocks."""
    if width % TYPES[kind].elements == 0:
        return kind
    smaller = "iq4_nl" if kind.startswith("iq") else _SMALLER.get(kind, "f16")
    return smaller if width % TYPES[smaller].elements == 0 else "f16"


def mix_for(preset: str, config: ModelConfig, *, imatrix: bool) -> Mix:
    """A preset for a model.

    Args:
      preset: as llama.cpp names it, upper or lower case.
      config: the model.
      imatrix: whether importances of inputs are known.

    Raises:
      SpecError: no such preset.
    """
    name = preset.upper()
    if name not in MIXES:
        raise SpecError(
            f"GGUF preset {preset!r:.100}: expected one of {', '.join(MIXES)}"
        )
    large = config.layers == 80 and (
        config.family == "qwen2" or config.heads != config.kv_heads
    )
    large = large and config.family in ("llama", "mistral", "qwen2")
    shared = config.heads // config.kv_heads
    return Mix(name, config.layers, shared, large, imatrix, config.tied)

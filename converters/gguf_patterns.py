r"""How text is cut into words before byte-level BPE, by the names that GGUF files use.

`tokenizer.ggml.pre` names a list of patterns of which each cuts what the one before
left. Names also decide whether a word that is a token stays whole, whatever the merges
say, and whether texts begin with a token where the metadata do not say it.

Names whose patterns are llama.cpp's own code, and those of architectures that are not
supported here, are missing.

Reference: ggml-org/llama.cpp, `src/llama-vocab.cpp`; the patterns are those of each
model's own `tokenizer.json`.
"""

from typing import NamedTuple

_WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_OPEN = r"[^\r\n\p{L}\p{N}]?"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"


def _modern(digits: str) -> tuple[str, ...]:
    return (rf"{_SHORT}|{_OPEN}\p{{L}}+|{digits}|{_MARKS}|{_SPACE}",)


_LLAMA3, _QWEN2 = _modern(r"\p{N}{1,3}"), _modern(r"\p{N}")
_CUT_DIGITS = (r"\p{N}", _WORD)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _WORD, r"\p{N}+", "[0-9][0-9][0-9]")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACE,
)
_SEED = (rf"{_SHORT}|{_OPEN}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}",)
_QWEN35 = (
    rf"{_SHORT}|{_OPEN}[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}",
)
_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
_TEKKEN = (
    rf"{_OPEN}{_LOWER}|{_OPEN}{_UPPER}|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}",
)
_GPT4O = (
    rf"{_OPEN}{_LOWER}{_SHORT}?|{_OPEN}{_UPPER}{_SHORT}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _WORD, "[0-9][0-9][0-9]")
_VIKING = (
    " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",
    r"\p{N}",
)


class Cut(NamedTuple):
    """How text becomes words.

    Attributes:
      patterns: each cuts what the one before left.
      whole: a word that is a token stays whole.
      begins: texts begin with a token unless metadata say otherwise.
      composed: the model's own tokenizer brings text into NFC; llama.cpp does not.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    begins: bool = False
    composed: bool = False


def _all(names: str, *cut: bool | tuple[str, ...]) -> dict[str, Cut]:
    return dict.fromkeys(names.split(), Cut(*cut))  # pyright: ignore[reportArgumentType]


CUTS: dict[str, Cut] = {
    **_all("default", _DEFAULT),
    **_all("gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat", (_WORD,)),
    **_all("a.x-4.0 mellum modern-bert exaone4", (_WORD,)),
    **_all("llama-bpe llama3 llama-v3 falcon3 falcon-h1", _LLAMA3, True, True),
    **_all("pixtral midm-2.0 lfm2", _LLAMA3, True, True),
    **_all("dbrx smaug-bpe chatglm-bpe", _LLAMA3),
    **_all("glm4 glm5", _LLAMA3, True),
    **_all("qwen2 deepseek-r1-qwen kormo", _QWEN2, False, False, True),
    **_all("stablelm2 hunyuan megrez solar-open grok-2", _QWEN2),
    **_all("qwen35", _QWEN35, False, False, True),
    **_all("smollm starcoder refact command-r codeshell", _CUT_DIGITS),
    **_all("exaone minerva-7b mellum2", _CUT_DIGITS),
    **_all("falcon", _FALCON),
    **_all("deepseek-v3 hunyuan-dense joyai-llm", _DEEPSEEK3),
    **_all("deepseek-coder", _CODER),
    **_all("seed-coder", _SEED),
    **_all("viking", _VIKING),
    **_all("tekken", _TEKKEN, True, True),
    **_all("gpt-4o llama4 kanana2", _GPT4O),
}
"""Ways to cut by `tokenizer.ggml.pre`, of one way the usual name first."""

r"""The tokenizer and chat template in a GGUF file, as the files of transformers.

Two kinds are read:

* `gpt2`: byte-level BPE with merges; `tokenizer.ggml.pre` names how text is cut into
  words, a list of patterns of which each cuts what the one before left;
* `llama`: SentencePiece BPE, which merges the pair whose piece has the greatest score.
  Merges by rank say the same: every way to cut a piece in two known pieces is a merge,
  in the order of the scores.

A file may also carry its `tokenizer.json` whole (`tokenizer.huggingface.json`).

Reference: ggml-org/llama.cpp, `src/llama-vocab.cpp`; google/sentencepiece,
`bpe_model.cc`; the patterns are those of each model's own `tokenizer.json`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.converters.gguf_config import Metadata
from qjax.errors import FormatError, UnsupportedError
from qjax.io.json import parse_object

_log = logging.getLogger(__name__)
MAX_JSON = 64 << 20
_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6  # token types; 1 is normal, 5 unused
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
PATTERNS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"),
        (_WORD,),
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"),
        _LLAMA3,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _LLAMA3),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), _QWEN2
    ),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone"),
        _CUT_DIGITS,
    ),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _WORD, "[0-9][0-9][0-9]"),
    "deepseek-v3": _DEEPSEEK3,
    "tekken": (
        rf"{_OPEN}{_LOWER}|{_OPEN}{_UPPER}|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}",
    ),
    "gpt-4o": (
        rf"{_OPEN}{_LOWER}{_SHORT}?|{_OPEN}{_UPPER}{_SHORT}?|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}",
    ),
}
"""Patterns by `tokenizer.ggml.pre`."""
_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"}
"""Cuts under which a word that is a token stays whole; texts begin with BOS."""
_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
    *("<|end_of_text|>", "</s>", "<|eom_id|>", "<EOT>", "<|return|>", "<|call|>"),
)
"""Texts of control tokens that end a reply, whatever the metadata say."""


def tokenizer_files(values: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """JSON files of a tokenizer by name; none when the file has no tokenizer.

    Args:
      values: metadata of the file.
      where: what errors call it.

    Raises:
      FormatError: the lists do not fit one another.
      UnsupportedError: the kind of tokenizer is not read.
    """
    meta = Metadata(values, where)
    kind = meta.get("tokenizer.ggml.model", str, "none")
    if kind in ("none", "no_vocab"):
        return {}
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"{where}: tokenizer {kind!r:.100} is not read; expected 'gpt2' (BPE) or "
            "'llama' (SentencePiece)"
        )
    tokens = _texts(meta, "tokenizer.ggml.tokens")
    kinds = [int(v) for v in values.get("tokenizer.ggml.token_type", [])]
    kinds = kinds or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise FormatError(
            f"{where}: {len(kinds)} token types for {len(tokens)} tokens; expected one "
            "for each"
        )
    special = _special(meta, tokens)
    if meta.has("tokenizer.huggingface.json"):
        text = meta.get("tokenizer.huggingface.json", str)
        main = parse_object(
            text.encode(), f"{where}: tokenizer.huggingface.json", max_bytes=MAX_JSON
        )
    elif kind == "gpt2":
        main = _bpe(meta, tokens)
    else:
        main = _sentencepiece(meta, tokens, kinds)
    begins = kind == "llama" or _cut(meta) in _WHOLE_WORDS
    begins = meta.get("tokenizer.ggml.add_bos_token", bool, begins)
    main.setdefault("added_tokens", _added(tokens, kinds))
    if "bos" in special:
        main.setdefault("post_processor", _begin(*special["bos"]) if begins else None)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": begins,
    }
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for own, name in names.items():
        if own in special:
            config[f"{name}_token"] = special[own][1]
    if templates := _templates(values):
        config["chat_template"] = templates
    ends = [special[own][0] for own in ("eos", "eot", "eom") if own in special]
    ends += [
        i for i, t in enumerate(tokens) if kinds[i] in (_CONTROL, _USER) and t in _ENDS
    ]
    return {
        "tokenizer.json": {"version": "1.0", **main},
        "tokenizer_config.json": config,
        "generation_config.json": {"eos_token_id": list(dict.fromkeys(ends))},
    }


def _texts(meta: Metadata, key: str) -> list[str]:
    found = meta.values.get(key)
    if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
        raise FormatError(f"{meta.where}: metadata {key!r} is not a list of texts")
    return found


def _special(meta: Metadata, tokens: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Number and text of the tokens with a role."""
    found = {}
    for own in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        key = f"tokenizer.ggml.{own}_token_id"
        if meta.has(key):
            number = meta.get(key, int)
            if not 0 <= number < len(tokens):
                raise FormatError(
                    f"{meta.where}: {key} is {number}, there are {len(tokens)} tokens"
                )
            found[own] = number, tokens[number]
    return found


def _vocabulary(meta: Metadata, tokens: Sequence[str]) -> dict[str, int]:
    vocab = {text: i for i, text in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocab[t] != i)
        raise FormatError(f"{meta.where}: token {twice!r:.100} is given twice")
    return vocab


def _cut(meta: Metadata) -> str:
    return meta.get("tokenizer.ggml.pre", str, "default")


def _bpe(meta: Metadata, tokens: Sequence[str]) -> dict[str, Any]:
    """`tokenizer.json` of byte-level BPE."""
    name = _cut(meta)
    if name not in PATTERNS:
        raise UnsupportedError(
            f"{meta.where}: tokenizer.ggml.pre {name!r:.100} is not known; known: "
            f"{', '.join(sorted(PATTERNS))}"
        )
    if not meta.has("tokenizer.ggml.pre"):
        _log.warning(
            "%s: does not say how its tokenizer cuts words; using 'default', which may "
            "give other tokens than the model was trained with",
            meta.where,
        )
    merges = [text.split(" ", 1) for text in _texts(meta, "tokenizer.ggml.merges")]
    cuts = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in PATTERNS[name]
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "normalizer": {"type": "NFC"} if PATTERNS[name] is _QWEN2 else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*cuts, {**level, "use_regex": False}],
        },
        "decoder": {**level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": name in _WHOLE_WORDS,
            "vocab": _vocabulary(meta, tokens),
            "merges": merges,
        },
    }


def _sentencepiece(
    meta: Metadata, tokens: Sequence[str], kinds: Sequence[int]
) -> dict[str, Any]:
    """`tokenizer.json` of SentencePiece BPE."""
    scores = [float(v) for v in meta.values.get("tokenizer.ggml.scores", [])]
    if len(scores) != len(tokens):
        raise FormatError(
            f"{meta.where}: {len(scores)} scores for {len(tokens)} tokens; expected "
            "one for each"
        )
    vocab = _vocabulary(meta, tokens)
    plain = {t for t, k in zip(tokens, kinds, strict=True) if k not in (2, 3, 6)}
    merges = [
        (-scores[vocab[text]], vocab[text[:at]], vocab[text[at:]])
        for text in plain
        for at in range(1, len(text))
        if text[:at] in plain and text[at:] in plain
    ]
    merges.sort()
    prefix = meta.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((t for t, k in zip(tokens, kinds, strict=True) if k == 2), None)
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}] * prefix + [spaces],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": _BYTE in kinds,
            "vocab": vocab,
            "merges": [[tokens[a], tokens[b]] for _, a, b in merges],
        },
    }


def _added(tokens: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that are found in a text before anything else is done."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": text, **plain, "special": kind != _USER}
        for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER) and text
    ]


def _begin(number: int, text: str) -> dict[str, Any]:
    """A post-processor that puts one token in front."""

    def sequence(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    first = {"SpecialToken": {"id": text, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, sequence("A", 0)],
        "pair": [first, sequence("A", 0), sequence("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }


def _templates(values: Mapping[str, Any]) -> Any:
    """The chat template, or several by name as transformers lists them."""
    key = "tokenizer.chat_template"
    own = values.get(key)
    named = {
        name[len(key) + 1 :]: text
        for name, text in values.items()
        if name.startswith(f"{key}.") and isinstance(text, str)
    }
    if not named:
        return own if isinstance(own, str) else None
    default = {"default": own} if isinstance(own, str) else {}
    return [{"name": n, "template": t} for n, t in {**default, **named}.items()]

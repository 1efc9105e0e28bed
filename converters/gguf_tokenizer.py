"""The tokenizer and chat template in a GGUF file, as the files of transformers.

Two kinds are read:

* `gpt2`: byte-level BPE with merges; `gguf_patterns` has how text is cut into words;
* `llama`: SentencePiece BPE, which merges the pair whose piece has the greatest score.
  Merges by rank say the same: every way to cut a piece in two known pieces is a merge,
  in the order of the scores. Only where pieces of equal score overlap may another be
  merged first, as in every tokenizer that transformers converts.

A file may also carry its `tokenizer.json` whole (`tokenizer.huggingface.json`).

Reference: ggml-org/llama.cpp, `src/llama-vocab.cpp`; google/sentencepiece,
`bpe_model.cc`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.converters.gguf_metadata import Metadata
from qjax.converters.gguf_patterns import CUTS, Cut
from qjax.converters.gguf_tokens import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER,
    Vocabulary,
    numbers_of,
    read_vocabulary,
    texts_of,
)
from qjax.errors import FormatError, UnsupportedError
from qjax.io.json import parse_object

_log = logging.getLogger(__name__)
MAX_JSON = 64 << 20


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
    own = read_vocabulary(meta, kind)
    cut = _cut(meta) if kind == "gpt2" else Cut((), begins=True)
    if meta.has("tokenizer.huggingface.json"):
        name, limit = f"{where}: tokenizer.huggingface.json", MAX_JSON
        text = meta.get("tokenizer.huggingface.json", str)
        main = parse_object(text.encode(), name, max_bytes=limit)
    else:
        main = _bpe(meta, own, cut) if kind == "gpt2" else _sentencepiece(meta, own)
    begins = meta.get("tokenizer.ggml.add_bos_token", bool, cut.begins)
    main.setdefault("added_tokens", _added(own))
    if begins and "bos" in own.special:
        main.setdefault("post_processor", _begin(*own.special["bos"]))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": begins,
    }
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for role, name in names.items():
        if role in own.special:
            config[f"{name}_token"] = own.special[role][1]
    if templates := _templates(values):
        config["chat_template"] = templates
    return {
        "tokenizer.json": {"version": "1.0", **main},
        "tokenizer_config.json": config,
        "generation_config.json": {"eos_token_id": own.ends},
    }


def _cut(meta: Metadata) -> Cut:
    """How text is cut into words."""
    if not meta.has("tokenizer.ggml.pre"):
        _log.warning(
            "%s: does not say how its tokenizer cuts words; using 'default', which may "
            "give other tokens than the model was trained with",
            meta.where,
        )
    name = meta.get("tokenizer.ggml.pre", str, "default")
    if name not in CUTS:
        raise UnsupportedError(
            f"{meta.where}: tokenizer.ggml.pre {name!r:.100} is not known; known: "
            f"{', '.join(sorted(CUTS))}"
        )
    return CUTS[name]


def _bpe(meta: Metadata, own: Vocabulary, cut: Cut) -> dict[str, Any]:
    """`tokenizer.json` of byte-level BPE."""
    known = {text: i for i, text in enumerate(own.tokens)}
    merges = []
    for text in texts_of(meta, "tokenizer.ggml.merges"):
        at = text.find(" ", 1)
        pair = [text[:at], text[at + 1 :]] if at > 0 else [text]
        if len(pair) != 2 or not known.keys() >= {*pair, "".join(pair)}:
            raise FormatError(
                f"{meta.where}: merge {text!r:.100} is not two tokens that make another"
            )
        merges.append(pair)
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    cuts = [{**split, "pattern": {"Regex": pattern}} for pattern in cut.patterns]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "normalizer": {"type": "NFC"} if cut.composed else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*cuts, {**level, "use_regex": False}],
        },
        "decoder": {**level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": cut.whole,
            "vocab": known,
            "merges": merges,
        },
    }


def _sentencepiece(meta: Metadata, own: Vocabulary) -> dict[str, Any]:
    """`tokenizer.json` of SentencePiece BPE."""
    tokens, kinds, _ = own
    scores = numbers_of(meta, "tokenizer.ggml.scores", "iuf", len(tokens))
    if scores is None or not np.all(np.isfinite(scores)):
        raise FormatError(
            f"{meta.where}: tokenizer.ggml.scores are missing or not finite; "
            "SentencePiece needs a score for each token"
        )
    prefix = meta.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next(
        (t for t, k in zip(tokens, kinds, strict=True) if k == UNKNOWN), None
    )
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
            "byte_fallback": BYTE in kinds,
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": merges_of(tokens, kinds, scores.tolist()),
        },
    }


def merges_of(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
    """Every way to make a piece of two others, the greatest scores first."""
    pieces = {
        text: (-score, i)
        for i, (text, kind, score) in enumerate(zip(tokens, kinds, scores, strict=True))
        if kind not in (UNKNOWN, CONTROL, BYTE)
    }
    found = [
        (score, pieces[text[:at]][1], pieces[text[at:]][1])
        for text, (score, _) in pieces.items()
        for at in range(1, len(text))
        if text[:at] in pieces and text[at:] in pieces
    ]
    return [[tokens[a], tokens[b]] for _, a, b in sorted(found)]


def _added(own: Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are found in a text before anything else is done."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": text, **plain, "special": kind != USER}
        for i, (text, kind) in enumerate(zip(own.tokens, own.kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER)
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

"""A tokenizer as the metadata of a GGUF file: the inverse of `gguf_tokenizer`.

Byte-level BPE becomes `gpt2` with its merges; BPE with byte fallback becomes `llama`,
whose pieces get scores in the order of the merges that make them. How words are cut is
found among the known patterns; llama.cpp has no others. What it does otherwise than
the tokenizer is reported.
"""

import json
import logging
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.converters.gguf_metadata import u32
from qjax.converters.gguf_patterns import CUTS
from qjax.converters.gguf_tokenizer import merges_of
from qjax.converters.gguf_tokens import (
    BYTE,
    CONTROL,
    ENDS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER,
)
from qjax.errors import FormatError, UnsupportedError
from qjax.text_files import TokenizerFiles

_log = logging.getLogger(__name__)


def vocabulary(files: TokenizerFiles, size: int, where: str) -> dict[str, Any]:
    """Metadata of a tokenizer.

    Args:
      files: the tokenizer.
      size: rows of the embedding; numbers without a token become unused ones.
      where: what errors call the model.

    Raises:
      UnsupportedError: llama.cpp has no such tokenizer.
      FormatError: it has more tokens than the embedding has rows.
    """
    main = json.loads(files.backend.to_str())
    model = main["model"]
    if model["type"] != "BPE":
        raise UnsupportedError(
            f"{where}: GGUF: a tokenizer of type {model['type']} is not written; "
            "expected BPE"
        )
    tokens, kinds = _tokens(main, size, where)
    own: dict[str, Any] = {}
    if model["byte_fallback"]:
        own["tokenizer.ggml.model"] = "llama"
        _byte_kinds(tokens, kinds, model["unk_token"])
        scores = _scores(tokens, kinds, model["merges"], where)
        own["tokenizer.ggml.scores"] = scores
        own["tokenizer.ggml.add_space_prefix"] = _prefix(main, where)
    else:
        own["tokenizer.ggml.model"] = "gpt2"
        own["tokenizer.ggml.pre"] = _cut(main, where)
        own["tokenizer.ggml.merges"] = [" ".join(merge) for merge in model["merges"]]
    own["tokenizer.ggml.tokens"] = tokens
    own["tokenizer.ggml.token_type"] = np.array(kinds, np.int32)
    return own | _roles(main, files, tokens, where) | _templates(files.chat_templates)


def _tokens(
    main: Mapping[str, Any], size: int, where: str
) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens."""
    added = {token["id"]: token for token in main["added_tokens"]}
    texts = {number: text for text, number in main["model"]["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    if max(texts, default=-1) >= size:
        raise FormatError(
            f"{where}: the tokenizer has {max(texts) + 1} tokens, the embedding {size} "
            "rows"
        )
    kinds = [NORMAL if i in texts else UNUSED for i in range(size)]
    for number, token in added.items():
        kinds[number] = CONTROL if token["special"] else USER
    return [texts.get(i, f"[PAD{i}]") for i in range(size)], kinds


def _byte_kinds(tokens: Sequence[str], kinds: list[int], unknown: Any) -> None:
    """Marks the pieces of single bytes, `<0x00>`, and the unknown one."""
    for i, text in enumerate(tokens):
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds[i] = BYTE
        elif text == unknown:
            kinds[i] = UNKNOWN


def _scores(
    tokens: Sequence[str],
    kinds: Sequence[int],
    merges: Sequence[Sequence[str]],
    where: str,
) -> np.ndarray:
    """Minus the rank of the first merge that makes a piece; 0 where none does."""
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    last = float(len(rank))
    scores = [
        -float(rank.get(text, last)) if kind in (NORMAL, USER) else 0.0
        for text, kind in zip(tokens, kinds, strict=True)
    ]
    made = merges_of(tokens, kinds, scores)
    if [*map("".join, made)] != [*map("".join, merges)]:
        _log.warning(
            "%s: this tokenizer has %d merges, of SentencePiece's there are %d for its "
            "pieces; with a GGUF file other tokens may be found",
            *(where, len(merges), len(made)),
        )
    return np.array(scores, np.float32)


def _steps(step: Any, inner: str) -> list[dict[str, Any]]:
    """A step of a tokenizer, or those of a sequence."""
    if step is None:
        return []
    return (
        [s for one in step[inner] for s in _steps(one, inner)]
        if (step["type"] == "Sequence")
        else [step]
    )


def _prefix(main: Mapping[str, Any], where: str) -> bool:
    """Whether a space is put in front of a text."""
    normal = _steps(main["normalizer"], "normalizers")
    cuts = _steps(main["pre_tokenizer"], "pretokenizers")
    schemes = [s["prepend_scheme"] for s in cuts if s["type"] == "Metaspace"]
    replaced = [s for s in normal if s["type"] == "Replace" and s["content"] == "▁"]
    if not schemes and not replaced:
        raise UnsupportedError(
            f"{where}: GGUF: its tokenizer has byte fallback, but does not write "
            "spaces as '▁', as llama.cpp does"
        )
    if "first" in schemes:
        _log.warning(
            "%s: this tokenizer puts a space in front of a text only, llama.cpp also "
            "after special tokens",
            where,
        )
    space = {"String": " "}
    if any(s["type"] != "Metaspace" and s.get("pattern") != space for s in cuts):
        _log.warning("%s: this tokenizer cuts words first, llama.cpp does not", where)
    prepended = any(s["type"] == "Prepend" for s in normal)
    _report_normalizers(normal, ("Prepend", "Replace"), where)
    return prepended or "first" in schemes or "always" in schemes


def _report_normalizers(
    steps: Sequence[Mapping[str, Any]], known: Sequence[str], where: str
) -> None:
    for step in steps:
        if step["type"] not in known:
            _log.warning(
                "%s: this tokenizer changes texts first (%s), llama.cpp does not",
                *(where, step["type"]),
            )


def _cut(main: Mapping[str, Any], where: str) -> str:
    """The name of how words are cut."""
    steps = _steps(main["pre_tokenizer"], "pretokenizers")
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    if not levels:
        raise UnsupportedError(
            f"{where}: GGUF: its tokenizer is neither byte-level nor has byte fallback"
        )
    patterns = [
        step["pattern"].get("Regex") for step in steps if step["type"] == "Split"
    ]
    if any(s["type"] == "Digits" and s["individual_digits"] for s in steps):
        patterns.append(CUTS["smollm"].patterns[0])
    if levels[0]["use_regex"]:
        patterns += CUTS["gpt-2"].patterns
    same = {name: cut for name, cut in CUTS.items() if [*cut.patterns] == patterns}
    kinds = {"Split", "ByteLevel", "Digits"}
    if not same or {step["type"] for step in steps} - kinds:
        _log.warning(
            "%s: GGUF has no name for how this tokenizer cuts words (%s); writing "
            "'default', with which llama.cpp may find other tokens",
            *(where, json.dumps(main["pre_tokenizer"])[:200]),
        )
        return "default"
    if levels[0]["add_prefix_space"]:
        _log.warning("%s: llama.cpp puts no space in front of a text", where)
    normal = _steps(main["normalizer"], "normalizers")
    composed = [step["type"] for step in normal] == ["NFC"]
    whole = bool(main["model"].get("ignore_merges"))
    close = sorted(
        same, key=lambda n: (same[n].whole != whole, same[n].composed != composed)
    )[0]
    found = same[close]
    _report_normalizers(normal, ("NFC",) if found.composed else (), where)
    if found.whole != whole:
        _log.warning(
            "%s: llama.cpp %s words that are tokens; this tokenizer does not",
            *(where, "keeps" if found.whole else "merges"),
        )
    return close


def _roles(
    main: Mapping[str, Any], files: TokenizerFiles, tokens: Sequence[str], where: str
) -> dict[str, Any]:
    """Numbers of special tokens, and whether texts begin with one."""
    own: dict[str, Any] = {}
    config, found = files.config, {}
    for theirs, name in _ROLES.items():
        text = config.get(f"{theirs}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str) and text in tokens:
            found[theirs] = tokens.index(text)
            own[f"tokenizer.ggml.{name}_token_id"] = u32(found[theirs])
    ends = files.generation_config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    more = [
        i
        for i in ends
        if type(i) is int
        and 0 <= i < len(tokens)
        and i != found.get("eos")
        and tokens[i] not in ENDS
    ]
    for role, number in zip(("eot", "eom"), more, strict=False):
        own[f"tokenizer.ggml.{role}_token_id"] = u32(number)
    if len(more) > 2:
        _log.warning(
            "%s: GGUF has no place for the tokens %s, which end texts, too",
            *(where, more[2:]),
        )
    begins = config.get("add_bos_token")
    if not isinstance(begins, bool):
        begins = "bos" in found and json.dumps(tokens[found["bos"]]) in json.dumps(
            main["post_processor"]
        )
    own["tokenizer.ggml.add_bos_token"] = begins
    return own


_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _templates(templates: Mapping[str, str]) -> dict[str, Any]:
    """Chat templates; names in GGUF are of letters and digits."""
    own: dict[str, Any] = {}
    names = []
    for name, text in templates.items():
        if name == "default":
            own["tokenizer.chat_template"] = text
            continue
        kept = string.ascii_letters + string.digits
        names.append("".join(c if c in kept else "_" for c in name))
        own[f"tokenizer.chat_template.{names[-1]}"] = text
    return own | ({"tokenizer.chat_templates": names} if names else {})

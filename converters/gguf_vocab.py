"""A tokenizer as the metadata of a GGUF file: the inverse of `gguf_tokenizer`.

Byte-level BPE becomes `gpt2` with its merges; BPE with byte fallback becomes `llama`,
whose pieces get scores in the order of the merges that make them. How words are cut is
found among the known patterns; llama.cpp has no others.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.converters.gguf_layout import Value
from qjax.converters.gguf_tokenizer import PATTERNS
from qjax.errors import UnsupportedError

_log = logging.getLogger(__name__)
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def vocabulary(
    main: Mapping[str, Any], config: Mapping[str, Any], size: int, where: str
) -> dict[str, Any]:
    """Metadata of a tokenizer.

    Args:
      main: `tokenizer.json`.
      config: `tokenizer_config.json`, with `chat_template` and texts of special tokens.
      size: rows of the embedding; numbers without a token become unused ones.
      where: what errors call the model.

    Raises:
      UnsupportedError: llama.cpp has no such tokenizer.
    """
    model = main.get("model") or {}
    if model.get("type") != "BPE":
        raise UnsupportedError(
            f"{where}: GGUF: a tokenizer of type {model.get('type')!r:.100} is not "
            "written; expected BPE"
        )
    added = {token["id"]: token for token in main.get("added_tokens", [])}
    texts = {number: text for text, number in model["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(size)]
    kinds = [_NORMAL if i in texts else _UNUSED for i in range(size)]
    for number, token in added.items():
        kinds[number] = _CONTROL if token.get("special") else _USER
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    own: dict[str, Any] = {}
    if model.get("byte_fallback"):
        own["tokenizer.ggml.model"] = "llama"
        _byte_kinds(tokens, kinds, model.get("unk_token"))
        own["tokenizer.ggml.scores"] = _scores(tokens, kinds, merges)
        prefix = "Prepend" in json.dumps(main.get("normalizer"))
        prefix |= '"prepend_scheme": "first"' in json.dumps(main.get("pre_tokenizer"))
        own["tokenizer.ggml.add_space_prefix"] = prefix
    else:
        own["tokenizer.ggml.model"] = "gpt2"
        own["tokenizer.ggml.pre"] = _cut(main.get("pre_tokenizer"), where)
        own["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    own["tokenizer.ggml.tokens"] = tokens
    own["tokenizer.ggml.token_type"] = np.array(kinds, np.int32)
    return own | _roles(main, config, {text: i for i, text in enumerate(tokens)})


def _byte_kinds(tokens: Sequence[str], kinds: list[int], unknown: Any) -> None:
    """Marks the pieces of single bytes, `<0x00>`, and the unknown one."""
    for i, text in enumerate(tokens):
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds[i] = _BYTE
        elif text == unknown:
            kinds[i] = _UNKNOWN


def _scores(
    tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[Sequence[str]]
) -> np.ndarray:
    """Minus the rank of the first merge that makes a piece; 0 where none does."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    last = float(len(merges))
    scores = [
        -float(rank.get(text, last)) if kind in (_NORMAL, _USER) else 0.0
        for text, kind in zip(tokens, kinds, strict=True)
    ]
    return np.array(scores, np.float32)


def _cut(pre: Any, where: str) -> str:
    """The name of a list of patterns."""
    steps = [pre] if not isinstance(pre, dict) else pre.get("pretokenizers", [pre])
    found = tuple(
        step["pattern"].get("Regex")
        for step in steps
        if isinstance(step, dict) and step.get("type") == "Split"
    )
    if not found:
        plain = any(s and s.get("type") == "ByteLevel" for s in steps)
        found = PATTERNS["gpt-2"] if plain else found
    if any(isinstance(s, dict) and s.get("type") == "Digits" for s in steps):
        found = PATTERNS["smollm"]
    for name, patterns in PATTERNS.items():
        if patterns == found:
            return name
    _log.warning(
        "%s: GGUF has no name for how this tokenizer cuts words (%s); writing "
        "'default', with which llama.cpp may find other tokens",
        where,
        json.dumps(pre)[:200],
    )
    return "default"


def _roles(
    main: Mapping[str, Any], config: Mapping[str, Any], numbers: Mapping[str, int]
) -> dict[str, Any]:
    """Numbers of special tokens, whether texts begin with one, and the template."""
    own: dict[str, Any] = {}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for theirs, name in names.items():
        text = config.get(f"{theirs}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if text in numbers:
            own[f"tokenizer.ggml.{name}_token_id"] = Value("u32", numbers[text])
    begins = config.get("add_bos_token")
    if not isinstance(begins, bool):
        bos = config.get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        begins = isinstance(bos, str) and bos in json.dumps(
            main.get("post_processor"), ensure_ascii=False
        )
    own["tokenizer.ggml.add_bos_token"] = begins
    template = config.get("chat_template")
    if isinstance(template, str):
        own["tokenizer.chat_template"] = template
    for item in template if isinstance(template, list) else []:
        end = "" if item["name"] == "default" else f".{item['name']}"
        own[f"tokenizer.chat_template{end}"] = item["template"]
    return own

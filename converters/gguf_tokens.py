"""The tokens in a GGUF file: texts, types, and which have a role or end a text."""

import logging
from typing import NamedTuple

import numpy as np

from qjax.converters.gguf_metadata import Metadata
from qjax.errors import FormatError

_log = logging.getLogger(__name__)
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens."""
ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>"),
        *("<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>"),
        *("_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>"),
        *("<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),  # noqa: RUF001
    )
)
"""Texts of tokens that end a reply in llama.cpp, whatever the metadata say."""
_FILES = frozenset(
    (
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>"),
        *("<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    )
)
"""Texts of tokens that end code filled in, which it counts among them."""
_ROLES = (
    *("bos", "eos", "eot", "eom", "unknown", "padding"),
    *("fim_pad", "fim_rep", "fim_sep"),
)
_USUAL = {"bos": 1, "eos": 2, "unknown": 0}
"""Numbers of SentencePiece where the metadata have none."""


class Vocabulary(NamedTuple):
    """The lists of a tokenizer.

    Attributes:
      tokens: texts; all different.
      kinds: types of tokens.
      special: number and text of the tokens with a role.
    """

    tokens: list[str]
    kinds: list[int]
    special: dict[str, tuple[int, str]]

    @property
    def ends(self) -> list[int]:
        """Numbers of the tokens that end a text."""
        tokens, own = self.tokens, self.special
        found = [own[role][0] for role in ("eos", "eot", "eom") if role in own]
        found += [own[role][0] for role in _ROLES[-3:] if role in own]
        found += [i for i, t in enumerate(tokens) if t in ENDS or t in _FILES]
        texts = {tokens[i] for i in found}
        if texts >= {"<|return|>", "<|call|>"} or texts >= {"<|calls|>", "<|flush|>"}:
            found = [i for i in found if tokens[i] != "<|end|>"]
        return list(dict.fromkeys(found))


def read_vocabulary(meta: Metadata, kind: str) -> Vocabulary:
    """The lists in the metadata of a tokenizer of a kind, `gpt2` or `llama`.

    Raises:
      FormatError: a token is given twice, or a list is too short.
    """
    tokens = texts_of(meta, "tokenizer.ggml.tokens")
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
    seen: set[str] = set()
    for text in tokens:
        if text in seen:
            raise FormatError(f"{meta.where}: token {text!r:.100} is given twice")
        seen.add(text)
    kinds = numbers_of(meta, "tokenizer.ggml.token_type", "iu", len(tokens))
    kinds = [NORMAL] * len(tokens) if kinds is None else [int(v) for v in kinds]
    for i, text in enumerate(tokens):
        if text in ENDS:
            kinds[i] = CONTROL
    special = {}
    usual = _USUAL if kind == "llama" else {}
    for role in _ROLES:
        key = f"tokenizer.ggml.{role}_token_id"
        if not meta.has(key) and usual.get(role, len(tokens)) >= len(tokens):
            continue
        number = meta.get(key, int, usual.get(role))
        if 0 <= number < len(tokens):
            special[role] = number, tokens[number]
        else:
            _log.warning(
                "%s: %s is %d, of %d tokens; it is ignored",
                *(meta.where, key, number, len(tokens)),
            )
    return Vocabulary(tokens, kinds, special)


def texts_of(meta: Metadata, key: str) -> list[str]:
    """A list of texts.

    Raises:
      FormatError: it is missing, or something else.
    """
    found = meta.values.get(key)
    if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
        raise FormatError(f"{meta.where}: metadata {key!r} is not a list of texts")
    return found


def numbers_of(meta: Metadata, key: str, kinds: str, count: int) -> np.ndarray | None:
    """A vector with a number for each of `count` tokens; None when there is none.

    Raises:
      FormatError: it is too short, or something else.
    """
    if not meta.has(key):
        return None
    found = meta.values[key]
    if not isinstance(found, np.ndarray) or found.dtype.kind not in kinds:
        raise FormatError(f"{meta.where}: metadata {key!r} is not a list of numbers")
    if len(found) < count:
        raise FormatError(
            f"{meta.where}: metadata {key!r} has {len(found)} numbers for {count} "
            "tokens; expected one for each"
        )
    return found[:count]

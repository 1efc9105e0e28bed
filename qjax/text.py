"""Text to token ids and back.

Decides: which tokens open a prompt (what the tokenizer's own post-processor or
`add_bos_token` says), which ids end a text (the tokenizer's and those of
`generation_config.json`), and how tokens become text while they arrive.

Refuses: a tokenizer with more ids than the model has rows, and text that UTF-8 cannot
spell. Files are `qjax.text_files`, templates `qjax.chat`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from qjax import chat
from qjax.errors import SpecError
from qjax.text_files import TokenizerFiles, files_from, read_files

_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_LAST_OF_WIDTH = (0x7F, 0x7FF, 0xFFFF)  # last characters of 1, 2 and 3 bytes
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Attributes:
        bos_id: Id of the token that opens a text, or None.
        eos_id: Id of the tokenizer's end token, or None.
        eos_ids: Every id that ends a generated text.
        pad_id: Id that fills short rows: the pad token, else the end token, else 0.
        adds_bos: Whether `encode` puts `bos_id` in front.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ):
        """Wrap `backend`.

        Args:
            backend: The tokenizer proper.
            config: Content of `tokenizer_config.json`.
            generation_config: Content of `generation_config.json`; its `eos_token_id`,
                an id or a list, adds to `eos_ids`.
            chat_templates: Template sources by name; `default` is the usual one.
        """
        config, generation_config = dict(config or {}), dict(generation_config or {})
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._largest: tuple[int, int] | None = None  # size of vocabulary, largest id
        self.special_tokens = {
            name: token
            for name in _NAMES
            if (token := _token_text(config.get(name))) is not None
        }
        self.chat_templates = dict(chat_templates or {})
        self.bos_id = self._special_id("bos_token", generation_config)
        self.eos_id = self._special_id("eos_token", generation_config)
        more = _id_list(generation_config.get("eos_token_id"))
        own = [] if self.eos_id is None else [self.eos_id]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(own + more))
        pad = self._special_id("pad_token", generation_config)
        self.pad_id: int = next(
            token for token in (pad, self.eos_id, 0) if token is not None
        )
        self._prefix = self._find_prefix(config.get("add_bos_token"))
        self.adds_bos = self.bos_id is not None and self.bos_id in self._prefix

    @property
    def vocab_size(self) -> int:
        """One more than the largest id the tokenizer can produce."""
        count = self.backend.get_vocab_size()
        if self._largest is None or self._largest[0] != count:
            self._largest = (count, max(self.backend.get_vocab().values(), default=-1))
        return 1 + self._largest[1]

    @property
    def chat_template(self) -> str | None:
        """The default chat template's source, or None."""
        return self.chat_templates.get("default")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`.

        Args:
            text: Any text. Special tokens written out in it become their ids.
            add_special_tokens: Put the opening tokens (usually BOS) in front where the
                tokenizer is configured to. An end token is never appended.

        Raises:
            SpecError: `text` is no valid Unicode string.
        """
        _check_text(text)
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [*self._prefix, *ids] if add_special_tokens else ids

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of `text`, and up to which byte each has spelled it.

        Bytes are those of the text in UTF-8; opening tokens spell none.

        Raises:
            SpecError: `text` is no valid Unicode string.
        """
        _check_text(text)
        encoding = self.backend.encode(text, add_special_tokens=False)
        letters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + sum((letters > top).astype(np.int64) for top in _LAST_OF_WIDTH)
        byte_at = np.concatenate([[0], np.cumsum(widths)])
        ends = np.array([end for _, end in encoding.offsets], np.int64)
        ends = np.maximum.accumulate(byte_at[ends])
        opening = len(self._prefix)
        return [*self._prefix, *encoding.ids], [0] * opening + ends.tolist()

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that form no character become U+FFFD."""
        return self.backend.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )

    def stream(self, prompt: Sequence[int] = ()) -> "TextStream":
        """Return a decoder for the tokens that will follow `prompt`."""
        return TextStream(self, prompt)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the text of a conversation as the model expects it.

        Encode it with `add_special_tokens=False`: templates write BOS themselves.

        Args:
            messages: Dicts with `role` and `content`.
            add_generation_prompt: End with the opening of the assistant's turn.
            template: A source to use in place of the tokenizer's.
            tools: JSON schemas of tools, for templates that show them.
            **variables: Other names the template reads.

        Raises:
            SpecError: There is no template, or rendering it failed (see `chat.render`).
        """
        if template is None and tools is not None:
            template = self.chat_templates.get("tool_use")
        template = template if template is not None else self.chat_template
        if template is None:
            raise SpecError(
                "apply_chat_template: this tokenizer has no chat template (it belongs "
                "to a base model); pass template=..., or generate from plain text"
            )
        names = {**self.special_tokens, **variables}
        return chat.render(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=None if tools is None else list(tools),
            documents=names.pop("documents", None),
            **names,
        )

    def check_vocab(self, model_vocab: int) -> None:
        """Raise SpecError where the tokenizer has ids beyond the model's table."""
        if self.vocab_size > model_vocab:
            raise SpecError(
                f"tokenizer: it has {self.vocab_size} ids, but the model's vocabulary "
                f"is {model_vocab}; this tokenizer belongs to another model"
            )

    def _special_id(self, name: str, generation: Mapping[str, Any]) -> int | None:
        text = self.special_tokens.get(name)
        if text is not None and (found := self.backend.token_to_id(text)) is not None:
            return found
        ids = _id_list(generation.get(f"{name}_id"))
        return ids[0] if ids else None

    def _find_prefix(self, add_bos: Any) -> tuple[int, ...]:
        """Return the ids that open every text; an explicit setting decides."""
        if isinstance(add_bos, bool):
            return (self.bos_id,) if add_bos and self.bos_id is not None else ()
        plain = self.backend.encode("a", add_special_tokens=False).ids
        full = self.backend.encode("a").ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return tuple(full[:start])
        return ()


class TextStream:
    """Turns tokens that arrive one by one into text, never half a character.

    The pieces `push` and `finish` return, joined, are the text of the tokens as the
    continuation of the prompt: decoding starts a few tokens back, so that tokenizers
    which drop a leading space do not glue words.
    """

    _CONTEXT = 5
    _HOLD = 8  # no character takes more tokens; bytes still broken then stay broken

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        """Start after `prompt`."""
        self._tokenizer = tokenizer
        self._shown = [int(i) for i in prompt[-self._CONTEXT :]] if prompt else []
        if tokenizer.decode(self._shown).endswith(_REPLACEMENT):
            self._shown = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Return the text that `token` completes; empty while a character is open."""
        self._held.append(int(token))
        text = self._pending()
        if text.endswith(_REPLACEMENT) and len(self._held) < self._HOLD:
            return ""
        return self._release(text) if text else ""

    def finish(self) -> str:
        """Return what is still held back; open bytes become U+FFFD."""
        return self._release(self._pending()) if self._held else ""

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]

    def _release(self, text: str) -> str:
        self._shown = (self._shown + self._held)[-self._CONTEXT :]
        self._held = []
        return text


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer of a model folder.

    Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`,
    `generation_config.json`, `chat_template.jinja`, as far as they exist.

    Raises:
        FormatError: A file is damaged.
        SpecError: The folder holds no tokenizer.
        MissingExtraError: A legacy tokenizer needs a package that is not installed.
        UnsupportedError: A legacy tokenizer could not be converted.
    """
    return _made(read_files(directory))


def tokenizer_from(contents: Mapping[str, bytes], where: str) -> Tokenizer:
    """The tokenizer that contents of such files describe.

    Args:
        contents: Contents by name.
        where: What errors call their source.

    Raises:
        FormatError: They describe no tokenizer.
        SpecError: There is no `tokenizer.json` among them.
    """
    return _made(files_from(contents, where))


def _made(files: TokenizerFiles) -> Tokenizer:
    return Tokenizer(
        files.backend,
        config=files.config,
        generation_config=files.generation_config,
        chat_templates=files.chat_templates,
    )


def _check_text(text: Any) -> None:
    """Raise SpecError unless `text` is a string that UTF-8 can spell."""
    if not isinstance(text, str):
        raise SpecError(f"encode: got {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpecError(f"encode: the text is not valid Unicode: {error}") from None


def _token_text(value: Any) -> str | None:
    """Return a special token's text from its string or dict form."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _id_list(value: Any) -> list[int]:
    """Return ids from an id, a list of ids, or nothing."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if type(item) is int and item >= 0]

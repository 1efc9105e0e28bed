"""Small tokenizers and their metadata in GGUF files."""

import json
from typing import Any

import numpy as np
import tokenizers

from qjax.converters.gguf_file import GGUFFile
from qjax.converters.gguf_tokenizer import tokenizer_files
from qjax.converters.gguf_vocab import vocabulary
from qjax.converters.gguf_write import write_gguf
from qjax.io.json import encode_object
from qjax.text import Tokenizer, tokenizer_from
from qjax.text_files import files_from

TEXTS = [
    "",
    "Once upon a time there was a little girl named Lucy.",
    "  two  spaces,\ttabs\t\t and\n\n\nlines \r\n end  ",
    "it's IT'S we'll WE'LL '90s don't",
    "1 12 123 1234 12345.678 ²³ ٣٤",
    "grüße, naïve café e\u0301, 你好世界 こんにちは, שלום, 🚀👩‍👩‍👧 \u200d",
    "x = {'a': [1, 2]};  // !!!???  ~~~ <|not|> </s> <s>",
    "\x00\x01 \ufffd \u2028 a\u00a0b",
]


def written(tmp_path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata as a file gives them back."""
    path = tmp_path / "t.gguf"
    write_gguf(path, metadata, [], overwrite=True)
    with GGUFFile(path) as file:
        return dict(file.metadata)


def read(metadata: dict[str, Any], where: str = "x.gguf") -> Tokenizer:
    files = tokenizer_files(metadata, where)
    return tokenizer_from({n: encode_object(v) for n, v in files.items()}, where)


def bytes_bpe(pre: Any = None, normalizer: Any = None, **model: Any) -> dict[str, Any]:
    """A byte-level BPE without merges but `he` and `Ġt`."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*alphabet, *_MORE])}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 259, "content": "<s>", "special": True, **_PLAIN},
            {"id": 260, "content": "<b>", "special": False, **_PLAIN},
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre or {**level, "use_regex": True},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [["h", "e"], ["Ġ", "t"], ["Ġt", "he"]],
            **model,
        },
    }


_MORE = ("he", "Ġt", "Ġthe", "<s>", "<b>")
_PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def metadata_of(main: dict[str, Any], size: int = 262, **files: Any) -> dict[str, Any]:
    contents = {"tokenizer.json": main} | {f"{n}.json": v for n, v in files.items()}
    raw = {name: json.dumps(value).encode() for name, value in contents.items()}
    return vocabulary(files_from(raw, "m"), size, "m")


def splits(*patterns: str) -> dict[str, Any]:
    cuts = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in patterns
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    last = {**level, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*cuts, last]}


PIECES = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "aa", "aaa", "▁▁", "cab"]


def sentencepiece(prefix: bool | None = None, seed: int = 0) -> dict[str, Any]:
    """Metadata of a small SentencePiece BPE with byte fallback."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(PIECES)]
    scores = np.zeros(len(tokens), np.float32)
    scores[259:] = -np.random.default_rng(seed).permutation(len(PIECES))
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, "<tool>"],
        "tokenizer.ggml.token_type": np.array([*kinds, 4], np.int32),
        "tokenizer.ggml.scores": np.append(scores, np.float32(-1000)),
    }
    if prefix is not None:
        metadata["tokenizer.ggml.add_space_prefix"] = prefix
    return metadata


def changed(metadata: dict[str, Any], **changes: Any) -> dict[str, Any]:
    new = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {k: v for k, v in (metadata | new).items() if v is not None}

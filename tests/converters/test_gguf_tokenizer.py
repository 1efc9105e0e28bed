"""Tokenizers in GGUF files: written and read again, and SentencePiece by scores."""

import json
from typing import Any

import numpy as np
import pytest
import tokenizers

from qjax.converters.gguf_file import GGUFFile
from qjax.converters.gguf_patterns import CUTS
from qjax.converters.gguf_tokenizer import tokenizer_files
from qjax.converters.gguf_vocab import vocabulary
from qjax.converters.gguf_write import write_gguf
from qjax.errors import FormatError, UnsupportedError
from qjax.io.json import encode_object
from qjax.text import Tokenizer, tokenizer_from
from qjax.text_files import files_from, read_files

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


def test_the_bundled_tokenizer_finds_the_same_tokens(model_path, tmp_path):
    files = read_files(model_path)
    metadata = written(tmp_path, vocabulary(files, 4096, "m"))
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    original = tokenizer_from(
        {p.name: p.read_bytes() for p in model_path.iterdir() if p.suffix == ".json"},
        "m",
    )
    again = read(metadata)
    for text in [*TEXTS, "a<|endoftext|>b", " <|endoftext|> <|endoftext|>"]:
        ids = original.encode(text)
        assert again.encode(text) == ids, text
        assert again.decode(ids) == original.decode(ids)
        assert again.encode_with_bytes(text) == original.encode_with_bytes(text)
    for name in ("bos_id", "eos_id", "eos_ids", "pad_id", "adds_bos", "vocab_size"):
        assert getattr(again, name) == getattr(original, name), name


def bytes_bpe(pre: Any = None, normalizer: Any = None, **model: Any) -> dict[str, Any]:
    """A byte-level BPE without merges but `he` and `Ġt`."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*alphabet, "he", "Ġt", "Ġthe"])}
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


@pytest.mark.parametrize("name", CUTS)
def test_every_way_to_cut_words_is_written_and_read(name):
    cut = CUTS[name]
    nfc = {"type": "NFC"} if cut.composed else None
    main = bytes_bpe(splits(*cut.patterns), nfc, ignore_merges=cut.whole)
    metadata = metadata_of(main)
    found = metadata["tokenizer.ggml.pre"]
    assert CUTS[found] == cut._replace(begins=CUTS[found].begins)
    original, again = tokenizers.Tokenizer.from_str(json.dumps(main)), read(metadata)
    for text in TEXTS:
        assert again.encode(text) == original.encode(text).ids


def test_words_are_cut_as_the_original_patterns_say():
    words = {
        "gpt-2": ["it", "'s", " IT", "'", "S", " 1234", " ", " x", "\n\n"],
        "llama-bpe": ["it", "'s", " IT", "'S", " ", "123", "4", " ", " x", "\n\n"],
        "qwen2": ["it", "'s", " IT", "'S", " ", "1", "2", "3", "4", " ", " x", "\n\n"],
        "smollm": ["it", "'s", " IT", "'", "S", " ", "1", "2", "3", "4", " ", " x"],
    }
    for name, expected in words.items():
        main = bytes_bpe(splits(*CUTS[name].patterns))
        backend = tokenizers.Tokenizer.from_str(json.dumps(main))
        found = backend.pre_tokenizer.pre_tokenize_str("it's IT'S 1234  x\n\n")
        texts = ["it's IT'S 1234  x\n\n"[a:b] for _, (a, b) in found]
        assert texts[: len(expected)] == expected, name


def test_roles_ends_and_templates_are_written_and_read(tmp_path):
    main = bytes_bpe()
    main["model"]["vocab"] |= {"<|im_end|>": 261, "<pad>": 262, "<stop>": 263}
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "<b>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "chat_template": [
            {"name": "default", "template": "{{ messages }}"},
            {"name": "tool use", "template": "{{ tools }}"},
        ],
    }
    metadata = metadata_of(
        main,
        266,
        tokenizer_config=config,
        generation_config={"eos_token_id": [260, 263, 261]},
    )
    values = written(tmp_path, metadata)
    assert values["tokenizer.ggml.eot_token_id"] == 263
    assert values["tokenizer.chat_templates"] == ["tool_use"]
    assert values["tokenizer.ggml.tokens"][264:] == ["[PAD264]", "[PAD265]"]
    kinds = values["tokenizer.ggml.token_type"]
    assert [*kinds[[0, 259, 260, 261, 264]]] == [1, 3, 4, 1, 5]
    again = read(values)
    assert (again.bos_id, again.eos_id, again.pad_id) == (259, 260, 262)
    assert again.eos_ids == (260, 263, 261)
    assert again.encode("the") == [259, *read(values | _OFF).encode("the")]
    assert again.chat_templates == {
        "default": "{{ messages }}",
        "tool_use": "{{ tools }}",
    }
    assert again.encode("a<|im_end|>")[-1] == 261  # an end, therefore found in texts


_OFF = {"tokenizer.ggml.add_bos_token": False}


def test_whether_texts_begin_with_a_token_is_found_in_the_post_processor():
    main = bytes_bpe()
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    main["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [259], "tokens": ["<s>"]}},
    }
    config = {"bos_token": "<s>"}
    metadata = metadata_of(main, tokenizer_config=config)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert read(metadata).encode("x")[0] == 259
    metadata = metadata_of(bytes_bpe(), tokenizer_config=config)
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert not read(metadata).adds_bos


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pre": splits("x+")}, "no name for how this tokenizer cuts words"),
        ({"normalizer": {"type": "NFKC"}}, "changes texts first .NFKC., llama.cpp"),
        ({"normalizer": {"type": "NFC"}}, "changes texts first .NFC., llama.cpp"),
        ({"ignore_merges": True}, "llama.cpp merges words that are tokens"),
        (
            {"pre": {"type": "ByteLevel", "add_prefix_space": True}},
            "puts no space in front",
        ),
    ],
)
def test_what_llama_cpp_does_otherwise_is_reported(changes, message, caplog):
    if "pre" in changes and changes["pre"]["type"] == "ByteLevel":
        changes = {"pre": {**changes["pre"], "trim_offsets": True, "use_regex": True}}
    metadata_of(bytes_bpe(**changes))
    assert len(caplog.records) == 1
    caplog.clear()
    metadata_of(bytes_bpe(**changes))
    assert __import__("re").search(message, caplog.text)


def test_tokenizers_that_llama_cpp_does_not_have_are_refused():
    main = bytes_bpe()
    main["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    main["added_tokens"] = []
    with pytest.raises(UnsupportedError, match="of type WordLevel is not written"):
        metadata_of(main)
    with pytest.raises(UnsupportedError, match="neither byte-level nor has byte fall"):
        metadata_of(bytes_bpe({"type": "Whitespace"}))
    with pytest.raises(UnsupportedError, match="does not write spaces as"):
        metadata_of(bytes_bpe(byte_fallback=True))
    with pytest.raises(FormatError, match="has 261 tokens, the embedding 260 rows"):
        metadata_of(bytes_bpe(), 260)


# ---------------------------------------------------------------- SentencePiece


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


def by_score(text: str, metadata: dict[str, Any], prefix: bool) -> list[int]:
    """Merges the pair of the greatest score, the leftmost of several, until none is."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    symbols = [*("▁" * (prefix and bool(text)) + text.replace(" ", "▁"))]
    while True:
        pairs = [
            (-scores[a + b], i)
            for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
            if a + b in PIECES
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
    ids = []
    for symbol in symbols:
        if symbol in PIECES:
            ids.append(tokens.index(symbol))
        else:
            ids += [tokens.index(f"<0x{byte:02X}>") for byte in symbol.encode()]
    return ids


@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize("seed", range(3))
def test_pieces_are_merged_by_score(prefix, seed, tmp_path):
    metadata = written(tmp_path, sentencepiece(prefix, seed))
    tokenizer = read(metadata)
    rng = np.random.default_rng(seed)
    texts = ["", " ", "a", "  a b", "é\n", "abcab 🚀 cabc"]
    texts += [
        "".join(rng.choice([*"abc "], 30, p=[0.2, 0.3, 0.3, 0.2])) for _ in range(40)
    ]
    for text in texts:
        if "aaaa" in text:  # two equal pieces overlap: any may be merged first
            continue
        want = by_score(text, metadata, prefix is not False)
        assert tokenizer.encode(text, add_special_tokens=False) == want, text
        assert tokenizer.encode(text) == [1, *want]
        assert tokenizer.decode(want) == text


def test_tokens_of_users_are_found_before_all_else(tmp_path):
    tokenizer = read(written(tmp_path, sentencepiece()))
    ids = tokenizer.encode("ab<tool>ab</s>", add_special_tokens=False)
    one = tokenizer.encode("ab", add_special_tokens=False)
    assert ids == [*one, 259 + len(PIECES), *one, 2]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_written_and_read(prefix, tmp_path, caplog):
    main = tokenizer_files(sentencepiece(prefix), "x")["tokenizer.json"]
    metadata = metadata_of(main, 273, tokenizer_config={"eos_token": "</s>"})
    assert not caplog.records
    again = written(tmp_path, metadata)
    assert again["tokenizer.ggml.add_space_prefix"] is prefix
    made = tokenizer_files(again, "x")["tokenizer.json"]
    assert made["model"] == main["model"]
    assert made["normalizer"] == main["normalizer"]
    assert made["decoder"] == main["decoder"]


def test_merges_that_scores_do_not_give_are_reported(caplog):
    main = tokenizer_files(sentencepiece(), "x")["tokenizer.json"]
    main["model"]["merges"] = main["model"]["merges"][1:]
    metadata_of(main, 273)
    assert "of SentencePiece's there are" in caplog.text
    caplog.clear()
    main = tokenizer_files(sentencepiece(), "x")["tokenizer.json"]
    main["normalizer"] = None
    main["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    assert metadata_of(main, 273)["tokenizer.ggml.add_space_prefix"]
    assert "in front of a text only" in caplog.text


# ---------------------------------------------------------------- what is refused


def changed(metadata: dict[str, Any], **changes: Any) -> dict[str, Any]:
    new = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {k: v for k, v in (metadata | new).items() if v is not None}


BAD = {
    "kind": ({"model": "bert"}, UnsupportedError, "tokenizer 'bert' is not read"),
    "tokens": ({"tokens": None}, FormatError, "ggml.tokens' is not a list of texts"),
    "numbers": ({"tokens": np.ones(3)}, FormatError, "is not a list of texts"),
    "twice": ({"tokens": ["a", "b", "a"]}, FormatError, "token 'a' is given twice"),
    "types": (
        {"token_type": np.ones(3, np.int32)},
        FormatError,
        "token_type' has 3 numbers for 262 tokens",
    ),
    "texts": ({"token_type": ["a"]}, FormatError, "is not a list of numbers"),
    "scalar": ({"token_type": 3}, FormatError, "is not a list of numbers"),
    "merges": ({"merges": None}, FormatError, "merges' is not a list of texts"),
    "merge": ({"merges": ["he"]}, FormatError, "merge 'he' is not two tokens"),
    "unknown": ({"merges": ["h x"]}, FormatError, "merge 'h x' is not two tokens that"),
    "pre": ({"pre": "mine"}, UnsupportedError, "pre 'mine' is not known; known: a.x"),
    "pre-type": ({"pre": 3}, FormatError, "ggml.pre' is 3, expected str"),
    "bos": ({"add_bos_token": 1}, FormatError, "add_bos_token' is 1, expected bool"),
    "role": ({"eos_token_id": "x"}, FormatError, "eos_token_id' is 'x', expected int"),
}


@pytest.mark.parametrize("case", BAD)
def test_metadata_that_do_not_fit_are_refused(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        tokenizer_files(changed(metadata_of(bytes_bpe()), **changes), "x.gguf")


@pytest.mark.parametrize("scores", [None, np.full(273, np.nan), np.zeros(3), ["a"]])
def test_scores_that_do_not_fit_are_refused(scores):
    with pytest.raises(FormatError, match=r"x.gguf: .*tokenizer.ggml.scores"):
        tokenizer_files(changed(sentencepiece(), scores=scores), "x.gguf")


def test_roles_out_of_range_are_ignored_with_a_warning(caplog):
    metadata = changed(sentencepiece(), padding_token_id=2**32 - 1, eos_token_id=-1)
    tokenizer = read(metadata)
    assert tokenizer.bos_id == 1 and tokenizer.eos_ids == (
        2,
    )  # which is an end by text
    assert "padding_token_id is 4294967295, of 273 tokens; it is ignored" in caplog.text


def test_files_without_a_tokenizer_or_its_cuts(caplog):
    assert tokenizer_files({"general.architecture": "llama"}, "x") == {}
    none = {"general.architecture": "llama", "tokenizer.ggml.model": "no_vocab"}
    assert tokenizer_files(none, "x") == {}
    read(changed(metadata_of(bytes_bpe()), pre=None))
    assert "does not say how its tokenizer cuts words; using 'default'" in caplog.text


def test_empty_tokens_have_names_and_whole_tokenizers_are_taken(tmp_path):
    metadata = metadata_of(bytes_bpe())
    metadata["tokenizer.ggml.tokens"][261] = ""
    assert "[EMPTY_261]" in read(metadata).backend.get_vocab()
    main = bytes_bpe()
    main["model"]["merges"] = []
    metadata["tokenizer.huggingface.json"] = json.dumps(main)
    assert len(read(written(tmp_path, metadata)).encode("he")) == 2
    metadata["tokenizer.huggingface.json"] = "{"
    with pytest.raises(FormatError, match=r"tokenizer\.huggingface\.json"):
        read(metadata)
    metadata["tokenizer.huggingface.json"] = "{}"
    with pytest.raises(FormatError, match="not a valid tokenizer"):
        read(metadata)

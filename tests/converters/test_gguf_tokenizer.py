"""Byte-level BPE in GGUF files: written and read again."""

import json
import re

import pytest
import tokenizers

from qjax.converters.gguf_patterns import CUTS
from qjax.converters.gguf_vocab import vocabulary
from qjax.errors import FormatError, UnsupportedError
from qjax.text import tokenizer_from
from qjax.text_files import read_files

from .gguf_tokenizers import TEXTS, bytes_bpe, metadata_of, read, splits, written


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
    assert again.eos_ids == (*original.eos_ids, 2)  # <|im_end|> ends all replies
    for name in ("bos_id", "eos_id", "pad_id", "adds_bos", "vocab_size"):
        assert getattr(again, name) == getattr(original, name), name


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


def test_whether_texts_begin_with_a_token_is_found_in_the_post_processor(tmp_path):
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
    assert read(written(tmp_path, metadata)).encode("x")[0] == 259
    metadata = metadata_of(bytes_bpe(), tokenizer_config=config)
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert not read(written(tmp_path, metadata)).adds_bos


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
    assert re.search(message, caplog.text)


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

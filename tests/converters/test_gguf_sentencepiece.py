"""SentencePiece in GGUF files, and metadata of tokenizers that do not fit."""

import itertools
import json
from typing import Any

import numpy as np
import pytest

from qjax.converters.gguf_tokenizer import tokenizer_files
from qjax.errors import FormatError, UnsupportedError

from .gguf_tokenizers import (
    PIECES,
    bytes_bpe,
    changed,
    metadata_of,
    read,
    sentencepiece,
    written,
)


def by_score(text: str, metadata: dict[str, Any], prefix: bool) -> list[int]:
    """Merges the pair of the greatest score, the leftmost of several, until none is."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    symbols = [*("▁" * (prefix and bool(text)) + text.replace(" ", "▁"))]
    while True:
        pairs = [
            (-scores[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(symbols))
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

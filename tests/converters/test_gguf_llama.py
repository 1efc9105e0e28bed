"""GGUF files of qjax in llama.cpp: what it computed from them, and its tokens."""

import json

import numpy as np
import pytest

from qjax.converters.gguf_patterns import CUTS
from tests.golden.converters.make_gguf_llama import (
    CASES,
    HERE,
    KEPT,
    TEXTS,
    WITHOUT,
    vocabularies,
    whole,
)

from .gguf_models import config_of, logits, opened, params_of, written
from .gguf_tokenizers import read
from .gguf_tokenizers import written as metadata_in


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case, tmp_path):
    config = config_of(case, **WITHOUT.get(case, {}))
    found, read = opened(written(tmp_path / "m.gguf", config, params_of(config)))
    got = logits(found, read)[0, -KEPT:]
    want = np.load(HERE / "gguf_llama.npz")[case]
    # llama.cpp looks GELU up in a table of float16
    bound = 1e-5 if config.activation == "silu" else 4e-3
    np.testing.assert_allclose(got, want, atol=bound * np.abs(want).max())


with open(HERE / "gguf_llama.json", encoding="utf-8") as file:
    TOKENS = json.load(file)


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_are_those_of_llama_cpp(name, tmp_path):
    tokenizer = read(metadata_in(tmp_path, whole(vocabularies()[name])))
    tokens, ends = TOKENS[name]
    assert sorted(tokenizer.eos_ids) == ends
    for text, want in zip(TEXTS, tokens, strict=True):
        if name in CUTS and CUTS[name].composed and "\u0301" in text:
            continue  # llama.cpp does not compose it, the models' own tokenizer does
        assert tokenizer.encode(text) == want, text

"""Models in GGUF files against transformers, gguf-py and SentencePiece.

transformers reads GGUF (and loses several settings, which have its defaults here);
gguf-py knows the names of tensors, and writes what llama.cpp's conversion would.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qjax.converters.gguf_config import ARCHITECTURES
from qjax.converters.gguf_model import write_model
from qjax.converters.gguf_names import gguf_names, hf_name
from qjax.models import ModelConfig, from_hf, plan
from tests.converters.gguf_models import (
    config_of,
    golden_module,
    logits,
    opened,
    packed_of,
    params_of,
)
from tests.converters.gguf_tokenizers import TEXTS, bytes_bpe, read, sentencepiece

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers
VOCAB = 262
_WIDE = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {**_WIDE, "attn_logit_softcapping": 50, "final_logit_softcapping": 30},
    "gemma3-old": {**_WIDE, "rope_scaling": None, "sliding_window_pattern": 6},
    "phi3": {"sliding_window": None},
    "gpt2": {"n_positions": 1024},
}


def model_of(case: str, **changes: Any) -> tuple[ModelConfig, dict[str, Any]]:
    config = config_of(case, vocab_size=VOCAB, **CASES.get(case, {}), **changes)
    return config, params_of(config)


def theirs(path: Path) -> np.ndarray:
    """Logits of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    return golden_module.reference_logits(model.eval(), golden_module.make_tokens())


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same(case, kind, tmp_path):
    wide = {"n_inner": 128} if case == "gpt2" else {"intermediate_size": 64}
    config, params = model_of(case, **wide)
    held = params if kind == "f32" else packed_of(config, params)
    path = tmp_path / "m.gguf"
    files = {"tokenizer.json": json.dumps(bytes_bpe()).encode()}
    pad = {"tokenizer.ggml.padding_token_id": 0}  # which Phi-3 has beyond our tokens
    write_model(path, config, iter([held]), files, lambda *_: kind, more=pad)
    want = logits(*opened(path))
    scale = np.abs(want).max()
    np.testing.assert_allclose(theirs(path), want, atol=3e-4 * scale)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_are_those_of_gguf_py(arch):
    kind = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, 3)
    family, name = ARCHITECTURES[arch]
    base = {"model_type": family, "architectures": [name], "attention_bias": True}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 3, "vocab_size": 64, "intermediate_size": 48}
    config = ModelConfig.from_hf({**base, **sizes, "tie_word_embeddings": False})
    wanted = {}
    for entry in plan(config):
        found = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
        if (arch, entry.name) == ("gemma2", "lm_head.weight"):
            continue  # always the embedding
        assert found is not None, entry.name
        wanted[found] = entry.name
        assert hf_name(found, family) == entry.name
    known = {hf_name(name, family) for name in gguf_names(family, 3)}
    assert {*wanted.values()} <= known
    allowed = {gguf.TENSOR_NAMES[t].format(bid=1) for t in gguf.MODEL_TENSORS[kind]}
    assert {name.rpartition(".")[0] for name in wanted if "blk.1." in name} <= allowed


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's conversion/llama.py."""
    apart = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return apart.swapaxes(1, 2).reshape(weight.shape)


def _joined(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query, key, value one after the other: conversion/gptneox.py."""
    apart = weight.reshape(heads, 3, -1, *weight.shape[1:])
    return np.concatenate(
        [apart[:, i].reshape(-1, *weight.shape[1:]) for i in range(3)]
    )


def _converted(name: str, weight: np.ndarray, arch: str, config: ModelConfig):
    """A tensor as llama.cpp's conversion writes it."""
    if arch == "llama" and "q_proj" in name:
        return _permuted(weight, config.heads)
    if arch == "llama" and "k_proj" in name:
        return _permuted(weight, config.kv_heads)
    if arch == "gptneox" and "query_key_value" in name:
        return _joined(weight, config.heads)
    if arch == "gpt2" and name.endswith(
        (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    ):
        return weight.T
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return weight + np.float32(1)
    return weight


@pytest.mark.parametrize(
    "case, arch",
    [
        ("llama", "llama"),
        ("llama-bias", "llama"),
        ("gemma3-old", "gemma3"),
        ("phi3", "phi3"),
        ("gpt_neox", "gptneox"),
        ("gpt2", "gpt2"),
    ],
)
def test_files_of_gguf_py_are_read(case, arch, tmp_path):
    changes = {"num_key_value_heads": 2} if arch == "llama" else {}
    config = config_of(case, **changes)
    kind = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.layers)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.heads)
    if arch != "gpt2":
        writer.add_head_count_kv(config.kv_heads)
        writer.add_rope_dimension_count(config.ropes[-1].dim)
        writer.add_rope_freq_base(config.ropes[-1].theta)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch in ("gpt2", "gptneox"):
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if arch == "gptneox":
        writer.add_parallel_residual(True)
    if arch == "gemma3":
        writer.add_sliding_window(4)
        writer.add_sliding_window_pattern(2)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    if arch == "phi3":
        writer.add_sliding_window(4)
    drawn = {}
    for entry in plan(config):
        if entry.optional:
            continue
        drawn[entry.name] = golden_module.make_weight(entry.name, entry.shape)
        data = _converted(entry.name, drawn[entry.name], arch, config)
        name = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, read = opened(tmp_path / "m.gguf")
    for path, value in from_hf(config, drawn).items():
        bound = 2.4e-7 if arch == "gemma3" and path.endswith("scale") else 0
        np.testing.assert_allclose(read[path], value, rtol=0, atol=bound, err_msg=path)
    for field in ("windows", "qk_norm", "qkv_bias", "mlp_bias", "tied", "activation"):
        assert getattr(found, field) == getattr(config, field), field
    assert found.ropes == config.ropes and found.rope_layers == config.rope_layers
    assert found.attention_scale == config.attention_scale


def test_transformers_finds_the_same_tokens(model_path, tmp_path, tokenizer):
    from transformers import AutoTokenizer

    import qjax

    qjax.convert(model_path, tmp_path / "m.gguf", "gguf:q8_0")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS[:5]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert theirs.encode(text, add_special_tokens=False) == ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_finds_the_same_tokens(prefix, tmp_path, books_text):
    sp = pytest.importorskip("sentencepiece")
    sp.SentencePieceTrainer.train(
        sentence_iterator=iter(books_text[:60_000].splitlines()),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    model = sp.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    count = range(model.vocab_size())
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 * model.is_byte(i)
        for i in count
    ]
    metadata = {
        **sentencepiece(prefix),
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in count],
        "tokenizer.ggml.scores": np.float32([model.get_score(i) for i in count]),
        "tokenizer.ggml.token_type": np.int32([kind or 1 for kind in kinds]),
    }
    ours = read(metadata)
    lines = books_text[100_000:130_000].splitlines()
    for text in [*TEXTS[:6], *lines]:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == model.encode(text), text
        assert ours.decode(ids) == model.decode(ids) == text

"""Published configurations are read and give the published number of parameters."""

import math

import pytest

from qjax.models import ModelConfig, param_shapes


def _sizes(vocab, dim, mlp, layers, heads, kv_heads, **more):
    return {
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


PUBLISHED = {
    "meta-llama/Llama-2-7b": (
        6_738_415_616,
        _sizes(32000, 4096, 11008, 32, 32, 32, model_type="llama"),
    ),
    "meta-llama/Llama-3.1-8B": (
        8_030_261_248,
        _sizes(
            *(128256, 4096, 14336, 32, 32, 8),
            model_type="llama",
            max_position_embeddings=131072,
            rope_theta=500000.0,
            rope_scaling={
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        ),
    ),
    "mistralai/Mistral-7B-v0.1": (
        7_241_732_096,
        _sizes(32000, 4096, 14336, 32, 32, 8, model_type="mistral"),
    ),
    "Qwen/Qwen2.5-0.5B": (
        494_032_768,
        _sizes(
            *(151936, 896, 4864, 24, 14, 2),
            model_type="qwen2",
            tie_word_embeddings=True,
            use_sliding_window=False,
            sliding_window=32768,
            max_window_layers=24,
        ),
    ),
    "Qwen/Qwen3-0.6B": (
        596_049_920,
        _sizes(
            *(151936, 1024, 3072, 28, 16, 8),
            model_type="qwen3",
            head_dim=128,
            tie_word_embeddings=True,
            rope_scaling=None,
            sliding_window=None,
        ),
    ),
    "google/gemma-2-2b": (
        2_614_341_888,
        _sizes(256000, 2304, 9216, 26, 8, 4, model_type="gemma2", head_dim=256),
    ),
    "google/gemma-3-1b-pt": (
        999_885_952,
        _sizes(262144, 1152, 6912, 26, 4, 1, model_type="gemma3_text", head_dim=256),
    ),
    "microsoft/Phi-3-mini-128k-instruct": (
        3_821_079_552,
        _sizes(
            *(32064, 3072, 8192, 32, 32, 32),
            model_type="phi3",
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": [1.5] * 48,
            },
        ),
    ),
    "EleutherAI/pythia-410m": (
        405_334_016,
        {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "vocab_size": 50304,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
        },
    ),
    "openai-community/gpt2": (
        124_439_808,
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": 50257,
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
        },
    ),
    "facebook/opt-125m": (
        125_239_296,
        {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "vocab_size": 50272,
            "hidden_size": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "word_embed_proj_dim": 768,
            "do_layer_norm_before": True,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    count, data = PUBLISHED[name]
    shapes = param_shapes(ModelConfig.from_hf(data))
    assert sum(math.prod(shape) for shape in shapes.values()) == count


def test_phi3_rotates_by_long_factors():
    config = ModelConfig.from_hf(PUBLISHED["microsoft/Phi-3-mini-128k-instruct"][1])
    (rope,) = config.ropes
    assert rope.kind == "longrope" and rope.context == 4096
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + 5 / 12))


def test_pythia_rotates_a_quarter_of_each_head():
    config = ModelConfig.from_hf(PUBLISHED["EleutherAI/pythia-410m"][1])
    assert config.head_dim == 64 and config.ropes[0].dim == 16

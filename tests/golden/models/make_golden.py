"""Writes the golden logits of every architecture, computed by transformers.

    python tests/golden/models/make_golden.py

Needs torch and transformers (the [peers] extra); about a minute. Weights are not
stored: `make_weight` draws them from a frozen generator, by checkpoint name and shape,
so tests draw the same ones. Every file records the versions that computed it.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
BATCH, TIME, VOCAB = 2, 12, 64

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
_LLAMA = {**_GATED, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_MISTRAL = {**_GATED, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
_QWEN2 = {**_GATED, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
_QWEN3 = {
    **_GATED,
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 16,
}
_GEMMA2 = {
    **_GATED,
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "head_dim": 16,
    "sliding_window": 4,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0,
}
_GEMMA3 = {
    **_GATED,
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 16,
    "sliding_window": 4,
    "query_pre_attn_scalar": 24,
}
_PHI3 = {**_GATED, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
_NEOX = {
    **_COMMON,
    "intermediate_size": 48,
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
}
_GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {
    **_COMMON,
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
}

CASES: dict[str, dict] = {
    "llama": {**_LLAMA, "num_key_value_heads": 4},
    "llama-llama3": {**_LLAMA, "rope_theta": 5e5, "rope_scaling": _LLAMA3},
    "llama-linear": {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-dynamic": {
        **_LLAMA,
        "max_position_embeddings": 8,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "llama-yarn": {**_LLAMA, "rope_scaling": _YARN},
    "llama-yarn-mscale": {
        **_LLAMA,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 2e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
        },
    },
    "mistral": {**_MISTRAL, "sliding_window": 4, "rope_theta": 1e6},
    "mistral-head-dim": {**_MISTRAL, "sliding_window": None, "head_dim": 12},
    "qwen2": {**_QWEN2, "tie_word_embeddings": True},
    "qwen2-window": {
        **_QWEN2,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {**_QWEN3, "rope_theta": 1e6},
    "qwen3-bias": {**_QWEN3, "attention_bias": True, "tie_word_embeddings": True},
    "gemma2": _GEMMA2,
    "gemma2-gelu": {**_GEMMA2, "hidden_activation": "gelu", "attention_bias": True},
    "gemma3-old": {
        **_GEMMA3,
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3-new": {
        **_GEMMA3,
        "final_logit_softcapping": 5.0,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    },
    "phi3": {**_PHI3, "sliding_window": 4},
    "phi3-partial": {**_PHI3, "partial_rotary_factor": 0.5, "num_key_value_heads": 4},
    "phi3-long": {
        **_PHI3,
        "original_max_position_embeddings": 8,
        "rope_scaling": _LONG,
    },
    "phi3-short": {
        **_PHI3,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            **_LONG,
            "type": "su",
            "original_max_position_embeddings": 16,
        },
    },
    "gpt_neox": {**_NEOX, "rotary_pct": 0.5, "rotary_emb_base": 2e4},
    "gpt_neox-sequential": {
        **_NEOX,
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_new",
    },
    "gpt2": _GPT2,
    "gpt2-scaled": {**_GPT2, "n_inner": 40, "scale_attn_by_inverse_layer_idx": True},
    "opt": _OPT,
    "opt-after": {**_OPT, "do_layer_norm_before": False, "enable_bias": False},
    "opt-plain": {
        **_OPT,
        "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
    },
}
"""`config.json` of every case, by name."""


def family(case: str) -> str:
    """Returns the name of the file that holds a case."""
    return CASES[case]["model_type"]


def make_weight(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Draws one tensor: the same for the same name, shape and seed, everywhere."""
    random = np.random.RandomState(zlib.crc32(name.encode()) ^ seed)
    values = random.standard_normal(shape).astype(np.float32) * np.float32(0.2)
    scale = len(shape) == 1 and name.endswith("weight")
    return values + np.float32(1) if scale else values


def make_tokens(seed: int = 0) -> np.ndarray:
    """Draws the token ids of a case."""
    random = np.random.RandomState(1 + seed)
    return random.randint(3, VOCAB, size=(BATCH, TIME)).astype(np.int32)


def load_reference(config: dict, seed: int = 0):
    """Returns the transformers model of a configuration, loaded from files.

    Raises:
        ValueError: The drawn tensors are not exactly what transformers expects.
    """
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(config))
        parsed = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(parsed)
        tied = parsed.tie_word_embeddings
        shapes = {
            name.replace("lm_head", "embed_out")
            if parsed.model_type == "gpt_neox"
            else name: tuple(tensor.shape)
            for name, tensor in empty.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        tensors = {name: make_weight(name, s, seed) for name, s in shapes.items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    faults = {key: list(value) for key, value in info.items() if value}
    if faults:
        raise ValueError(f"transformers did not load the drawn tensors: {faults}")
    return model.eval()


def reference_logits(model, tokens: np.ndarray) -> np.ndarray:
    """Returns the float32 logits of a transformers model."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def main() -> None:
    """Writes one file per family."""
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    for name in sorted({family(case) for case in CASES}):
        arrays = {
            case: reference_logits(load_reference(config), make_tokens())
            for case, config in CASES.items()
            if family(case) == name
        }
        np.savez_compressed(HERE / f"{name}.npz", versions=np.array(versions), **arrays)


if __name__ == "__main__":
    main()

"""A tiny random Llama directory with a tokenizer, and what tampers with it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qjax.converters.huggingface import write_checkpoint
from qjax.models import ModelConfig, plan

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def random_tensors(config: dict) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, drawn by name order with a fixed seed."""
    rng = np.random.default_rng(7)
    return {
        entry.name: (rng.standard_normal(entry.shape) * 0.05).astype(np.float32)
        for entry in plan(ModelConfig.from_hf(config))
    }


@pytest.fixture(scope="session")
def make_model(model_path: Path):
    """Writes a random Llama with the bundled tokenizer, some keys changed."""

    def make(path: Path, **changes: object) -> Path:
        config = CONFIG | changes
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        files = {name: model_path / name for name in names}
        write_checkpoint(path, config, random_tensors(config), files)
        return path

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, make_model) -> Path:
    """The directory; do not write to it, copy it."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copied"))


@pytest.fixture
def edit_config():
    """Changes keys of a directory's config.json."""

    def edit(path: Path, **changes: object) -> None:
        file = path / "config.json"
        config = json.loads(file.read_text("utf-8")) | changes
        file.write_text(json.dumps(config), "utf-8")

    return edit

"""Writes what llama.cpp computes from GGUF files that qjax wrote.

    python -m tests.golden.converters.make_gguf_llama

Needs llama-cpp-python (0.3.36 made these), or its module `llama_cpp.llama_cpp` alone
with `LLAMA_CPP_LIB_PATH` on a build. Logits are those of float32 files, caches and
contexts of 64 tokens; tokens those of the bundled vocabulary under every known way to
cut words, by the first of its names.
"""

import ctypes
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from qjax.converters.gguf_patterns import CUTS
from qjax.converters.gguf_vocab import vocabulary
from qjax.converters.gguf_write import write_gguf
from qjax.text_files import read_files
from tests.converters.gguf_models import config_of, golden_module, params_of, written
from tests.converters.gguf_tokenizers import TEXTS, sentencepiece

HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[2] / "examples" / "model"
WITHOUT = {"phi3": {"sliding_window": None}, "phi3-partial": {"sliding_window": None}}
"""Windows that llama.cpp does not slide."""
CASES = (
    *("llama", "llama-bias", "llama-llama3", "llama-linear", "llama-yarn"),
    *("llama-long", "llama-yarn-factor", "mistral-head-dim", "qwen2", "qwen3"),
    *("gemma2", "gemma3-old", "gemma3-new", "gemma3-full", "phi3", "phi3-partial"),
    *("phi3-long", "gpt_neox", "gpt_neox-tanh", "gpt_neox-sequential", "gpt2"),
)
KEPT = 3
"""Last positions whose logits are stored."""


def load(path: Path, **settings: Any) -> Any:
    """A model of llama.cpp."""
    import llama_cpp.llama_cpp as api

    params = api.llama_model_default_params()
    for name, value in settings.items():
        setattr(params, name, value)
    model = api.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise ValueError(f"llama.cpp does not load {path}")
    return model


def logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of all positions of one text."""
    import llama_cpp.llama_cpp as api

    model, params = load(path, n_gpu_layers=0), api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.type_k = params.type_v = params.flash_attn_type = 0
    context = api.llama_init_from_model(model, params)
    size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    if api.llama_decode(context, batch):
        raise ValueError(f"llama.cpp does not compute {path}")
    found = [api.llama_get_logits_ith(context, i) for i in range(len(tokens))]
    made = np.stack([np.ctypeslib.as_array(row, (size,)).copy() for row in found])
    api.llama_free(context)
    api.llama_model_free(model)
    return made


def tokens_of(path: Path) -> tuple[list[list[int]], list[int]]:
    """Tokens of every text, and all that end a reply."""
    import llama_cpp.llama_cpp as api

    vocab = api.llama_model_get_vocab(load(path, vocab_only=True))
    made = []
    for text in TEXTS:
        raw = text.encode()
        room = (api.llama_token * (len(raw) + 8))()
        count = api.llama_tokenize(vocab, raw, len(raw), room, len(room), True, True)
        made.append(list(room[:count]))
    ends = range(api.llama_vocab_n_tokens(vocab))
    return made, [i for i in ends if api.llama_vocab_is_eog(vocab, i)]


def vocabularies() -> dict[str, dict[str, Any]]:
    """Metadata of tokenizers by name."""
    bundled = vocabulary(read_files(MODEL), 4096, "model")
    bundled["tokenizer.ggml.add_bos_token"] = False
    first = {cut[:2]: name for name, cut in reversed(CUTS.items())}
    made = {name: {**bundled, "tokenizer.ggml.pre": name} for name in first.values()}
    return {**made, "spaced": sentencepiece(True), "plain": sentencepiece(False)}


def whole(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata that llama.cpp loads a vocabulary from."""
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 1}
    sizes |= {"feed_forward_length": 32, "attention.head_count": 4}
    own: dict[str, Any] = {f"llama.{key}": value for key, value in sizes.items()}
    own["llama.attention.layer_norm_rms_epsilon"] = 1e-5
    return {"general.architecture": "llama", **own, **metadata}


def main() -> None:
    """Writes `gguf_llama.npz` and `gguf_llama.json`."""
    import llama_cpp.llama_cpp as api

    silent = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(silent, ctypes.c_void_p(0))
    api.llama_backend_init()
    text = golden_module.make_tokens()[0]
    arrays, found = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        for case in CASES:
            config = config_of(case, **WITHOUT.get(case, {}))
            written(path, config, params_of(config), overwrite=True)
            arrays[case] = logits(path, text)[-KEPT:]
        for name, metadata in vocabularies().items():
            write_gguf(path, whole(metadata), [], overwrite=True)
            found[name] = tokens_of(path)
    np.savez_compressed(HERE / "gguf_llama.npz", **arrays)
    lines = [f"{json.dumps(name)}: {json.dumps(f)}" for name, f in found.items()]
    (HERE / "gguf_llama.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

"""Decode speed of a 1.1B Llama in 4 bits beside llama.cpp's Q4_0, in one run.

    command   python benchmarks/llama_cpp.py --llama-bench PATH/llama-bench
    needs     the gguf package; llama-bench built from the source archive of
              llama-cpp-python on PyPI (vendor/llama.cpp, cmake, GGML_NATIVE=ON)
    hardware  any CPU; 3 GB of memory
    minutes   3
    result    tokens per second of both, batch 1, turn by turn, and their ratio

The model has TinyLlama's shape and random weights; speed does not depend on their
values. Both sides store every matrix, head and embedding included, in 4 bits with a
float16 scale per 32 weights (4.5 bits), and use `--threads` threads. `--profile` prints
where a token's time goes on our side.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

VOCAB, DIM, LAYERS, HEADS, KV_HEADS, MLP = 32000, 2048, 22, 32, 4, 5632
HEAD_DIM = DIM // HEADS
MATRICES = {
    "attn.q": (DIM, DIM),
    "attn.k": (DIM, KV_HEADS * HEAD_DIM),
    "attn.v": (DIM, KV_HEADS * HEAD_DIM),
    "attn.o": (DIM, DIM),
    "mlp.gate": (DIM, MLP),
    "mlp.up": (DIM, MLP),
    "mlp.down": (MLP, DIM),
}
GGUF_NAMES = {
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def write_gguf(path):
    """A Q4_0 model of random blocks."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(DIM)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")

    def add(name, rows, cols):
        blocks = rng.integers(0, 256, (cols, rows // 32, 18), dtype=np.uint8)
        scale = np.full((cols, rows // 32), 0.002, np.float16)
        blocks[..., :2] = scale[..., None].view(np.uint8)
        flat = blocks.reshape(cols, rows // 32 * 18)
        writer.add_tensor(name, flat, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    add("token_embd.weight", DIM, VOCAB)
    for i in range(LAYERS):
        for name, (rows, cols) in MATRICES.items():
            add(f"blk.{i}.{GGUF_NAMES[name]}.weight", rows, cols)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(DIM, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(DIM, np.float32))
    add("output.weight", DIM, VOCAB)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def our_model():
    """The same model in qjax's own format, random codes."""
    import jax.numpy as jnp

    import qjax
    from qjax.models import Decoder, ModelConfig
    from qjax.tensor import AffineTensor
    from qjax.wrappers import Transposed

    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": DIM,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }
    )
    rng = np.random.default_rng(0)
    fmt = qjax.Int(4, 32, scale_dtype="float16")

    def packed(rows, cols):
        codes = rng.integers(0, 256, (rows // 2, cols), dtype=np.uint8)
        scale = jnp.full((rows // 32, cols), 0.002, jnp.float16)
        return AffineTensor(jnp.asarray(codes), scale, None, fmt, (rows, cols))

    params = {"embed.embedding": Transposed(packed(DIM, VOCAB))}
    for i in range(LAYERS):
        for name, shape in MATRICES.items():
            params[f"layers.{i}.{name}.kernel"] = packed(*shape)
        for norm in ("attn_norm", "mlp_norm"):
            params[f"layers.{i}.{norm}.scale"] = jnp.ones(DIM, jnp.float32)
    params["norm.scale"] = jnp.ones(DIM, jnp.float32)
    params["head.kernel"] = packed(DIM, VOCAB)
    return qjax.prepack(Decoder(config, params, dtype="float32"))


def our_speed(model, tokens):
    """Tokens per second of greedy decoding from an almost empty cache."""
    import jax

    from qjax.decoding import STEPS, STOP_IDS, Batch, programs
    from qjax.sampling import make_sampling

    length = 64 + -(-tokens // STEPS) * STEPS
    prefill, decode, params = programs(model, 1, length)
    batch = Batch(
        tokens=np.ones((1, length), np.int32),
        lengths=np.ones(1, np.int32),
        seeds=np.zeros(1, np.uint32),
        stop_ids=np.full(STOP_IDS, -1, np.int32),
        settings=make_sampling(1),
    )
    state, _ = jax.block_until_ready(prefill(params, batch))
    start, done = time.perf_counter(), 0
    while done < tokens:
        steps = min(STEPS, tokens - done)
        state, _, count = decode(params, state, batch, np.int32(steps))
        done += int(count)
    return done / (time.perf_counter() - start)


def their_speed(binary, path, tokens, threads):
    """Tokens per second that llama-bench reports."""
    command = [binary, "-m", str(path), "-p", "0", "-n", str(tokens)]
    command += ["-t", str(threads), "-r", "1", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)[0]["avg_ts"]


def main():
    """Measures in turns and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-bench", default=None)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = our_model()
    our_speed(model, options.tokens)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        if options.llama_bench:
            write_gguf(path)
        for _ in range(options.rounds):
            ours.append(our_speed(model, options.tokens))
            if options.llama_bench:
                args = options.llama_bench, path, options.tokens, options.threads
                theirs.append(their_speed(*args))
    result = {"ours": ours, "theirs": theirs, "median": statistics.median(ours)}
    print(f"qjax       {statistics.median(ours):8.2f} tokens/s")
    if theirs:
        result["ratio"] = statistics.median(
            a / b for a, b in zip(ours, theirs, strict=True)
        )
        print(f"llama.cpp  {statistics.median(theirs):8.2f} tokens/s")
        print(f"ratio      {result['ratio']:8.3f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.profile:
        profile(model, options.tokens)


def profile(model, tokens):
    """Prints the longest operations of a run by total time."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            our_speed(model, tokens)
        (file,) = Path(folder).rglob("*.xplane.pb")
        totals = {}
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    key = f"{line.name}: {event.name}"
                    totals[key] = totals.get(key, 0.0) + event.duration_ns
    for name, total in sorted(totals.items(), key=lambda i: -i[1])[:40]:
        print(f"{total / tokens / 1e6:9.3f} ms/token  {name[:100]}")


if __name__ == "__main__":
    sys.exit(main())

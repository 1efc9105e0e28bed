"""QLoRA steps beside PEFT over bitsandbytes: tokens per second and memory, on CPU.

    command   python benchmarks/finetune_speed.py [--steps 8] [--rows 4] [--time 256]
              [--rounds 2] [--remat products] [--json FILE]
    needs     torch, transformers, peft, bitsandbytes ('.[peers]')

Both train adapters of rank 16 on all linear layers of the bundled model, NF4 with
double quantization, float32, AdamW, on the same tokens. Each side runs in a process of
its own, in turns; a row has the median step of all its rounds, the first two of each
left out, and the greatest resident memory. Both have the logits of all tokens at once,
and with `--remat block` both compute blocks again in the gradient.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "model"
WARM = 2


def tokens_of(steps: int, rows: int, length: int) -> np.ndarray:
    """The same tokens on both sides, `[steps, rows, length + 1]`."""
    rng = np.random.default_rng(0)
    return rng.integers(5, 2000, (steps + WARM, rows, length + 1))


def ours(batches: np.ndarray, remat: str) -> tuple[list[float], list[float]]:
    """Seconds and losses of the steps of qjax."""
    import jax

    import qjax
    from qjax.train import LoRA, Optimizer, Step, attach, make_optimizer

    model, _ = qjax.load(MODEL)
    model = qjax.quantize_model(model, "nf4")
    attach(model, LoRA(rank=16), jax.random.key(0))
    tx = make_optimizer(Optimizer(warmup=0.0), len(batches))
    tokens = batches.shape[1] * (batches.shape[2] - 1)
    step = Step(model, tx, remat=remat, loss_chunk=tokens)
    state = step.init(jax.random.key(1))
    seconds, losses = [], []
    for ids in batches.astype(np.int32):
        shape = (1, ids.shape[0], ids.shape[1] - 1)
        batch = {
            "tokens": ids[None, :, :-1],
            "targets": ids[None, :, 1:],
            "weights": np.ones(shape, np.float32),
            "positions": np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape),
            "segments": np.ones(shape, np.int32),
        }
        start = time.perf_counter()
        state, metrics = step(state, step.frozen, batch)
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - start)
    return seconds, losses


def theirs(batches: np.ndarray, remat: str) -> tuple[list[float], list[float]]:
    """Seconds and losses of the steps of PEFT, with its gradient checkpoints or not."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(2)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(MODEL, quantization_config=settings, dtype=torch.float32)
    config = peft.LoraConfig(
        r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    if remat == "block":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    seconds, losses = [], []
    for batch in batches:
        ids = torch.as_tensor(batch)
        start = time.perf_counter()
        logits = model(ids[:, :-1]).logits
        flat = logits.reshape(-1, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return seconds, losses


def alone(options: argparse.Namespace, side: str) -> dict[str, object]:
    """One side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        sizes = [options.steps, options.rows, options.time]
        command = [sys.executable, __file__, "--side", side, "--json", str(path)]
        command += ["--remat", options.remat]
        for name, size in zip(("--steps", "--rows", "--time"), sizes, strict=True):
            command += [name, str(size)]
        subprocess.run(command, check=True)
        return json.loads(path.read_text("utf-8"))


def main() -> None:
    """Runs both sides in turns and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--time", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--remat", default="products", help="what qjax stores")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("qjax", "peft"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run = {"qjax": ours, "peft": theirs}[options.side]
        batches = tokens_of(options.steps, options.rows, options.time)
        seconds, losses = run(batches, options.remat)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        done = {"seconds": seconds[WARM:], "first": seconds[0], "losses": losses}
        options.json.write_text(json.dumps(done | {"peak_bytes": peak}), "utf-8")
        return
    found: dict[str, list[dict]] = {"qjax": [], "peft": []}
    for _ in range(options.rounds):
        for side, rounds in found.items():
            rounds.append(alone(options, side))
    print("| | tokens/s | first step, s | peak memory, MB | first loss | last loss |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for side, rounds in found.items():
        middle = statistics.median(s for one in rounds for s in one["seconds"])
        rate = options.rows * options.time / middle
        peak = max(one["peak_bytes"] for one in rounds) / 1e6
        first, losses = rounds[0]["first"], rounds[0]["losses"]
        numbers = f"{peak:.0f} | {losses[0]:.3f} | {losses[-1]:.3f}"
        print(f"| {side} | {rate:.0f} | {first:.1f} | {numbers} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()

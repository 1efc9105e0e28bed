"""What 8-bit and host-resident optimizer states cost in loss, and save in bytes.

    command   python benchmarks/optimizers.py [--steps 60] [--train lora full]
              [--rules adamw lion] [--json FILE]
    hardware  any CPU
    minutes   about one per rule and kind of training on two cores
    result    a Markdown table: losses of the bundled model after training with float32
              states, with 8-bit states, and with 8-bit states in host memory, on what
              it was trained on and on books it has not seen; bytes of the state, and
              those of them in host memory. Exit status 1 if a loss with 8-bit states
              is more than 0.5 % above that with float32 states

Training reads the calibration text in windows of `--context` tokens, the same in the
same order for all; adapters start from the same values over an NF4 model.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qjax
from qjax.train.lora import attach
from qjax.train.lora_config import LoRA
from qjax.train.offload import host_states
from qjax.train.optimizers import Optimizer, make_optimizer, state_bytes
from qjax.train.step import Step
from qjax.train.stream import on_host

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ALLOWED = 1.005
RATES = {"lora": {"adamw": 2e-3, "lion": 2e-4}, "full": {"adamw": 2e-4, "lion": 2e-5}}
STATES = {"32": (32, False), "8": (8, False), "8, host": (8, True)}
"""Bits of a state, and whether it lies in host memory."""
HOSTED = 1000
"""Elements from which on an array does: fewer than usual, for a small model."""


def windows_of(tokenizer, name: str, context: int) -> np.ndarray:
    """A text as windows of one token more than the context."""
    text = (EXAMPLES / "data" / name).read_text("utf-8")
    ids = np.asarray(tokenizer.encode(text), np.int32)
    count = (len(ids) - 1) // context
    return np.stack([ids[i * context : (i + 1) * context + 1] for i in range(count)])


def batch_of(rows: np.ndarray) -> dict[str, jax.Array]:
    """One micro-batch of windows, every target of which counts."""
    inputs = rows[None, :, :-1]
    places = np.broadcast_to(np.arange(inputs.shape[2], dtype=np.int32), inputs.shape)
    arrays = {
        "tokens": inputs,
        "targets": rows[None, :, 1:],
        "weights": np.ones(inputs.shape, np.float32),
        "positions": places,
        "segments": np.ones(inputs.shape, np.int32),
    }
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def held_out(step: Step, trainable, windows: np.ndarray, rows: int) -> float:
    """Mean loss on windows."""
    found = [
        step.evaluate(trainable, step.frozen, batch_of(part))
        for part in np.split(windows, len(windows) // rows)
    ]
    return sum(float(x) for x, _ in found) / sum(float(n) for _, n in found)


def trained(model, kind: str, tx, texts, options) -> dict[str, float]:
    """Trains a copy of a model."""
    model = nnx.clone(model)
    if kind == "lora":
        attach(model, LoRA(rank=16), jax.random.key(0))
    wrt = nnx.LoRAParam if kind == "lora" else nnx.Param
    step = Step(model, tx, wrt=wrt)
    state, rng = step.init(jax.random.key(1)), np.random.default_rng(0)
    states = jax.tree.leaves(state.optimizer)
    total, far = state_bytes(states), state_bytes([x for x in states if on_host(x)])
    before = held_out(step, state.trainable, texts[1], options.rows)
    losses, began = [], 0.0
    for _ in range(options.steps):
        rows = rng.choice(len(texts[0]), options.rows, replace=False)
        state, metrics = step(state, step.frozen, batch_of(texts[0][rows]))
        losses.append(float(metrics.loss))
        began = began or time.perf_counter()
    seconds = (time.perf_counter() - began) / max(options.steps - 1, 1)
    held = held_out(step, state.trainable, texts[1], options.rows)
    last = max(options.steps // 4, 1)
    return {
        "before": before,
        "loss": float(np.mean(losses[-last:])),
        "held": held,
        "bytes": total,
        "host": far,
        "seconds": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--train", nargs="*", default=["lora", "full"])
    parser.add_argument("--rules", nargs="*", default=["adamw", "lion"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    original, tokenizer = qjax.load(str(EXAMPLES / "model"))
    models = {"lora": qjax.quantize_model(original, "nf4"), "full": original}
    texts = [
        windows_of(tokenizer, f"books-{name}.txt", options.context)
        for name in ("calibration", "test")
    ]
    texts[1] = texts[1][: 16 * options.rows]
    names = "training, rule, states, held out before, after, trained, of 32-bit, "
    names += "state MB, in host memory, s/step"
    print(f"| {' | '.join(names.split(', '))} |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows, worst = [], 1.0
    for kind in options.train:
        for rule in options.rules:
            base = None
            for name, (bits, far) in STATES.items():
                config = Optimizer(rule, RATES[kind][rule], "cosine", bits=bits)
                tx = make_optimizer(config, options.steps)
                tx = host_states(tx, HOSTED) if far else tx
                row = trained(models[kind], kind, tx, texts, options)
                base = base or row
                share = max(row[key] / base[key] for key in ("loss", "held"))
                worst = max(worst, share)
                rows.append({"train": kind, "rule": rule, "states": name, **row})
                print(
                    f"| {kind} | {rule} | {name} | {row['before']:.4f} | "
                    f"{row['held']:.4f} | {row['loss']:.4f} | {share:.4f} | "
                    f"{row['bytes'] / 1e6:.2f} | {row['host'] / row['bytes']:.0%} | "
                    f"{row['seconds']:.2f} |",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print(f"worst loss: {worst:.4f} of that with float32 states; {ALLOWED} is allowed")
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())

"""What quantization-aware training recovers of the perplexity that rounding costs.

    command   python benchmarks/qat.py [--recipes int4-g64 int3-g64] [--steps 100]
              [--learn lsq] [--rate 1e-4] [--loss kl] [--json FILE]
    hardware  any CPU
    minutes   about ten per recipe on two cores, and for the float model with `ce`
    result    a Markdown table: perplexity of the bundled model on books it has not
              seen, as it is, rounded to nearest, and trained for the format; the share
              of the gap that training recovers; and whether the converted model gives
              the logits of the trained one bit for bit

Training reads the calibration text, 8 windows of 512 tokens a step. `kl` matches the
original model's predictions, which cannot make the model better than it was; `ce` is
the usual loss on the text, which can: the float model trained for as many steps with
the same loss says how much of a gain that is. Protocol `gptq`: windows of 512 tokens,
first token of each not scored, float32.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import qjax
from qjax.evaluate import evaluate
from qjax.train.loss import token_losses
from qjax.train.qat import QAT, convert, prepare

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CONTEXT, ROWS = 512, 8


def windows_of(tokenizer) -> np.ndarray:
    """The calibration text as windows of one token more than the context."""
    text = (EXAMPLES / "data" / "books-calibration.txt").read_text("utf-8")
    ids = np.asarray(tokenizer.encode(text), np.int32)
    count = (len(ids) - 1) // CONTEXT
    return np.stack([ids[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)])


def perplexity(model, tokenizer, windows: int) -> float:
    """On the held-out books."""
    text = (EXAMPLES / "data" / "books-test.txt").read_text("utf-8")
    found = evaluate(model, tokenizer, text, context=CONTEXT, windows=windows)
    return found["perplexity"]


def trained(model, wrt, teacher, text: np.ndarray, options) -> float:
    """Trains in place; returns seconds per step, the first left out."""
    graph, state, frozen = nnx.split(model, wrt, ...)
    teacher = nnx.split(teacher)
    schedule = optax.cosine_decay_schedule(options.rate, options.steps, 0.05)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    def loss(state, frozen, target, batch):
        inputs, wanted = batch[:, :-1], batch[:, 1:]
        logits = nnx.merge(graph, state, frozen)(inputs)[0]
        if options.loss == "ce":
            return jnp.mean(token_losses(logits, wanted))
        goal = jax.nn.log_softmax(nnx.merge(teacher[0], target)(inputs)[0])
        miss = goal - jax.nn.log_softmax(logits)
        return jnp.mean(jnp.sum(jnp.exp(goal) * miss, axis=-1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state, moments, frozen, target, batch):
        value, slope = jax.value_and_grad(loss)(state, frozen, target, batch)
        change, moments = tx.update(slope, moments, state)
        return optax.apply_updates(state, change), moments, value

    state = jax.tree.map(jnp.copy, state)
    moments, rng, began = tx.init(state), np.random.default_rng(0), 0.0
    for i in range(options.steps):
        batch = jnp.asarray(text[rng.choice(len(text), ROWS, replace=False)])
        state, moments, value = step(state, moments, frozen, teacher[1], batch)
        if i == 0:
            value.block_until_ready()
            began = time.perf_counter()
    jax.block_until_ready(state)
    nnx.update(model, state)
    return (time.perf_counter() - began) / max(options.steps - 1, 1)


def same_logits(a, b, tokens) -> bool:
    """Whether two models give equal logits, bit for bit, compiled."""
    found = []
    for model in (a, b):
        graph, state = nnx.split(model)
        run = jax.jit(lambda s, t, graph=graph: nnx.merge(graph, s)(t)[0])
        found.append(np.asarray(run(state, tokens)))
    return bool((found[0] == found[1]).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="*", default=["int4-g64", "int3-g64"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--learn", default="lsq")
    parser.add_argument("--loss", choices=("kl", "ce"), default="kl")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = str(EXAMPLES / "model")
    original, tokenizer = qjax.load(path)
    text = windows_of(tokenizer)
    measure = functools.partial(
        perplexity, tokenizer=tokenizer, windows=options.windows
    )
    rows = {"original": {"perplexity": measure(original)}}
    start = rows["original"]["perplexity"]
    print("| model | perplexity | gap recovered | s/step | bits equal |")
    print("| --- | ---: | ---: | ---: | --- |")
    print(f"| original | {start:.3f} | | | |", flush=True)
    if options.loss == "ce":
        model = nnx.clone(original)
        seconds = trained(model, nnx.Param, original, text, options)
        rows["float, trained"] = {"perplexity": measure(model), "seconds": seconds}
        row = rows["float, trained"]
        print(
            f"| float, trained | {row['perplexity']:.3f} | | {seconds:.2f} | |",
            flush=True,
        )
    for recipe in options.recipes:
        rounded = measure(qjax.quantize_model(original, recipe))
        print(f"| {recipe} | {rounded:.3f} | 0 % | | |", flush=True)
        config = QAT(recipe, learn=options.learn)
        model = nnx.clone(original)
        prepare(model, config)
        seconds = trained(model, config.wrt, original, text, options)
        made = convert(model)
        found = measure(made)
        equal = same_logits(model, made, jnp.asarray(text[:2, :64]))
        share = (rounded - found) / (rounded - start)
        rows[recipe] = {
            "rounded": rounded,
            "trained": found,
            "recovered": share,
            "seconds": seconds,
            "equal": equal,
        }
        print(
            f"| {recipe}, trained | {found:.3f} | {share:.0%} | {seconds:.2f} | "
            f"{'yes' if equal else 'no'} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

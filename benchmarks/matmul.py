"""Speed and memory of `qjax.ops.matmul` beside dense and naive products, in one run.

    python benchmarks/matmul.py                       # 4096 x 11008, one row of x
    python benchmarks/matmul.py --rows 16 --formats int8 int4-g128
    python benchmarks/matmul.py --json results.json

Every contestant is compiled with its weight as an argument and timed in turn, round
after round, so that a busy machine slows all of them alike; a turn is one call that
does not count and three that do. Contestants with large temporaries come last in a
round. The table gives minima and medians. `naive` is `x @ dequantize(w)` under `jit`,
`ratio` is the median time of that contestant over ours (above 1: ours is faster).
`temp` is what the compiler reserves beside arguments and result.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats import FP4, FP8, MXFP4, NF4, NVFP4, Cast, Int
from qjax.methods import quantize
from qjax.ops import explain, matmul

FORMATS = {
    "int8": Int(8, "channel"),
    "int4-g128": Int(4, 128),
    "int4-g128-asym": Int(4, 128, symmetric=False),
    "int3-g64": Int(3, 64),
    "int2-g64": Int(2, 64),
    "nf4": NF4(64),
    "nf4-dq": NF4(64, double=True),
    "fp4": FP4(64),
    "fp8": FP8(),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
    "bfloat16": Cast(),
}


def random_weight(fmt, matrix, seed=0):
    """A quantized tensor with random leaves: quantizing a real one is not the point."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(
        lambda w: quantize(w, fmt), jax.ShapeDtypeStruct(matrix, jnp.float32)
    )

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            info = jnp.iinfo(leaf.dtype)
            high = (
                130 if leaf.shape != like.codes.shape and info.bits == 8 else info.max
            )
            low = 120 if high == 130 else info.min
            return rng.integers(low, high, leaf.shape, leaf.dtype, endpoint=True)
        return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(lambda leaf: jnp.asarray(fill(leaf)), like)


def naive(x, q):
    return (x @ q.dequantize(x.dtype)).astype(x.dtype)


def dense(x, w):
    return (x.astype(w.dtype) @ w).astype(x.dtype)


def contestants(args):
    """Name to (function, weight)."""
    rng = np.random.default_rng(1)
    matrix = (args.inputs, args.outputs)
    w = jnp.asarray(rng.standard_normal(matrix, np.float32))
    table = {
        "dense float32": (dense, w),
        "dense bfloat16": (dense, w.astype("bfloat16")),
    }
    for name in args.formats:
        q = random_weight(FORMATS[name], matrix)
        table[name] = (matmul, q)
        table[f"{name} naive"] = (naive, q)
    return table


def measure(table, x, rounds):
    """Seconds of every contestant, interleaved, and its compiled temporaries."""
    compiled, rows = {}, {}
    for name, (function, w) in table.items():
        compiled[name] = jax.jit(function).lower(x, w).compile()
        memory = compiled[name].memory_analysis()
        rows[name] = {
            "temp_bytes": memory.temp_size_in_bytes if memory else None,
            "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(w)),
        }
        compiled[name](x, w).block_until_ready()
    seconds = {name: [] for name in table}
    order = sorted(table, key=lambda name: rows[name]["temp_bytes"] or 0)
    for _ in range(rounds):
        time.sleep(0.2)  # the naive ones, last of a round, leave memory to be freed
        for name in order:
            w = table[name][1]
            for turn in range(4):
                start = time.perf_counter()
                compiled[name](x, w).block_until_ready()
                if turn:  # the first call brings the weight back into the cache
                    seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        rows[name]["min_ms"] = 1e3 * min(values)
        rows[name]["median_ms"] = 1e3 * float(np.median(values))
    return rows


def report(rows):
    """Prints the table; adds the ratios."""
    base = rows["dense float32"]
    print(
        f"{'':22}{'min ms':>9}{'median':>9}{'temp MB':>9}{'vs f32':>8}{'vs naive':>9}"
    )
    for name, row in rows.items():
        row["dense_ratio"] = base["median_ms"] / row["median_ms"]
        other = rows.get(f"{name} naive")
        row["naive_ratio"] = other["median_ms"] / row["median_ms"] if other else None
        against = f"{row['naive_ratio']:9.1f}" if other else f"{'':9}"
        print(
            f"{name:22}{row['min_ms']:9.2f}{row['median_ms']:9.2f}"
            f"{row['temp_bytes'] / 1e6:9.2f}{row['dense_ratio']:8.2f}{against}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=11008)
    parser.add_argument("--rows", type=int, default=1, help="rows of x")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32", help="dtype of x")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--json", metavar="FILE", help="results as JSON; - for stdout")
    args = parser.parse_args()
    x = np.random.default_rng(2).standard_normal((args.rows, args.inputs), np.float32)
    x = jnp.asarray(x).astype(args.dtype)
    table = contestants(args)
    print(
        f"jax {jax.__version__}, {jax.default_backend()}, x {list(x.shape)} {x.dtype}, "
        f"w [{args.inputs}, {args.outputs}]",
        file=sys.stderr,
    )
    for name in args.formats:
        print(f"  {name}: {explain(x.shape, table[name][1])}", file=sys.stderr)
    rows = measure(table, x, args.rounds)
    if args.json == "-":
        with open("/dev/null", "w") as sink:
            sys.stdout, kept = sink, sys.stdout
            report(rows)
            sys.stdout = kept
        print(json.dumps(rows, indent=1))
        return
    report(rows)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

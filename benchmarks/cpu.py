"""Native CPU products beside the machine's memory bandwidth and XLA's dense products.

    python benchmarks/cpu.py                         # 4096 x 14336, all cases
    python benchmarks/cpu.py --only int4 nf4 --rounds 40 --json results.json

Everything runs in one process, in turn, round after round, so that a busy machine slows
all contestants alike. A plain native read loop over a buffer of the same size as the
packed int4 weight gives the bandwidth of the machine in the same run. Contestants
rotate over copies of their weight, 96 MB together at least, so that a call finds none
of it in a cache. `roof` is the part of that bandwidth that a call reaches, counted on
the packed bytes of codes, scales and zero-points. Weights are in the layout that
`qjax.prepack` makes, or with `--canonical` in the one at rest.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qjax.pallas_kernels import native
from qjax.pallas_kernels.matmul import cpu, cpu_layout
from qjax.pallas_kernels.matmul_a8 import cpu as cpu_a8
from qjax.pallas_kernels.weights import Weight, WeightSpec

COLD = 96 << 20
"""Bytes of weights in rotation: three times a large last-level cache."""

FORMATS = {
    "int4-g128": ("int", 4, 128, "float32"),
    "int4-g128-bf16": ("int", 4, 128, "bfloat16"),
    "int8": ("int", 8, 0, "float32"),
    "int3-g64": ("int", 3, 64, "float32"),
    "int2-g64": ("int", 2, 64, "float32"),
    "nf4-b64": ("table", 4, 64, "float32"),
    "fp8": ("e4m3", 8, 0, "float32"),
    "mxfp4": ("e2m1", 4, 32, "uint8"),
}


def weights(name, k, n, rng, prepacked):
    """Spec and enough copies of a random weight that no cache holds them."""
    kind, bits, group, scale = FORMATS[name]
    spec = WeightSpec(k, n, kind, bits, group or k, offset=float(kind == "int") * 8)
    codes = rng.integers(0, 120, (spec.packed_k, n), np.uint8)
    if kind == "e4m3":
        codes = jnp.asarray(codes).view(jnp.float8_e4m3fn)
    if scale == "uint8":
        s = rng.integers(120, 130, (spec.groups, n)).astype(np.uint8)
    else:
        s = rng.uniform(0.5, 1.5, (spec.groups, n)).astype(scale)
    table = rng.standard_normal(16).astype(np.float32) if kind == "table" else None
    first = Weight(codes, s, None, table)
    if prepacked:
        first, spec = cpu_layout.prepack(jax.tree.map(jnp.asarray, first), spec)
    copies = max(2, -(-COLD // first.nbytes))
    return spec, [
        jax.tree.map(lambda a: jnp.array(a, copy=True), first) for _ in range(copies)
    ]


def contestants(args):
    """Name to (function, list of argument tuples, bytes read)."""
    rng = np.random.default_rng(0)
    k, n = args.inputs, args.outputs
    table = {}
    stream = jax.ffi.ffi_call("qjax_stream_read", jax.ShapeDtypeStruct((1,), "uint32"))
    size = k // 2 * n + k // 128 * n * 4
    blocks = [jnp.full((size,), i, jnp.uint8) for i in range(-(-COLD // size))]
    table["stream"] = (stream, [(b,) for b in blocks], size)
    ms = args.rows
    xs = {m: jnp.asarray(rng.standard_normal((m, k)).astype(np.float32)) for m in ms}
    if not args.no_dense:
        dense = jnp.asarray(rng.standard_normal((k, n)).astype(np.float32))
        whole = jnp.asarray(rng.integers(-127, 127, (k, n)).astype(np.int8))
        for m in ms:
            table[f"xla f32 m{m}"] = (jnp.matmul, [(xs[m], dense)], dense.nbytes)
            if m > 1:
                x8 = (xs[m] * 30).astype(jnp.int8)
                table[f"xla int8 m{m}"] = (int_dot, [(x8, whole)], whole.nbytes)
    for name in FORMATS:
        if args.only and not any(name.startswith(o) for o in args.only):
            continue
        spec, copies = weights(name, k, n, rng, not args.canonical)
        for m in ms:
            run = product(cpu.matmul, spec)
            table[f"{name} m{m}"] = (
                run,
                [(xs[m], w) for w in copies],
                copies[0].nbytes,
            )
            if spec.kind == "int":
                run = product(cpu_a8.matmul, spec)
                calls = [(xs[m], w) for w in copies]
                table[f"{name} a8 m{m}"] = (run, calls, copies[0].nbytes)
    return table


def int_dot(x, w):
    return jax.lax.dot(x, w, preferred_element_type=jnp.int32)


def product(matmul, spec):
    return lambda x, w: matmul(x, w, spec)


def measure(table, rounds, seconds):
    """Times of every contestant, interleaved; slow ones have fewer turns."""
    compiled = {name: jax.jit(f) for name, (f, _, _) in table.items()}
    times: dict[str, list[float]] = {name: [] for name in table}
    for name, (_, calls, _) in table.items():
        compiled[name](*calls[0]).block_until_ready()
    turn = 0
    for _ in range(rounds):
        for name, (_, calls, _) in table.items():
            if times[name] and sum(times[name]) > seconds:
                continue
            for _ in range(6):
                args = calls[turn % len(calls)]
                turn += 1
                start = time.perf_counter()
                compiled[name](*args).block_until_ready()
                times[name].append(time.perf_counter() - start)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=14336)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=2.0, help="per contestant")
    parser.add_argument("--only", nargs="+", help="formats that begin with these")
    parser.add_argument(
        "--canonical", action="store_true", help="weights that are not prepacked"
    )
    parser.add_argument("--no-dense", action="store_true", help="skip XLA's products")
    parser.add_argument("--json", metavar="FILE", help="results as JSON; - for stdout")
    args = parser.parse_args()
    if not native.status().loaded:
        sys.exit(str(native.status()))
    table = contestants(args)
    times = measure(table, args.rounds, args.seconds)
    roof = table["stream"][2] / min(times["stream"])
    roof_median = table["stream"][2] / float(np.median(times["stream"]))
    rows = {}
    for name, values in times.items():
        least, median = min(values), float(np.median(values))
        size = table[name][2]
        rows[name] = {
            "min_ms": 1e3 * least,
            "median_ms": 1e3 * median,
            "bytes": size,
            "gb_s": size / least / 1e9,
            "roof": size / least / roof,
            "roof_median": size / median / roof_median,
            "turns": len(values),
        }
    out = {
        "jax": jax.__version__,
        "isa": native.status().isa,
        "shape": [args.inputs, args.outputs],
        "cases": rows,
    }
    if args.json == "-":
        print(json.dumps(out, indent=1))
        return
    print(f"jax {out['jax']}, {out['isa']}, W {out['shape']}")
    print(f"{'':22}{'min ms':>9}{'median':>9}{'GB/s':>8}{'roof':>7}{'median':>8}")
    for name, row in rows.items():
        print(
            f"{name:22}{row['min_ms']:9.3f}{row['median_ms']:9.3f}{row['gb_s']:8.1f}"
            f"{row['roof']:7.0%}{row['roof_median']:8.0%}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()

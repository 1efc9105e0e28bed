"""Quantization throughput and HQQ's error, side by side with other libraries on CPU.

    python benchmarks/quantize.py                       # 256M weights
    python benchmarks/quantize.py --only throughput --size 4096

Needs the [peers] extra. Every time is the best of three runs after a first one that
compiles (jax) or builds its tables (torch), which is printed on its own. HQQ is timed
as the sum over the 42 linears of the bundled model, equal shapes batched in qjax.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats import NF4, Int
from qjax.methods import HQQ, RTN, quantize

MODEL = Path(__file__).parent.parent / "examples" / "model" / "model.safetensors"


def timed(call, runs: int = 3) -> dict:
    """Seconds of the first call; least wall and processor seconds of `runs` others.

    Processor time is the fairer measure on a machine that does other work as well.
    """
    wall, cpu = [], []
    for _ in range(runs + 1):
        start, busy = time.perf_counter(), time.process_time()
        jax.block_until_ready(call())
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    best = {"seconds": min(wall[1:]), "cpu_seconds": min(cpu[1:])}
    return {"first_seconds": wall[0], **best}


def throughput(size: int) -> dict:
    """Million weights per second of one `size` x `size` float32 matrix."""
    import bitsandbytes.functional as bnb
    import torch

    rng = np.random.default_rng(0)
    w = rng.standard_normal((size, size), dtype=np.float32)
    theirs = torch.from_numpy(w)
    ours = jnp.asarray(w)
    million = size * size / 1e6
    calls = {
        "qjax nf4": lambda: quantize(ours, NF4()),
        "qjax int4-g128": lambda: quantize(ours, Int(4, 128)),
        "bitsandbytes nf4": lambda: bnb.quantize_4bit(theirs, quant_type="nf4")[1],
    }
    rows = {}
    for name, call in calls.items():
        row = rows[name] = timed(call)
        row["weights_per_second"] = 1e6 * million / row["seconds"]
        row["peak_memory_bytes"] = peak_memory()
        print(
            f"{name:18} {million / row['seconds']:6.0f} M weights/s "
            f"{million / row['cpu_seconds']:6.0f} M per processor second, "
            f"first call {row['first_seconds']:.2f} s, "
            f"peak so far {peak_memory() / 1e9:.2f} GB"
        )
    return rows


def hqq_on_model(bits_list=(4, 3, 2)) -> dict:
    """Seconds and errors of HQQ over the linears of the bundled model."""
    import hqq.core.quantize as hqq
    import safetensors.numpy
    import torch

    tensors = safetensors.numpy.load_file(MODEL)
    linears = [
        np.asarray(w, np.float32)
        for name, w in tensors.items()
        if name.endswith("_proj.weight")
    ]
    stacks = {}
    for w in linears:
        stacks.setdefault(w.shape, []).append(w)
    kernels = [jnp.asarray(np.stack(s).swapaxes(-1, -2)) for s in stacks.values()]
    rows = {}
    for bits in bits_list:
        for axis in (1, 0):
            row = rows[f"int{bits}-g64 axis={axis}"] = {}
            fmt = Int(bits, 64, symmetric=False, axis="in" if axis else "out")
            options = {"nbits": bits, "group_size": 64, "axis": axis, "device": "cpu"}
            options |= {"compute_dtype": torch.float32}

            def peer(options=options):
                return [
                    hqq.Quantizer.quantize(torch.from_numpy(w), **options)[1]["zero"]
                    for w in linears
                ]

            for name, method in (("hqq", HQQ()), ("rtn", RTN()), ("mse", RTN("mse"))):

                def call(method=method, fmt=fmt):
                    return [quantize(w, fmt, method) for w in kernels]

                times = timed(call)
                errors = [
                    np.abs(np.asarray(q.dequantize()) - np.asarray(w)).reshape(-1)
                    for q, w in zip(call(), kernels, strict=True)
                ]
                row[f"qjax {name}"] = {
                    **times,
                    **measures(np.concatenate(errors)),
                }
            errors = []
            for w in linears:
                codes, meta = hqq.Quantizer.quantize(
                    torch.from_numpy(w), bitpack=False, **options
                )
                values = ((codes - meta["zero"]) * meta["scale"]).reshape(w.shape)
                errors.append(np.abs(values.numpy() - w).reshape(-1))
            row["hqq"] = timed(peer, runs=1) | measures(np.concatenate(errors))
            for name, r in row.items():
                print(
                    f"int{bits}-g64 axis={axis} {name:9} {r['seconds']:6.2f} s "
                    f"({r['cpu_seconds']:5.2f} s of processor)  "
                    f"mean {r['mean']:.4e}  rms {r['rms']:.4e}  p0.7 {r['p0.7']:.4e}"
                )
    return rows


def measures(e: np.ndarray) -> dict:
    """Mean absolute, root mean square and mean 0.7-power errors."""
    return {
        "mean": float(np.mean(e)),
        "rms": float(np.sqrt(np.mean(e**2))),
        "p0.7": float(np.mean(e**0.7)),
    }


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=16384)
    parser.add_argument("--only", choices=("throughput", "hqq"))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = {}
    if args.only != "hqq":
        report["throughput"] = throughput(args.size)
    if args.only != "throughput":
        report["hqq"] = hqq_on_model(args.bits)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

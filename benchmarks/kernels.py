"""Correctness and device time of every kernel, on the device at hand.

    python benchmarks/kernels.py --backend gpu                     # everything
    python benchmarks/kernels.py --backend cpu --match int4 --json out.json
    python benchmarks/kernels.py --backend tpu --skip timing

Correctness comes first: each case states its error and its bound, and a kernel that
misses one is not worth timing. Then time, on the device, from the profiler's own events
(all kernels of a call, launch gaps excluded); where there are none, as on CPU, it is
the wall clock of a call. A case rotates through as many weights as four times the
largest cache, so that every call reads its weight from memory. `roof` is the share of
the device's headline bandwidth, counted on packed bytes with scales, or of its peak
rate, whichever bounds the case; `dense` the time of the bfloat16 product of the same
shape, measured in the same turn. Rounds take turns between contestants; medians count.

Every line is printed as it is measured and everything goes to `--json`. `--seconds`
bounds the run, half of it for correctness: cases that do not fit are listed as not run.
The exit status is 1 when a kernel failed, missed its bound, or was not run.

An operation joins with a file `benchmarks/cases_<operation>.py`, importing jax, numpy
and qjax.pallas_kernels alone, that defines

    def correctness(backend) -> Iterator[dict]
        # {"case": str, "error": float, "bound": float}, computed when it is asked for
    def timing(backend) -> Iterator[dict]
        # {"case": str, "bytes": int, "flops": int, "peak": "bf16" | "int8" | "fp8",
        #  "run": jitted callable, "arrays": list of argument tuples,
        #  "dense": (jitted callable, list of argument tuples) or None,
        #  "bar": {"bandwidth": share} | {"rate": FLOP/s} | {"dense": ratio} or None}

where backend is "gpu", "tpu", "cpu" or "interpret".
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
DEVICES = {
    "NVIDIA H200": {"bandwidth": 4.8e12, "bf16": 989e12, "int8": 1979e12},
    "NVIDIA H100 80GB HBM3": {"bandwidth": 3.35e12, "bf16": 989e12, "int8": 1979e12},
    "TPU v5 lite": {"bandwidth": 0.82e12, "bf16": 197e12, "int8": 394e12},
    "TPU v5": {"bandwidth": 2.46e12, "bf16": 459e12, "int8": 918e12},
    "TPU v6 lite": {"bandwidth": 1.64e12, "bf16": 920e12, "int8": 1840e12},
    "TPU7x": {"bandwidth": 3.7e12, "bf16": 1155e12, "fp8": 2300e12},
}
"""Headline figures per device, as its maker states them."""
ROUNDS, CALLS = 3, 20


def expose_kernels():
    """Makes `qjax.pallas_kernels` importable where qjax's dependencies are missing."""
    try:
        importlib.import_module("qjax.pallas_kernels")
    except ImportError:
        for name in [n for n in sys.modules if n.split(".")[0] == "qjax"]:
            del sys.modules[name]
        package = types.ModuleType("qjax")
        package.__path__ = [str(ROOT)]
        sys.modules["qjax"] = package
        importlib.import_module("qjax.pallas_kernels")


def operations(match):
    """The case modules, in a fixed order."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    names = sorted(file.stem for file in (ROOT / "benchmarks").glob("cases_*.py"))
    for name in [match] if match in names else names:
        if match in name:
            yield importlib.import_module(name)


def device_seconds(run, arrays, calls):
    """Mean seconds of device time per call, from a profile; None without events."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            out = [run(*a) for a in itertools.islice(itertools.cycle(arrays), calls)]
            jax.block_until_ready(out)
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        busy = 0.0
        for plane in planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                # GPUs have a line per stream, TPUs one of XLA's own operations.
                if line.name.startswith("Stream") or line.name == "XLA Ops":
                    busy += sum(e.duration_ns for e in line.events)
    return busy * 1e-9 / calls or None


def wall_seconds(run, arrays, calls):
    """Median seconds of a call by the wall clock."""
    times = []
    for a in itertools.islice(itertools.cycle(arrays), calls):
        start = time.perf_counter()
        jax.block_until_ready(run(*a))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(contestants):
    """Medians of rounds in which every contestant has a turn."""
    clock = wall_seconds if jax.default_backend() == "cpu" else device_seconds
    for run, arrays in contestants.values():
        jax.block_until_ready(run(*arrays[0]))
    times = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, (run, arrays) in contestants.items():
            times[name].append(clock(run, arrays, max(CALLS, len(arrays))))
    if any(t is None for values in times.values() for t in values):
        raise RuntimeError("the profile has no device events; times are not known")
    return {name: statistics.median(values) for name, values in times.items()}


def check(case):
    """One correctness case."""
    error, bound = float(case["error"]), float(case["bound"])
    return {"error": error, "bound": bound, "ok": error <= bound}


def timed(case):
    """One timing case."""
    contestants = {"kernel": (case["run"], case["arrays"])}
    if case.get("dense"):
        contestants["dense"] = case["dense"]
    seconds = measure(contestants)
    kernel = seconds["kernel"]
    peaks = DEVICES.get(jax.devices()[0].device_kind)
    row = {
        "seconds": kernel,
        "bytes_per_second": case["bytes"] / kernel,
        "flops_per_second": case["flops"] / kernel,
    }
    if "dense" in seconds:
        row["dense_seconds"] = seconds["dense"]
        row["dense_ratio"] = seconds["dense"] / kernel
    if peaks:
        row["bandwidth"] = row["bytes_per_second"] / peaks["bandwidth"]
        peak = peaks.get(case.get("peak", "bf16"), peaks["bf16"])
        row["roof"] = max(row["bandwidth"], row["flops_per_second"] / peak)
    reached = {
        "bandwidth": row.get("bandwidth"),
        "rate": row["flops_per_second"],
        "dense": row.get("dense_ratio"),
    }
    bars = case.get("bar") or {}
    row["bars"] = {
        key: {"bar": bar, "reached": reached[key], "ok": reached[key] >= bar}
        for key, bar in bars.items()
        if reached[key] is not None
    }
    return row


def attempt(function, *arguments):
    """The result, or a row that says why there is none: others must still run."""
    try:
        return function(*arguments)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip()
        return {"failed": text.splitlines()[0][:300]}


def cases(module, kind, backend, end):
    """The cases of a module; one that stops early is reported, not raised."""
    generator = iter(getattr(module, kind, lambda backend: ())(backend))
    while True:
        if time.monotonic() > end:
            yield {"case": f"{module.__name__}, from here on", "not_run": True}
            return
        case = attempt(next, generator, None)
        if case is None:
            return
        if "failed" in case and "case" not in case:
            yield {"case": f"{module.__name__} {kind}", **case}
            return
        yield case


def show(kind, name, row):
    """One line per case."""
    if "failed" in row:
        text = f"FAILED {row['failed']}"
    elif kind == "correctness":
        verdict = "ok" if row["ok"] else "WRONG"
        text = f"{verdict} error {row['error']:.3g} bound {row['bound']:.3g}"
    else:
        text = f"{row['seconds'] * 1e6:10.2f} us {row['bytes_per_second'] / 1e9:8.1f}"
        text += f" GB/s {row['flops_per_second'] / 1e12:8.2f} TFLOP/s"
        if "roof" in row:
            text += f" roof {row['roof']:.0%}"
        if "dense_ratio" in row:
            text += f" dense x{row['dense_ratio']:.2f}"
        missed = [k for k, bar in row["bars"].items() if not bar["ok"]]
        text += f" below bar: {', '.join(missed)}" if missed else ""
    print(f"{kind:12} {name:56} {text}", flush=True)


def main():
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = {"cuda": "gpu"}.get(jax.default_backend(), jax.default_backend())
    parser.add_argument("--backend", default=default)
    parser.add_argument("--operation", default="", help="part of a cases_* file's name")
    parser.add_argument("--match", default="", help="part of a case's name")
    parser.add_argument("--skip", choices=("correctness", "timing"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    expose_kernels()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    start = time.monotonic()
    parts = 1 if options.skip else 2
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "correctness": {},
        "timing": {},
        "not_run": [],
    }
    for kind, function in (("correctness", check), ("timing", timed)):
        if kind == options.skip:
            continue
        share = options.seconds / (parts if kind == "correctness" else 1)
        end = start + share
        for module in operations(options.operation):
            for case in cases(module, kind, options.backend, end):
                name = case["case"]
                if options.match not in name:
                    continue
                if "not_run" in case:
                    result["not_run"].append(f"{kind} {name}")
                    continue
                row = case if "failed" in case else attempt(function, case)
                result[kind][name] = row
                show(kind, name, row)
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps(result, indent=1))
    rows = [*result["correctness"].values(), *result["timing"].values()]
    bad = [r for r in rows if "failed" in r or not r.get("ok", True)]
    for name in result["not_run"]:
        print(f"not run      {name}")
    print(f"{len(rows)} cases, {len(bad)} failed, {len(result['not_run'])} not run")
    sys.exit(bool(bad or result["not_run"]))


if __name__ == "__main__":
    main()

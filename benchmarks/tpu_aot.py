"""Compiles the TPU kernels for chips that need not exist and reads the schedules.

    python benchmarks/tpu_aot.py                         # every case, every chip
    python benchmarks/tpu_aot.py --chips v5e v6e --match w4a16
    python benchmarks/tpu_aot.py --fast --json out.json  # the subset that CI runs

Needs libtpu, no TPU. For every case the report gives the temporaries that the compiler
reserves in HBM, the VMEM it allocates, the bundles (VLIW instructions) of the kernel,
and the ratio of the time those take to the time the operands take from HBM: below 1 the
kernel can be bound by memory. The figures are static: no stall of a DMA is in them. A
line per case goes to stdout, everything to `--json`; the exit status is 1 when a case
does not compile, exceeds its temporaries or misses its bar.

Clocks assumed: v5e 1.5, v5p 1.75, v6e 1.75, 7x 2.2 GHz. Bandwidth per core: v5e 0.82,
v5p 1.23 (half a chip), v6e 1.64, 7x 3.7 TB/s (half a chip).

An operation joins with a file `benchmarks/cases_<operation>.py` that defines

    def tpu_cases() -> Iterator[dict]

where each dict has

    name         unique, for example "w4a16-g128-m16-4096x14336"; names that start
                 with "tune-" run only when `--match` asks for them
    fn           a function of arrays, jitted and compiled here
    args         its arguments as a tuple of pytrees of jax.ShapeDtypeStruct
    bytes        bytes that the whole call moves from and to HBM at least
    steps        grid steps of the whole call; bundles count one step, so loops inside
                 the kernel must be unrolled or the count is a lower bound
                 (default 1)
    flops        operations of the whole call (optional), reported per bundle
    kernel       part of the `name` of the pallas_call (default: ops that use the MXU)
    chips        chips to compile for (default: all four)
    bar          greatest compute/DMA ratio, or a dict by chip, or None
    temporaries  greatest bytes of temporaries in HBM (default 1 MiB)
    fast         whether CI compiles it (default False)

`tpu_cases` may read `jax`, must not touch devices, and must pass the chip's tiles
itself where they differ: `fn` may also be a dict by chip (with `steps` alike).
"""

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHIPS = {
    "v5e": {"topology": "v5e:2x2", "clock": 1.5e9, "bandwidth": 0.82e12},
    "v5p": {"topology": "v5p:2x2x1", "clock": 1.75e9, "bandwidth": 1.23e12},
    "v6e": {"topology": "v6e:2x2", "clock": 1.75e9, "bandwidth": 1.64e12},
    "7x": {"topology": "tpu7x:2x2x1", "clock": 2.2e9, "bandwidth": 3.7e12},
}
"""What a chip is: per core where it has several."""

HERE = Path(__file__).resolve().parent
UTILIZATION = re.compile(r"-([^/]*?)-\d+-final_hlo-static-per-bundle-utilization\.txt$")


def cases(match=""):
    """All cases of all `cases_*.py` files, by name."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    found = {}
    for file in sorted(HERE.glob("cases_*.py")):
        module = importlib.import_module(file.stem)
        for case in getattr(module, "tpu_cases", tuple)():
            if case["name"] in found:
                raise ValueError(f"{file.name}: the name {case['name']!r} is taken")
            asked = match or not case["name"].startswith("tune-")
            if asked and re.search(match, case["name"]):
                found[case["name"]] = case
    return found


def schedules(folder):
    """Operations of the dumped program.

    Args:
      folder: what `--xla_jf_dump_to` wrote for one program.

    Returns:
      For each operation its bundles and the use of each unit, summed over bundles.
    """
    found = {}
    for file in folder.iterdir():
        name = UTILIZATION.search(file.name)
        if not name or name[1].startswith(("TLP", "<")):
            continue
        lines = file.read_text().splitlines()
        start = next(i for i, line in enumerate(lines) if "UTILIZATION" in line)
        header = next(line for line in lines if line.startswith("MATMUL"))
        units = [unit.strip() for unit in header.split(",")]
        rows = [[int(x) for x in line.split()] for line in lines[start + 1 :]]
        rows = [row for row in rows if len(row) == len(units)]
        sums = [sum(column) for column in zip(*rows, strict=True)]
        use = dict(zip(units, sums, strict=True))
        found[name[1]] = {"bundles": len(rows), **use}
    return found


def vmem_bytes(folder):
    """VMEM that the kernels of the dumped program allocate."""
    pattern = re.compile(r"#allocation\d+ \[.*?space=vmem, size = (0x[0-9a-f]+)")
    total = 0
    for file in folder.glob("*-02-original.txt"):
        if "-TLP-" not in file.name and "-<" not in file.name:
            sizes = pattern.findall(file.read_text())
            total = max(total, sum(int(size, 16) for size in sizes))
    return total


def by_chip(value, chip, default=None):
    """A value of a case that may be given by chip."""
    if isinstance(value, dict):
        return value.get(chip, default)
    return default if value is None else value


def examine(case, chip, folder):
    """Compiles one case; the report, with `failures` a list of what does not hold."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    spec = CHIPS[chip]
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=spec["topology"]
    )
    sharding = SingleDeviceSharding(topology.devices[0])

    def place(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    report = {"name": case["name"], "chip": chip, "failures": []}
    begin = time.perf_counter()
    try:
        fn = case["fn"][chip] if isinstance(case["fn"], dict) else case["fn"]
        args = jax.tree.map(place, case["args"])
        compiled = jax.jit(fn).lower(*args).compile()
    except Exception as error:  # any failure to compile is a finding
        text = str(error).strip() or repr(error)
        report["failures"].append(f"does not compile: {text[:600]}")
        return report
    report["seconds"] = round(time.perf_counter() - begin, 2)
    report["temporaries"] = compiled.memory_analysis().temp_size_in_bytes
    limit = case.get("temporaries", 1 << 20)
    if report["temporaries"] > limit:
        report["failures"].append(f"temporaries {report['temporaries']} > {limit}")
    ops = schedules(folder)
    kernel = case.get("kernel")
    chosen = {
        name: op
        for name, op in ops.items()
        if (kernel in name if kernel else op.get("MATMUL", 0) > 0)
    }
    if not chosen:
        report["failures"].append(f"no kernel in the dump; operations: {sorted(ops)}")
        return report
    steps = by_chip(case.get("steps"), chip, 1)
    bundles = sum(op["bundles"] for op in chosen.values())
    compute = bundles / spec["clock"]
    transfer = case["bytes"] / steps / spec["bandwidth"]
    report |= {
        "kernels": chosen,
        "others": {k: op["bundles"] for k, op in ops.items() if k not in chosen},
        "vmem": vmem_bytes(folder),
        "steps": steps,
        "bundles": bundles,
        "spills": sum(op.get("VSTORE:SPILL", 0) for op in chosen.values()),
        "compute/dma": round(compute / transfer, 3),
    }
    if case.get("flops"):
        report["flops/bundle"] = round(case["flops"] / steps / bundles)
    bar = by_chip(case.get("bar"), chip)
    if bar is not None and compute / transfer > bar:
        report["failures"].append(f"compute/dma {compute / transfer:.3f} > {bar}")
    return report


def work(chip, names, out):
    """One process: compiles cases for a chip. Flags must be set before libtpu loads."""
    found = cases() | cases("^tune-")
    with tempfile.TemporaryDirectory() as scratch, open(out, "a") as sink:
        folder = Path(scratch) / "dump"
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = flags
        for name in names:
            folder.mkdir(exist_ok=True)
            report = examine(found[name], chip, folder)
            sink.write(json.dumps(report) + "\n")
            sink.flush()
            shutil.rmtree(folder)


def run(chips, names):
    """Reports of all cases: one process per chip, one chip after the other."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
    }
    reports = []
    for chip in chips:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "reports"
            out.touch()
            mine = [n for n in names if chip in names[n].get("chips", CHIPS)]
            command = [sys.executable, __file__, "--worker", chip, str(out), *mine]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            lines = [json.loads(line) for line in out.read_text().splitlines()]
            missing = mine[len(lines) :]
            for name in missing[:1]:
                failure = f"the compiler process ended: {done.stderr[-600:]}"
                lines.append({"name": name, "chip": chip, "failures": [failure]})
            reports += lines
    return reports


def line(report):
    """One line for people."""
    keys = ("bundles", "compute/dma", "spills", "temporaries", "vmem", "flops/bundle")
    numbers = "  ".join(f"{k} {report[k]}" for k in keys if report.get(k) is not None)
    text = f"{report['chip']:4} {report['name']:44} {numbers}"
    return text + "".join(f"\n     FAIL {why}" for why in report["failures"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--match", default="", help="regular expression on names")
    parser.add_argument("--fast", action="store_true", help="the subset for CI")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = cases(args.match)
    if args.fast:
        names = {k: v for k, v in names.items() if v.get("fast")}
    reports = run(args.chips, names)
    for report in reports:
        print(line(report))
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1))
    failed = sum(bool(report["failures"]) for report in reports)
    print(f"{len(reports)} compiled, {failed} failed")
    sys.exit(1 if failed or not reports else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[4:], sys.argv[3])
    else:
        main()

"""Compiles the Hopper kernels for H100 and H200 without a GPU.

    python benchmarks/gpu_aot.py                        # every case
    python benchmarks/gpu_aot.py --match int4 --json out.json
    python benchmarks/gpu_aot.py --fast

Needs the CUDA wheels, no GPU:

    pip install jax-cuda13-plugin==$JAX jax-cuda13-pjrt==$JAX
    pip install nvidia-cuda-nvcc nvidia-nvvm

with `$JAX` the version of jax. For every case the report gives what the assembler says:
registers per thread, bytes spilled and on the stack, whether tensor core instructions
were serialized, and the temporaries in device memory. Both chips have the same
instructions, so one target stands for both. No timing and no execution: a hang would
not be seen. A line per case goes to stdout, everything to `--json`; the exit status is
1 when a case does not compile, spills or is serialized, 2 without the wheels.

An operation joins with a file `benchmarks/cases_<operation>*.py` that defines

    def gpu_cases() -> Iterator[dict]

where each dict has

    name         unique, for example "matmul-int4-g128-m16-4096x14336"
    fn           a function of arrays, jitted and compiled here
    args         its arguments as a tuple of pytrees of jax.ShapeDtypeStruct
    temporaries  greatest bytes of temporaries in device memory (default 64 MiB)
    donate       numbers of the arguments that are updated in place (default none)
    kernels      whether it has kernels of ours (default True)
    fast         whether CI compiles it (default False)
"""

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  name: "NVIDIA H200"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""
"""What the compiler must know of the chip (NVIDIA's data sheet)."""


def device():
    """A device to compile for; exits with 2 where the wheels are missing."""
    tools = [Path(p) / "nvidia" / "cu13" for p in sys.path]
    tools = [p for p in tools if (p / "bin" / "ptxas").exists()]
    if not tools or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        text = __doc__.split("Needs the CUDA wheels, no GPU:")[1].split("with `$JAX`")[
            0
        ]
        print(f"gpu_aot: the CUDA wheels are missing; install them:{text}")
        sys.exit(2)
    os.environ["PATH"] = f"{tools[0] / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ["CUDA_ROOT"] = str(tools[0])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={tools[0]}"
    os.environ["XLA_FLAGS"] = flags.strip()
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jax._src import xla_bridge
    from jax.experimental import topologies

    xla_bridge.backends()  # registers the plugin
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET, topology="1x1x1"
    )
    return topology.devices[0]


class Captured:
    """What C++ writes to stdout and stderr while the block runs, in `text`."""

    def __enter__(self):
        sys.stdout.flush()
        sys.stderr.flush()
        self.saved = [os.dup(1), os.dup(2)]
        self.file = tempfile.TemporaryFile()
        for stream in (1, 2):
            os.dup2(self.file.fileno(), stream)
        return self

    def __exit__(self, *_):
        for stream, saved in zip((1, 2), self.saved, strict=True):
            os.dup2(saved, stream)
            os.close(saved)
        self.file.seek(0)
        self.text = self.file.read().decode(errors="replace")
        self.file.close()


def compiled(case, target):
    """One case: its row."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(target)
    fn = jax.jit(
        case["fn"],
        in_shardings=sharding,
        out_shardings=sharding,
        donate_argnums=case.get("donate", ()),
    )
    start = time.perf_counter()
    with Captured() as output:
        try:
            lowered = fn.trace(*case["args"]).lower(lowering_platforms=("cuda",))
            program = lowered.compile()
        except Exception as error:
            program, failure = None, f"{type(error).__name__}: {error}"
    if program is None:
        return {"ok": False, "failed": failure.strip().splitlines()[0][:300]}
    text = output.text
    used = re.findall(r"Used (\d+) registers", text)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    row = {
        "seconds": round(time.perf_counter() - start, 2),
        "kernels": len(spills),
        "registers": max(map(int, used), default=0),
        "spilled": sum(int(a) + int(b) for a, b in spills),
        "stack": sum(map(int, re.findall(r"(\d+) bytes stack frame", text))),
        "serialized": "instructions are serialized" in text,
        "shared": case.get("shared"),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
    }
    row["ok"] = (
        bool(row["kernels"]) == case.get("kernels", True)
        and not row["spilled"]
        and not row["serialized"]
        and row["temporaries"] <= case.get("temporaries", 64 << 20)
    )
    return row


def main():
    """Compiles the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--match", default="", help="part of a case's name")
    parser.add_argument("--fast", action="store_true", help="the subset that CI runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = device()
    import jax

    sys.path.insert(0, str(ROOT / "benchmarks"))
    importlib.import_module("kernels").expose_kernels()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    result = {"jax": jax.__version__, "target": "sm_90a", "cases": {}}
    for file in sorted((ROOT / "benchmarks").glob("cases_*.py")):
        module = importlib.import_module(file.stem)
        for case in getattr(module, "gpu_cases", lambda: ())():
            name = case["name"]
            if options.match not in name or (options.fast and not case.get("fast")):
                continue
            row = result["cases"][name] = compiled(case, target)
            verdict = "ok" if row["ok"] else "FAILED"
            rest = ", ".join(f"{k} {v}" for k, v in row.items() if k != "ok" and v)
            print(f"{verdict:7} {name:56} {rest}", flush=True)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(result, indent=1))
    rows = result["cases"].values()
    bad = sum(not row["ok"] for row in rows)
    print(f"{len(rows)} cases, {bad} failed")
    sys.exit(bool(bad or not rows))


if __name__ == "__main__":
    main()

"""GPTQ of one large layer against the original loop in NumPy, side by side.

    command   python benchmarks/gptq.py [--rows 1024] [--cols 3584] [--full]
    hardware  any CPU; two cores in the numbers of docs
    minutes   half a minute; `--full` (4096 x 14336) several
    result    seconds of both with a ready Hessian, their ratio, and peak memory

The Hessian and the weight are ready on both sides; both factor it, ours in its place,
and round to 4 bits in groups of 128. Compilation is timed apart. Memory is what XLA's
own plan says.
"""

import argparse
import functools
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "methods"))

from gptq_reference import gptq  # noqa: E402

from qjax.formats import Int  # noqa: E402
from qjax.methods import GPTQ  # noqa: E402
from qjax.methods.hessian import curvature  # noqa: E402


def problem(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the second moments of correlated inputs."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((rows, rows), dtype=np.float32)
    base *= np.geomspace(1, 0.05, rows, dtype=np.float32)[:, None]
    w = rng.standard_normal((rows, cols), dtype=np.float32)
    return w, base.T @ base


def planned(compiled) -> float:
    """Bytes of temporaries and new results that a compiled program allocates."""
    stats = compiled.memory_analysis()
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.temp_size_in_bytes + new


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--cols", type=int, default=3584)
    parser.add_argument("--full", action="store_true", help="4096 x 14336")
    parser.add_argument("--skip-reference", action="store_true")
    options = parser.parse_args()
    rows, cols = (4096, 14336) if options.full else (options.rows, options.cols)
    w, h = problem(rows, cols)
    fmt = Int(4, 128, symmetric=False, zero_dtype="uint8")
    method = GPTQ()

    start = time.perf_counter()
    jw, jh = jnp.asarray(w), jnp.asarray(h)
    prepare = jax.jit(functools.partial(curvature, damp=method.damp), donate_argnums=0)
    prepare = prepare.lower(jh).compile()
    shared = jax.eval_shape(functools.partial(curvature, damp=method.damp), jh)
    solve = jax.jit(lambda w, s: method(w, fmt, shared=s)).lower(jw, shared).compile()
    print(f"compilation          {time.perf_counter() - start:8.1f} s")

    start, cpu = time.perf_counter(), time.process_time()
    factored = jax.block_until_ready(prepare(jh))
    middle = time.perf_counter()
    q = jax.block_until_ready(solve(jw, factored))
    ours, ours_cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"qjax                 {ours:8.2f} s, of which factor {middle - start:.2f} s")
    held = w.nbytes + h.nbytes
    for name, program in (("factor", prepare), ("rounding", solve)):
        size = planned(program)
        print(
            f"  {name:<10} weight + Hessian {held / 1e6:.0f} MB, more "
            f"{size / 1e6:.0f} MB ({size / held:.0%}), results included"
        )
    if options.skip_reference:
        return
    start, cpu = time.perf_counter(), time.process_time()
    expected = gptq(w, h, bits=4, group=128)
    theirs, theirs_cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"reference (NumPy)    {theirs:8.2f} s")
    print(f"ratio                {theirs / ours:8.2f}")
    print(
        f"CPU seconds          {ours_cpu:8.2f} and {theirs_cpu:.2f}, ratio "
        f"{theirs_cpu / ours_cpu:.2f} (what counts on a busy machine)"
    )
    got = np.asarray(q.dequantize())
    print(f"equal weights        {np.isclose(got, expected, rtol=1e-3).mean():8.2%}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak of the process  {peak:8.2f} GB, both sides")


if __name__ == "__main__":
    main()

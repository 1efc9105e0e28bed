"""Times tiles of the Hopper weight-only product and prints the table of the fastest.

    python benchmarks/tune_matmul_gpu.py                    # int4-g128, three shapes
    python benchmarks/tune_matmul_gpu.py --format nf4-g64 --json out.json

Needs a Hopper GPU. Every candidate must agree with the first one before it is timed
(cold caches, device time, as in `kernels.py`). A candidate's figure is the geometric
mean over the shapes of its time over the best of the shape; the table printed at the
end goes into `TUNED` of `pallas_kernels/matmul/gpu_specs.py`.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import kernels
import numpy as np

TOKENS = (8, 16, 32, 64, 128, 512, 4096)


def candidates(spec, m):
    """Configurations whose stages fit shared memory."""
    from qjax.pallas_kernels.matmul import gpu_specs

    tiles = [t for t in (8, 16, 32, 64, 128, 256) if t >= min(m, 256) // 2 or t == m]
    choices = itertools.product(
        (2, 3, 4), tiles, (64, 128), (True, False), (True, False)
    )
    base = gpu_specs.default(spec, m, "bfloat16", jnp.bfloat16, False)
    for warpgroups, tile, rows, split, post in choices:
        if (not split and tile % 64) or 256 % (64 * warpgroups):
            continue
        if warpgroups > 2 and tile > 64:
            continue
        if post and tile > 64:
            continue
        config = dataclasses.replace(
            base,
            warpgroups=warpgroups,
            tokens=tile,
            rows=rows,
            split=split,
            post=post,
        )
        room = gpu_specs.SHARED_BYTES - 4096
        room -= gpu_specs.fixed_bytes(spec, config, False)
        stages = room // gpu_specs.stage_bytes(spec, config, False)
        for count in {min(stages, 4), min(stages, 6), min(stages, 12)}:
            if count >= 2:
                yield dataclasses.replace(config, stages=count)


def times(name, shape, m):
    """Seconds of every candidate on a shape."""
    from cases_matmul import weight_of

    from qjax.pallas_kernels.matmul import gpu, gpu_layout

    weight, spec = weight_of(name, *shape)
    packed, spec = gpu_layout.prepack(weight, spec)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(m, shape[0])), jnp.bfloat16)
    copies = min(16, -(-(240 << 20) // weight.nbytes))
    arrays = [(x, jax.tree.map(jnp.copy, packed)) for _ in range(copies)]
    found, wanted = {}, None
    for config in candidates(spec, m):
        run = jax.jit(lambda x, w, c=config: gpu.matmul(x, w, spec, config=c))
        try:
            y = np.asarray(run(*arrays[0]).astype(jnp.float32))
            wanted = y if wanted is None else wanted
            np.testing.assert_allclose(y, wanted, rtol=0.05, atol=0.5)
            found[config] = kernels.device_seconds(run, arrays, 2 * copies)
        except Exception as error:
            print(f"{config}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return found


def main():
    """Tunes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="int4-g128")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kernels.expose_kernels()
    if jax.default_backend() != "gpu":
        sys.exit("tune_matmul_gpu: JAX sees no GPU")
    from cases_matmul import SHAPES

    rows = {}
    for m in TOKENS:
        measured = [times(options.format, shape, m) for shape in SHAPES]
        common = set.intersection(*(set(found) for found in measured))
        score = {c: math.prod(f[c] / min(f.values()) for f in measured) for c in common}
        if not score:
            print(f"{m}: nothing ran")
            continue
        best = min(score, key=lambda c: score[c])
        rows[m] = {
            "config": dataclasses.asdict(best),
            "microseconds": [round(f[best] * 1e6, 2) for f in measured],
        }
        entry = (best.warpgroups, best.tokens, best.rows, best.split)
        print(f"    {m}: {entry},  # {best}, us {rows[m]['microseconds']}", flush=True)
        if options.json:
            result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
            options.json.write_text(json.dumps(result | {"best": rows}, indent=1))


if __name__ == "__main__":
    main()

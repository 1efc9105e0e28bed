"""Cases of the 8-bit optimizer updates for the benchmark drivers.

Bytes are those of the parameter, the gradient and the state, each read once, and of all
but the gradient written once. There is no dense counterpart of the same traffic;
`dense` is the float32 AdamW step, which moves 28 bytes per float32 parameter.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from qjax.pallas_kernels.optimizer import api, specs
from qjax.pallas_kernels.optimizer.reference import BOUND

SHAPES = {"4096x14336": (4096, 14336), "8192x8192": (8192, 8192)}
RULES = {"adamw8": "adamw", "lion8": "lion"}


def step(name, backend, p, g, state, rate=1e-3):
    """One step of the update called `name`."""
    count = {"count": 3} if name == "adamw8" else {}
    update = getattr(api, name)
    return update(p, g, state, learning_rate=rate, backend=backend, **count)


def moved(p, g, state):
    """Bytes read and written."""
    own = [p, *jax.tree.leaves(state)]
    return sum(2 * math.prod(x.shape) * x.dtype.itemsize for x in own) + (
        math.prod(g.shape) * jnp.dtype(g.dtype).itemsize
    )


def random_state(rng, shape, rule):
    """A state as some steps would have left it."""
    p = jax.ShapeDtypeStruct(shape, jnp.float32)

    def moment(old, signed):
        codes = rng.integers(0, 256, shape, np.uint8)
        absmax = rng.uniform(1e-4, 1e-2, old.absmax.shape).astype(np.float32)
        absmax = absmax if signed else absmax**2
        return api.Moment8(jnp.asarray(codes), jnp.asarray(absmax))

    state = jax.eval_shape(functools.partial(api.init8, rule=rule), p)
    return type(state)(*(moment(m, i == 0) for i, m in enumerate(state)))


def correctness(backend):
    """Largest error of the parameter, in steps of the learning rate."""
    rng = np.random.default_rng()
    backend = "tpu" if backend == "interpret" else backend
    backend = "xla" if backend == "cpu" else backend
    for name, rule in RULES.items():
        for shape in ((256, 512), (96, 1024), (2, 64, 768), (4096, 4096)):
            for dtype in (jnp.float32, jnp.bfloat16):
                p = jnp.asarray(rng.standard_normal(shape), dtype)
                g = jnp.asarray(1e-2 * rng.standard_normal(shape), dtype)
                state = random_state(rng, shape, rule)
                got, _ = jax.jit(functools.partial(step, name, backend))(p, g, state)
                want, _ = jax.jit(functools.partial(step, name, "reference"))(
                    p.astype(jnp.float32), g, state
                )
                size = np.maximum(np.abs(np.asarray(want, np.float64)), 1e-3)
                gap = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))
                unit = 2.0**-8 if dtype == jnp.bfloat16 else BOUND
                label = f"{name}-{jnp.dtype(dtype).name}-{'x'.join(map(str, shape))}"
                yield {"case": label, "error": float((gap / size).max()), "bound": unit}


def timing(backend):
    """Steps on rotating operands; see the contract of `benchmarks/kernels.py`."""
    rng = np.random.default_rng(0)
    backend = "xla" if backend == "cpu" else backend
    for name, rule in RULES.items():
        for label, shape in SHAPES.items():
            for dtype in (jnp.float32, jnp.bfloat16):
                arrays = []
                for _ in range(2):  # each is larger than any L2
                    p = jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
                    arrays.append((p, p * dtype(1e-2), random_state(rng, shape, rule)))
                yield {
                    "case": f"{name}-{jnp.dtype(dtype).name}-{label}",
                    "bytes": moved(*arrays[0]),
                    "flops": 60 * math.prod(shape),
                    "run": jax.jit(functools.partial(step, name, backend)),
                    "arrays": arrays,
                    "dense": None,
                }


def tpu_cases():
    """Both updates in float32, and with bfloat16 parameters; see `tpu_aot.py`."""
    for name, rule in RULES.items():
        for label, shape in SHAPES.items():
            for dtype in (jnp.float32, jnp.bfloat16):
                p = jax.ShapeDtypeStruct(shape, dtype)
                init = functools.partial(api.init8, rule=rule)
                args = (p, p, jax.eval_shape(init, p))
                config = specs.tpu_config(*shape)
                slabs = math.prod(shape) // (specs.SLAB * config.columns)
                yield {
                    "name": f"{name}-{jnp.dtype(dtype).name}-{label}",
                    "fn": functools.partial(step, name, "tpu"),
                    "args": args,
                    "bytes": moved(*args),
                    "steps": slabs,
                    "kernel": name,
                    "temporaries": 16 << 20,
                    "fast": dtype == jnp.float32 and label == "4096x14336",
                }


def gpu_cases():
    """Both updates, in float32 and with bfloat16 parameters; see `gpu_aot.py`."""
    for case in tpu_cases():
        yield {key: case[key] for key in ("name", "args", "fast")} | {
            "fn": functools.partial(step, case["kernel"], "gpu")
        }

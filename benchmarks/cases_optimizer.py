"""Cases of the 8-bit optimizer updates for the benchmark drivers.

Bytes are those of the parameter, the gradient and the state, each read once, and of all
but the gradient written once. No product corresponds to an update, so that `dense` is
None.
"""

import functools
import itertools
import math
import time

import jax
import jax.numpy as jnp

from qjax.pallas_kernels.optimizer import api, specs
from qjax.pallas_kernels.optimizer.reference import BOUND

SHAPES = {"4096x14336": (4096, 14336), "8192x8192": (8192, 8192)}
LARGE = "4096x14336"
CPU_SHAPES = {"1024x2048": (1024, 2048)}
SAMPLES = (
    ((256, 512), jnp.float32),
    ((96, 1024), jnp.bfloat16),
    ((2, 64, 768), jnp.float32),
    ((4096, 4096), jnp.bfloat16),
)
"""What correctness is measured on."""
RULES = {"adamw8": "adamw", "lion8": "lion"}


def step(name, backend, p, g, state, rate=1e-3, **options):
    """One step of the update called `name`."""
    options |= {"count": 3} if name == "adamw8" else {}
    update = getattr(api, name)
    return update(p, g, state, learning_rate=rate, backend=backend, **options)


def moved(p, g, state):
    """Bytes read and written."""
    own = [p, *jax.tree.leaves(state)]
    return sum(2 * math.prod(x.shape) * x.dtype.itemsize for x in own) + (
        math.prod(g.shape) * jnp.dtype(g.dtype).itemsize
    )


def random_operands(key, shape, dtype, rule):
    """`(p, g, state)` as some steps would have left them, made on the device."""
    keys = jax.random.split(key, 6)
    p = jax.random.normal(keys[0], shape, dtype)
    g = jax.random.normal(keys[1], shape, dtype) * jnp.asarray(1e-2, dtype)

    def moment(old, i):
        codes = jax.random.bits(keys[2 + i], shape, jnp.uint8)
        absmax = jax.random.uniform(
            keys[4 + i], old.absmax.shape, minval=1e-4, maxval=1e-2
        )
        return api.Moment8(codes, absmax if i == 0 else absmax**2)

    state = jax.eval_shape(functools.partial(api.init8, rule=rule), p)
    return p, g, type(state)(*(moment(m, i) for i, m in enumerate(state)))


_made = jax.jit(random_operands, static_argnums=(1, 2, 3))


def correctness(backend):
    """Largest error of the parameter, relative to its size and that of its step."""
    keys = iter(jax.random.split(jax.random.key(time.time_ns() % 2**31), 99))
    interpret = backend == "interpret"
    kernels = {"cpu": ("xla",), "gpu": ("gpu", "xla"), "interpret": ("tpu",)}
    cases = itertools.product(RULES, SAMPLES[: 3 if interpret else 4])
    for name, (shape, dtype) in cases:
        p, g, state = _made(next(keys), shape, dtype, RULES[name])
        want, moments = jax.jit(functools.partial(step, name, "reference"))(
            p.astype(jnp.float32), g, state
        )
        for kernel in kernels.get(backend, ("tpu", "xla")):
            run = functools.partial(step, name, kernel)
            if interpret:
                got, new = run(p, g, state, interpret=interpreter())
            else:
                got, new = jax.jit(run)(p, g, state)
            label = f"{name}-{kernel}-{jnp.dtype(dtype).name}"
            label = f"{label}-{'x'.join(map(str, shape))}"
            size = step_size(name, p, g, state)
            gap = jnp.abs(got.astype(jnp.float32) - want) / size
            unit = 2.0**-8 if dtype == jnp.bfloat16 else BOUND
            yield {"case": label, "error": float(jnp.max(gap)), "bound": unit}
            apart = [a.codes != b.codes for a, b in zip(new, moments, strict=True)]
            apart = max(float(jnp.mean(x)) for x in apart)
            yield {"case": f"{label}-codes", "error": apart, "bound": 1e-3}


def step_size(name, p, g, state, rate=1e-3):
    """What an error of the new parameter is relative to: magnitudes of all terms."""
    p, g = (jnp.abs(x.astype(jnp.float32)) for x in (p, g))
    if name == "lion8":
        return p + rate
    m = jnp.abs(api.moment(state.m, signed=True))
    v = api.moment(state.v, signed=False)
    root = jnp.sqrt((0.999 * v + 0.001 * g * g) / (1 - 0.999**3)) + 1e-8
    return p + rate * (0.9 * m + 0.1 * g) / (1 - 0.9**3) / root


def interpreter():
    """Parameters of the TPU interpreter."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams()


def timing(backend):
    """Steps on rotating operands; see `benchmarks/kernels.py`."""
    shapes = CPU_SHAPES if backend == "cpu" else {LARGE: SHAPES[LARGE]}
    kernels = {"cpu": ("xla",), "gpu": ("gpu", "xla")}.get(backend, ("tpu", "xla"))
    dtypes = (jnp.float32, jnp.bfloat16)
    for name, (label, shape), dtype in itertools.product(RULES, shapes.items(), dtypes):
        keys = jax.random.split(jax.random.key(0), 2)  # each larger than any L2
        arrays = [_made(key, shape, dtype, RULES[name]) for key in keys]
        for kernel in kernels:
            yield {
                "case": f"{name}-{kernel}-{jnp.dtype(dtype).name}-{label}",
                "bytes": moved(*arrays[0]),
                "flops": 60 * math.prod(shape),
                "run": jax.jit(functools.partial(step, name, kernel)),
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
    """Both updates, in float32 and with bfloat16 parameters; see `gpu_aot.py`.

    In place: parameters and states are given up and nothing is copied.
    """
    for case in tpu_cases():
        yield {key: case[key] for key in ("name", "args", "fast")} | {
            "fn": functools.partial(step, case["kernel"], "gpu"),
            "donate": (0, 2),
            "temporaries": 1 << 20,
        }

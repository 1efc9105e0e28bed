"""8-bit AdamW and Lion: parameters and gradients in, parameters and states out.

Moments live as 8-bit codes of bitsandbytes' dynamic maps (signed for the first moment,
unsigned for the second) with one float32 absolute maximum per 256 consecutive elements
of the row-major array: 2.03 bytes per parameter for AdamW, 1.02 for Lion, and states of
bitsandbytes' blockwise optimizers can be used as they are. Decoding, update and
encoding are one kernel; donate the parameter and the state to update in place.

What it refuses: parameters that are not float32, bfloat16 or float16 (bfloat16 and
float16 are rounded to nearest after the step). Tensors so small that 8 bits do not pay
(bitsandbytes keeps those under 4096 elements in float32) are the caller's choice.
"""

import importlib
from typing import Any, NamedTuple

import jax.numpy as jnp

from ..weights import FLOAT_SCALES, KernelError
from . import dynamic, reference
from .update import BLOCK, hyper_vector

BACKENDS = ("xla", "tpu", "gpu", "reference")


class Moment8(NamedTuple):
    """A moment of a parameter.

    Attributes:
      codes: uint8, the shape of the parameter.
      absmax: float32 `[ceil(size / 256)]`.
    """

    codes: Any
    absmax: Any


class AdamW8(NamedTuple):
    """State of `adamw8`: first (signed map) and second moment (unsigned map)."""

    m: Moment8
    v: Moment8


class Lion8(NamedTuple):
    """State of `lion8`: the first moment (signed map)."""

    m: Moment8


def init8(p: Any, rule: str = "adamw") -> Any:
    """Zero moments of a parameter.

    Args:
      p: the parameter, or a `jax.ShapeDtypeStruct`.
      rule: "adamw" or "lion".

    Returns:
      `AdamW8` or `Lion8`.

    Raises:
      KernelError: an unknown rule.
    """
    states = {"adamw": AdamW8, "lion": Lion8}
    if rule not in states:
        raise KernelError(
            f"init8: rule is {rule!r}, expected one of {tuple(states)}; name one"
        )
    signed = (True, False)[: len(states[rule]._fields)]
    return states[rule](*(_zeros(p, s) for s in signed))


def _zeros(p, signed):
    codes = jnp.full(p.shape, dynamic.ZERO[signed], jnp.uint8)
    return Moment8(codes, jnp.zeros((_blocks(p),), jnp.float32))


def moment(state: Moment8, *, signed: bool) -> Any:
    """A stored moment as float32, in the shape of the parameter."""
    return reference.load(*state, signed=signed)


def adamw8(
    p: Any,
    g: Any,
    state: AdamW8,
    *,
    learning_rate: Any,
    count: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 1e-4,
    gradient_scale: Any = 1.0,
    backend: str = "xla",
    config: Any = None,
    interpret: Any = False,
) -> tuple[Any, AdamW8]:
    """One AdamW step with 8-bit moments.

        m = b1 m + (1 - b1) g              v = b2 v + (1 - b2) g^2
        p = p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

    The defaults and the semantics are those of `optax.adamw`. Non-finite gradients: see
    `update`.

    Args:
      p: float32, bfloat16 or float16, any shape.
      g: gradient, the shape of `p`.
      state: as `init8` or a previous step gave it.
      learning_rate: scalar, may be traced, as may all that follow.
      count: the number of this step, from 1 (`t`).
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root.
      weight_decay: decoupled decay.
      gradient_scale: what the gradient is multiplied by first, as clipping does.
      backend: "xla", "tpu", "gpu" or "reference".
      config: the backend's tiles; default its tuned table.
      interpret: run the kernel's interpreter: True or the backend's parameters.

    Returns:
      The new parameter and state.

    Raises:
      KernelError: an argument does not fit, or the backend cannot do this; the message
        names the argument or gives the reason.

    Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv
    2110.02861; Loshchilov and Hutter, arXiv 1711.05101.
    """
    hyper = hyper_vector(
        learning_rate, b1, b2, eps, weight_decay, count, gradient_scale
    )
    run = _backend("adamw8", p, g, state, AdamW8, backend, config, interpret)
    p, mc, ma, vc, va = run(p, g, state, hyper)
    return p, AdamW8(Moment8(mc, ma), Moment8(vc, va))


def lion8(
    p: Any,
    g: Any,
    state: Lion8,
    *,
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    weight_decay: Any = 1e-3,
    gradient_scale: Any = 1.0,
    backend: str = "xla",
    config: Any = None,
    interpret: Any = False,
) -> tuple[Any, Lion8]:
    """One Lion step with an 8-bit moment.

        p = p - lr (sign(b1 m + (1 - b1) g) + weight_decay p)
        m = b2 m + (1 - b2) g

    Args:
      p: float32, bfloat16 or float16, any shape.
      g: gradient, the shape of `p`.
      state: as `init8(p, "lion")` or a previous step gave it.
      learning_rate: scalar, may be traced, as may all that follow.
      b1: weight of the moment in the direction.
      b2: decay of the moment.
      weight_decay: decoupled decay.
      gradient_scale: what the gradient is multiplied by first, as clipping does.
      backend: "xla", "tpu", "gpu" or "reference".
      config: the backend's tiles; default its tuned table.
      interpret: run the kernel's interpreter: True or the backend's parameters.

    Returns:
      The new parameter and state.

    Raises:
      KernelError: as `adamw8`.

    Reference: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv
    2302.06675.
    """
    hyper = hyper_vector(learning_rate, b1, b2, 0.0, weight_decay, 1, gradient_scale)
    run = _backend("lion8", p, g, state, Lion8, backend, config, interpret)
    p, codes, absmax = run(p, g, state, hyper)
    return p, Lion8(Moment8(codes, absmax))


def _blocks(p):
    size = 1
    for axis in p.shape:
        size *= axis
    return -(-size // BLOCK)


def _backend(name, p, g, state, cls, backend, config, interpret):
    """The backend's function, after a check of the operands."""

    def refuse(argument, got, expected):
        raise KernelError(f"{name}: {argument} {got}, expected {expected}")

    if backend not in BACKENDS:
        refuse("backend is", repr(backend), f"one of {BACKENDS}")
    for label, x in (("p", p), ("g", g)):
        if jnp.dtype(x.dtype).name not in FLOAT_SCALES:
            refuse(f"{label} has dtype", x.dtype, FLOAT_SCALES)
    if g.shape != p.shape:
        refuse("g has shape", list(g.shape), f"{list(p.shape)}, that of p")
    if len(state) != len(cls._fields):
        refuse("state has", f"{len(state)} moments", f"{len(cls._fields)}")
    for label, (codes, absmax) in zip(cls._fields, state, strict=True):
        if codes.shape != p.shape or codes.dtype != jnp.uint8:
            got = f"{codes.dtype} {list(codes.shape)}"
            refuse(f"codes of {label} are", got, f"uint8 {list(p.shape)}")
        if absmax.shape != (_blocks(p),) or absmax.dtype != jnp.float32:
            got = f"{absmax.dtype} {list(absmax.shape)}"
            refuse(f"absmax of {label} is", got, f"float32 [{_blocks(p)}]")
    if backend == "reference" or p.size == 0:
        return getattr(reference, name)
    module = importlib.import_module(f"{__package__}.{backend}")
    reason = module.obstacle(p.shape, p.dtype, g.dtype)
    if reason is not None:
        raise KernelError(
            f"{name}: backend {backend!r} cannot update {p.dtype} {list(p.shape)} with "
            f"{g.dtype} gradients: {reason}"
        )
    run = getattr(module, name)
    if backend == "xla":
        return run
    return lambda *args: run(*args, config=config, interpret=interpret)

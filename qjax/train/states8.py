"""AdamW and Lion with 8-bit states, as optax transformations.

Moments are bitsandbytes' 8-bit codes with one maximum per block of 256 elements
(`qjax.pallas_kernels.optimizer`): 2.03 bytes per parameter for AdamW and 1.02 for Lion,
of 8 and 4. Leaves of fewer than `min_size` elements keep float32 moments, as there.

`update` is optax's and returns updates, an array of the size of every leaf. `apply`
returns the parameters instead, and with donated arguments needs no such array; the
training step uses it.

Blocks run through the row-major array: a leaf that is split over devices along any but
its first axis is gathered by the update. Adapters are small; for a whole model shard
the first axis, or keep 32 bits.

Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv
2110.02861.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import qjax.pallas_kernels.device as device
from qjax.errors import SpecError
from qjax.pallas_kernels.optimizer import api as kernels
from qjax.pallas_kernels.optimizer import tpu

MIN_SIZE = 4096


class Fused(NamedTuple):
    """An `optax.GradientTransformation` that can also update parameters in place.

    Attributes:
      init: As optax has it.
      update: As optax has it; needs `params`.
      apply: `(grads, state, params) -> (params, state)`.
    """

    init: Any
    update: Any
    apply: Any


class State8(NamedTuple):
    """State of `adamw8` and `lion8`.

    Attributes:
      count: Number of steps done, int32.
      moments: For every parameter `AdamW8` or `Lion8`; small ones have the same with
        float32 arrays in place of codes and no maxima.
    """

    count: Any
    moments: Any


def adamw8(
    learning_rate: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    min_size: int = MIN_SIZE,
) -> Fused:
    """AdamW with 8-bit moments; arguments and defaults are those of `optax.adamw`.

    Args:
      learning_rate: Number or schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root.
      weight_decay: Decoupled decay.
      min_size: Leaves of fewer elements keep 32-bit moments.
    """
    hyper = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    return _fused("adamw", learning_rate, hyper, min_size)


def lion8(
    learning_rate: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1e-3,
    min_size: int = MIN_SIZE,
) -> Fused:
    """Lion with an 8-bit moment; arguments and defaults are those of `optax.lion`.

    Args:
      learning_rate: Number or schedule.
      b1: Weight of the moment in the direction.
      b2: Decay of the moment.
      weight_decay: Decoupled decay.
      min_size: Leaves of fewer elements keep a 32-bit moment.
    """
    hyper = {"b1": b1, "b2": b2, "weight_decay": weight_decay}
    return _fused("lion", learning_rate, hyper, min_size)


def _fused(rule: str, learning_rate: Any, hyper: dict[str, float], least: int) -> Fused:
    small = _small(rule, hyper)

    def init(params: Any) -> State8:
        def one(p: Any) -> Any:
            state = kernels.init8(p, rule)
            if p.size >= least:
                return state
            zeros = kernels.Moment8(jnp.zeros(p.shape, jnp.float32), None)
            return type(state)(*(zeros for _ in state))

        moments = jax.tree.map(one, params)
        return State8(jnp.zeros((), jnp.int32), moments)

    def apply(grads: Any, state: State8, params: Any) -> tuple[Any, State8]:
        count = state.count + 1
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        leaves, tree = jax.tree.flatten(params)
        own = tree.flatten_up_to(state.moments)
        made = []
        for p, g, held in zip(leaves, tree.flatten_up_to(grads), own, strict=True):
            if held[0].absmax is None:
                made.append(small(p, g, held, rate, count))
            else:
                made.append(_large(rule, p, g, held, rate, count, hyper))
        params = jax.tree.unflatten(tree, [p for p, _ in made])
        return params, State8(count, jax.tree.unflatten(tree, [m for _, m in made]))

    def update(grads: Any, state: State8, params: Any = None) -> tuple[Any, State8]:
        if params is None:
            raise SpecError("8-bit optimizers update parameters; pass params to update")
        new, state = apply(grads, state, params)
        return jax.tree.map(jnp.subtract, new, params), state

    return Fused(init, update, apply)


def _large(rule, p, g, held, rate, count, hyper):
    """One leaf with 8-bit moments."""
    on_tpu = device.platform() == "tpu" and tpu.obstacle(p.shape, p.dtype, g.dtype)
    backend = "tpu" if device.platform() == "tpu" and on_tpu is None else "xla"
    settings: dict[str, Any] = hyper | {"learning_rate": rate, "backend": backend}
    if rule == "lion":
        return kernels.lion8(p, g, held, **settings)
    return kernels.adamw8(p, g, held, count=count, **settings)


def _small(rule: str, hyper: dict[str, float]) -> Any:
    """The rule with 32-bit moments, by optax."""
    scale = {
        "adamw": lambda: optax.scale_by_adam(hyper["b1"], hyper["b2"], hyper["eps"]),
        "lion": lambda: optax.scale_by_lion(hyper["b1"], hyper["b2"]),
    }[rule]()
    states = {"adamw": optax.ScaleByAdamState, "lion": optax.ScaleByLionState}
    named: Any = states[rule]

    def apply(p, g, held, rate, count):
        moments = [moment.codes for moment in held]
        state: Any = named(count - 1, *moments)
        direction, state = scale.update(g.astype(jnp.float32), state)
        wide = p.astype(jnp.float32)
        step: Any = direction + hyper["weight_decay"] * wide
        made = (kernels.Moment8(m, None) for m in tuple(state)[1:])
        return (wide - rate * step).astype(p.dtype), type(held)(*made)

    return apply

"""What optimizer a run uses: settings, schedules, and what its state takes.

Decides how settings become an optax transformation. AdamW and Lion are our own, with
states in 8 bits or float32 (`qjax.train.fused`); Adafactor and SGD are optax's. Weight
decay is decoupled in all of them, and multiplied by the learning rate.
"""

import dataclasses
import difflib
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qjax.errors import SpecError
from qjax.train.fused import adamw, lion
from qjax.train.offload import OFFLOAD, host_states

SCHEDULES = ("constant", "linear", "cosine")
DEFAULTS = {
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "lion": {"b1": 0.9, "b2": 0.99},
    "adafactor": {"b1": 0.0},
    "sgd": {"b1": 0.0},
}
"""Constants that each optimizer has, and their values unless others are set."""
EIGHT = ("adamw", "lion")
"""Optimizers with 8-bit states."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How parameters are updated.

    Attributes:
      name: "adamw", "lion", "adafactor" or "sgd".
      learning_rate: The greatest of the run.
      schedule: What it does after warmup: "constant", or falls to 0 at the end in a
        "linear" or "cosine" way.
      warmup: Steps in which it rises: a fraction of the run if below 1, else a number.
      b1: Decay of the first moment; for "adafactor" and "sgd" momentum, 0 for none.
        None for the optimizer's usual value (`DEFAULTS`), as with `b2` and `eps`.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled decay, multiplied by the learning rate.
      clip: Global norm to which gradients are scaled down; None for none.
      bits: Of the state's elements: 8 ("adamw", "lion") or 32.
      offload: Whether the state lies in host memory between updates: "never", "always"
        or "auto", if the run would not fit otherwise; see `qjax.train.offload`.
      min_size_8bit: With 8 bits, parameters of fewer elements keep float32 states.

    Raises:
      SpecError: A value is not allowed.
    """

    name: str = "adamw"
    learning_rate: float = 2e-4
    schedule: str = "constant"
    warmup: float = 0.03
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    clip: float | None = 1.0
    bits: int = 32
    offload: str = "never"
    min_size_8bit: int = 4096

    def __post_init__(self) -> None:
        _choice("name", self.name, tuple(DEFAULTS))
        _choice("schedule", self.schedule, SCHEDULES)
        _choice("offload", self.offload, OFFLOAD)
        rate = self.learning_rate
        if not (_number(rate) and rate > 0):
            _refuse(
                f"learning_rate is {rate!r:.50}; nothing would be trained; expected a "
                "number above 0, such as 2e-4"
            )
        for name, value in (
            ("weight_decay", self.weight_decay),
            ("warmup", self.warmup),
        ):
            if not (_number(value) and value >= 0):
                _refuse(f"{name} is {value!r:.50}; expected a number from 0 on")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            _refuse(
                f"warmup is {self.warmup!r:.50}; expected a fraction below 1, or a "
                "whole number of steps"
            )
        if self.clip is not None and not (_number(self.clip) and self.clip > 0):
            _refuse(
                f"clip is {self.clip!r:.50}; expected a norm above 0, or None for none"
            )
        if type(self.min_size_8bit) is not int or self.min_size_8bit < 0:
            _refuse(
                f"min_size_8bit is {self.min_size_8bit!r:.50}; expected an integer "
                "from 0 on"
            )
        if type(self.bits) is not int or self.bits not in (8, 32):
            _refuse(f"bits is {self.bits!r:.50}; expected 8 or 32")
        if self.bits == 8 and self.name not in EIGHT:
            _refuse(
                f"bits=8 is for {' and '.join(EIGHT)}; {self.name} has no 8-bit state; "
                "leave bits at 32"
            )
        self._check_constants()

    def _check_constants(self) -> None:
        known = DEFAULTS[self.name]
        for name in ("b1", "b2", "eps"):
            value = getattr(self, name)
            if value is None:
                continue
            if name not in known:
                _refuse(
                    f"{name} is {value!r:.50}; {self.name} has none, only "
                    f"{', '.join(known)}"
                )
            low, high = (0, 1) if name != "eps" else (0, math.inf)
            if not (_number(value) and low <= value < high):
                limit = "[0, 1)" if name != "eps" else "[0, inf)"
                _refuse(f"{name} is {value!r:.50}; expected a number in {limit}")

    @property
    def constants(self) -> dict[str, float]:
        """The constants that the optimizer has: those set, else the usual ones."""
        usual = DEFAULTS[self.name]
        given = {name: getattr(self, name) for name in usual}
        return {k: usual[k] if given[k] is None else given[k] for k in usual}


def _refuse(text: str) -> None:
    raise SpecError(f"optimizer: {text}")


def _choice(field: str, got: Any, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        near = difflib.get_close_matches(str(got).lower(), allowed, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        _refuse(f"{field} is {got!r:.50}; {hint}expected one of {', '.join(allowed)}")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def learning_rate(config: Optimizer, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of steps done before.

    It rises in equal parts, so that no step has none, and is greatest after `warmup`
    steps; "linear" and "cosine" fall from there and would be 0 after the last step.

    Args:
      config: The settings.
      steps: Number of updates of the run.

    Raises:
      SpecError: The run has no step, or warmup takes all of it.
    """
    if type(steps) is not int or steps < 1:
        _refuse(f"the run has {steps!r:.50} steps; expected an integer from 1 on")
    rise = int(config.warmup if config.warmup >= 1 else config.warmup * steps)
    if rise >= steps:
        _refuse(
            f"warmup takes {rise} steps, as many as or more than the run, which has "
            f"{steps}; use a smaller number or a fraction below 1"
        )

    def schedule(count: Any) -> Any:
        count = jnp.asarray(count).astype(jnp.float32)
        done = jnp.clip((count - rise) / (steps - rise), 0.0, 1.0)
        left = {
            "constant": jnp.ones_like(done),
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
        }[config.schedule]
        up = (count + 1.0) / (rise + 1.0)
        return config.learning_rate * jnp.where(count < rise, up, left)

    return schedule


def make_optimizer(
    config: Optimizer, steps: int, *, shardings: Any = None
) -> optax.GradientTransformation:
    """Returns the optimizer of a run.

    Use it like any optax transformation, or update parameters in place with
    `qjax.train.fused.apply(tx, params, grads, state)`.

    Args:
      config: The settings. `offload="auto"` keeps the state on the device:
        `qjax.train.offload.should_offload` says whether to move it.
      steps: Number of updates, for the schedule.
      shardings: See `qjax.train.fused.adamw`.

    Raises:
      SpecError: See `learning_rate`.
    """
    rate, decay = learning_rate(config, steps), config.weight_decay
    own: dict[str, Any] = {
        **config.constants,
        "weight_decay": decay,
        "clip": config.clip,
        "bits": config.bits,
        "min_size": config.min_size_8bit,
        "shardings": shardings,
    }
    if config.name == "adamw":
        tx = adamw(rate, **own)
    elif config.name == "lion":
        tx = lion(rate, **own)
    else:
        tx = _of_optax(config, rate)
    return host_states(tx) if config.offload == "always" else tx


def _of_optax(config: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    momentum = config.constants["b1"] or None
    parts = []
    if config.clip is not None:
        parts.append(optax.clip_by_global_norm(config.clip))
    if config.name == "adafactor":
        # Steps of the learning rate: B starts at 0, whose size says nothing.
        own: dict[str, Any] = {"multiply_by_parameter_scale": False}
        parts.append(optax.adafactor(rate, momentum=momentum, **own))
    else:
        parts.append(optax.sgd(rate, momentum=momentum))
    if config.weight_decay:
        decay = config.weight_decay
        parts.append(
            optax.add_decayed_weights(lambda count: -decay * jnp.asarray(rate(count)))
        )
    return relaxed(optax.chain(*parts))


def relaxed(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns a transformation whose arithmetic may mix dtypes, as optax's does."""
    tx = optax.with_extra_args_support(tx)

    def init(params):
        with jax.numpy_dtype_promotion("standard"):
            return tx.init(params)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def state_bytes(state: Any) -> int:
    """Returns the bytes that the arrays of a state hold, or of what stands for one."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

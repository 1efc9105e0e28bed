"""The compiled step that a run's settings ask for."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax.train.batch import BATCH
from qjax.train.config import Finetune
from qjax.train.offload import available_bytes, peak_bytes, should_offload
from qjax.train.optimizers import make_optimizer
from qjax.train.step import Step


def make_step(
    model: Any, config: Finetune, steps: int, wrt: Any, mesh: Any, notes: list[str]
) -> Step:
    """Returns the step of a run.

    `offload="auto"` compiles the step once to see what it needs.

    Args:
      model: With what is trained in place.
      config: The run.
      steps: Number of updates in all.
      wrt: Filter of what is trained.
      mesh: Devices that share the step, or None.
      notes: Takes what was decided.

    Raises:
      SpecError: See `Step` and `make_optimizer`.
    """

    def make(offload: bool) -> Step:
        return Step(
            model,
            make_optimizer(config.optimizer, steps),
            wrt=wrt,
            remat=config.remat,
            loss_chunk=config.loss_chunk,
            offload=offload,
            mesh=mesh,
        )

    step, wanted = make(config.optimizer.offload == "always"), config.optimizer.offload
    room = available_bytes()
    if wanted != "auto" or room is None:
        return step
    memory = _needs(step, config)
    if not should_offload(wanted, memory, room):
        return step
    notes.append(
        f"optimizer states go to the host's memory: the step needs "
        f"{peak_bytes(memory):,} of {room:,} bytes with them on the device"
    )
    return make(True)


def _needs(step: Step, config: Finetune) -> Any:
    """What the compiler says of the memory of a step; nothing is allocated."""
    shape = (config.accumulate, config.batch, config.data.context)
    batch: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if name == "weights" else jnp.int32
        )
        for name in BATCH
    }
    return step.lower(batch).compile().memory_analysis()

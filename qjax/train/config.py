"""What a fine-tuning run is: one dataclass of the rooms' own, JSON in and out.

Decides what must hold between them: adapters or quantization-aware training, steps or
epochs.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from qjax.errors import SpecError
from qjax.io.json import read_object
from qjax.models.block import REMAT
from qjax.recipes import Recipe
from qjax.train.data_config import Data
from qjax.train.from_json import build, plain
from qjax.train.lora import LoRA
from qjax.train.mesh import Mesh
from qjax.train.optimizers import Optimizer
from qjax.train.qat import QAT


@dataclasses.dataclass(frozen=True)
class Log:
    """What a run tells while it trains.

    Attributes:
      every: Steps between two lines of `metrics.jsonl`.
      tensorboard: Also write event files, into `tensorboard/` of the output.
      wandb: Project of Weights & Biases to send the same to.

    Raises:
      SpecError: `every` is not positive.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self):
        at_least("log.every", self.every, 1)


@dataclasses.dataclass(frozen=True)
class Finetune:
    """A fine-tuning run.

    Attributes:
      data: What to train on.
      lora: Adapters over the frozen model; the default where `qat` is not given.
      qat: Quantization-aware training instead; has adapters of its own.
      optimizer: How parameters are updated.
      mesh: How many devices share what.
      steps: Number of updates; instead of `epochs`.
      epochs: How often to go through the data; 1 by default.
      batch: Rows of a micro-batch, over all devices.
      accumulate: Micro-batches of an update.
      remat: What the gradient finds stored: "none" (everything), "products", "block"
        (the input of each) or "offload" (the same, in the host's memory).
      loss_chunk: Tokens whose logits exist at a time.
      eval_every: Steps between two evaluations; None for those before the first step
        and after the last alone.
      save_every: Steps between two checkpoints; None for one at the end.
      keep: How many checkpoints stay.
      seed: Of adapters and dropout.
      log: What is told meanwhile.

    Raises:
      SpecError: A value is not allowed, or two exclude each other.
    """

    data: Data
    lora: LoRA | None = None
    qat: QAT | None = None
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    steps: int | None = None
    epochs: float | None = None
    batch: int = 8
    accumulate: int = 1
    remat: str = "block"
    loss_chunk: int = 512
    eval_every: int | None = None
    save_every: int | None = 200
    keep: int = 3
    seed: int = 0
    log: Log = dataclasses.field(default_factory=Log)

    def __post_init__(self):
        if self.lora is not None and self.qat is not None:
            raise SpecError(
                "finetune: lora and qat are both given; adapters that are trained "
                "through the rounding of the weight go into qat.lora"
            )
        if self.lora is None and self.qat is None:
            object.__setattr__(self, "lora", LoRA())
        if self.steps is not None and self.epochs is not None:
            raise SpecError("finetune: give steps or epochs, not both")
        for name in ("steps", "eval_every", "save_every"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        for name in ("batch", "accumulate", "loss_chunk", "keep"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise SpecError(f"finetune: epochs is {self.epochs}; expected more than 0")
        if self.remat not in REMAT:
            raise SpecError(
                f"finetune: remat is {self.remat!r:.50}; expected one of "
                f"{', '.join(REMAT)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns its JSON form; `finetune_from_dict` is the inverse."""
        return plain(self)


def finetune_from_dict(spec: Mapping[str, Any], where: str = "finetune") -> Finetune:
    """Builds a run from `Finetune.to_dict()` output or a hand-written equivalent.

    Args:
      spec: A JSON object; what it leaves out has its default. `qat.recipe` may be an
        object as `qjax.recipes.recipe_from_dict` takes.
      where: What errors call the source.

    Raises:
      SpecError: A key is unknown, or a value is not allowed; the message has its path.
    """
    hints = {QAT: {"recipe": Recipe | str, "lora": LoRA | None}}
    return build(Finetune, spec, where, hints=hints)


def load_finetune(path: str | os.PathLike[str]) -> Finetune:
    """Reads a run from a JSON file.

    Raises:
      SpecError: See `finetune_from_dict`; or there is no such file.
      FormatError: It is no JSON.
    """
    return finetune_from_dict(read_object(path), os.fspath(path))


def at_least(name: str, value: Any, least: int) -> None:
    """Refuses what is not an integer from `least` on.

    Raises:
      SpecError: It is not; the message has the name.
    """
    if type(value) is not int or value < least:
        raise SpecError(
            f"finetune: {name} is {value!r:.50}; expected an integer from {least} on"
        )

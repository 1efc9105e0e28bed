"""What a device is to do, and the training step of shapes that this asks for."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from qjax.abstract import abstract_decoder
from qjax.errors import SpecError
from qjax.models import Decoder, ModelConfig
from qjax.plan_parts import (
    Parts,
    compiled_parts,
    host_bytes,
    rounding_temporaries,
    shard_bytes,
    train_temporaries,
    trained_bytes,
    weight_bytes,
)
from qjax.recipes import Recipe
from qjax.train.batch import BATCH
from qjax.train.lora import LoRA, attach
from qjax.train.mesh import Mesh, make_mesh
from qjax.train.optimizers import Optimizer, make_optimizer
from qjax.train.qat import QAT, prepare
from qjax.train.step import Step


@dataclasses.dataclass(frozen=True)
class Work:
    """What the device is to do.

    Attributes:
      batch: Rows, of all devices together.
      context: Tokens of a row; when serving, of prompt and answer together.
      accumulate: Micro-batches of an update.
      lora: Adapters that are trained.
      qat: Quantization-aware training instead; has adapters of its own.
      optimizer: How.
      mesh: How many devices share what.
      remat: See `qjax.train.Finetune`.
      loss_chunk: See `qjax.train.Finetune`.
      cache: Dtype of keys and values when serving; see `Decoder.init_cache`.
      kernels: Compile products as kernels, as they run. Without them compiling takes a
        third of the time, and memory differs by a percent.

    Raises:
      SpecError: A number is not positive.
    """

    batch: int = 1
    context: int = 2048
    accumulate: int = 1
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    qat: QAT | None = None
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    mesh: Mesh = dataclasses.field(default_factory=lambda: Mesh(fsdp=-1))
    remat: str = "block"
    loss_chunk: int = 512
    cache: str | None = None
    kernels: bool = True

    def __post_init__(self):
        for name in ("batch", "context", "accumulate", "loss_chunk"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise SpecError(f"plan: {name} is {value!r:.50}; expected 1 or more")


def model_of(
    config: ModelConfig, recipe: Recipe | str | None, work: Work, *, training: bool
) -> Decoder:
    """The model of shapes, with what is trained in place.

    What adapters start with takes no memory, and scales of activations hardly any:
    neither asks for weights or texts here.

    Args:
      config: The architecture.
      recipe: How weights are packed; None for dense ones.
      work: What it is for.
      training: Whether that is training.

    Raises:
      SpecError: Recipe, adapters or training do not fit the model.
    """

    def plain(lora: LoRA | None) -> Any:
        start: Any = {"init": "kaiming", "original": None}
        return None if lora is None else dataclasses.replace(lora, **start)

    def change(model: Decoder) -> None:
        key = jax.random.key(0)
        if not training:
            return
        if work.qat is None:
            attach(model, plain(work.lora), key)
            return
        free: Any = {"static": False, "calibration": None}
        own = dataclasses.replace(work.qat, lora=plain(work.qat.lora), **free)
        prepare(model, own, key=key)

    return abstract_decoder(config, recipe, change=change)


def training_parts(
    model: Decoder, work: Work, count: int, devices: list[Any] | None
) -> Parts:
    """Parts of the training step.

    Args:
      model: From `model_of`.
      work: What it is for.
      count: Number of devices.
      devices: Those to compile for, or None to estimate.
    """
    sizes = work.mesh.resolved(count)
    if math.prod(sizes.sizes.values()) != count:
        raise SpecError(f"plan: {sizes} is not {count} devices; give -1 for the rest")
    mesh, where = None, None
    if count > 1:
        mesh = _abstract(sizes) if devices is None else make_mesh(sizes, devices)
    elif devices is not None:
        where = SingleDeviceSharding(devices[0])
    step = Step(
        model,
        make_optimizer(work.optimizer, 1000),
        wrt=nnx.LoRAParam if work.qat is None else work.qat.wrt,
        remat=work.remat,
        loss_chunk=work.loss_chunk,
        offload=work.optimizer.offload == "always",
        mesh=mesh,
    )
    shape = (work.accumulate, work.batch, work.context)
    batch: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in BATCH
    }
    batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    state, frozen, arrays = step.shapes(batch, where)
    trained = trained_bytes(state.trainable)
    arguments = {
        **weight_bytes(frozen),
        **trained,
        "optimizer": shard_bytes(state.optimizer),
        "batch": shard_bytes(arrays),
    }
    if devices is None:
        rows = max(work.batch // (sizes.data * sizes.fsdp), 1)
        size = arguments["packed weights"] + arguments["scales"]
        gathered = size * sizes.fsdp // model.config.layers if sizes.fsdp > 1 else 0
        if work.qat is not None:
            gathered += rounding_temporaries(model.config, sizes.tensor)
        arguments["temporaries"] = train_temporaries(
            model.config,
            rows,
            work.context,
            work.loss_chunk,
            sum(trained.values()),
            gathered,
        )
        return Parts(arguments, host_bytes(state), False)
    memory = step.lower(batch, where).compile().memory_analysis()
    return compiled_parts(arguments, memory)


def _abstract(sizes: Mesh) -> Any:
    """A mesh of devices that no compiler knows."""
    found = sizes.sizes
    return jax.sharding.AbstractMesh(tuple(found.values()), tuple(found))

"""Whether a model fits a device, and how fast it can be at most, before there is one.

For TPUs the real program is compiled ahead of time, the training step of
`qjax.train.step` or the decoding of `qjax.decoding`, by libtpu for chips that need not
exist and for arrays that are shapes only; its compiler says what it needs. For GPUs
there is no such compiler: arrays are counted, and what lies between them is estimated.

The speed is a bound, not a forecast: the time in which the device could do the
arithmetic, or read the weights, if it did nothing else.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

import qjax.pallas_kernels.device as target_device
from qjax.abstract import find_config
from qjax.decoding import cache_bucket, programs
from qjax.devices import DEVICES, Device, parse_device, topology_devices
from qjax.errors import SpecError, UnsupportedError
from qjax.models import Decoder, ModelConfig
from qjax.plan_parts import (
    Parts,
    compiled_parts,
    decode_bound,
    serve_temporaries,
    shard_bytes,
    train_bound,
    weight_bytes,
)
from qjax.plan_work import Work as Work
from qjax.plan_work import model_of, training_parts
from qjax.recipes import Recipe
from qjax.train.offload import peak_bytes

MODES = ("serve", "finetune")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program needs.

    Attributes:
      device: Name and number of devices.
      mode: `"serve"` or `"finetune"`.
      fits: Whether each device has the memory.
      peak_bytes_per_device: Memory at the worst moment.
      memory_bytes_per_device: Memory that there is.
      breakdown: Bytes by what they are for; they add up to the peak.
      host_bytes: Bytes in the host's memory for each device.
      tokens_per_second_bound: What all devices cannot exceed.
      compiled: Whether a compiler said so; otherwise it is an estimate.
      notes: What else is to be known.
    """

    device: str
    mode: str
    fits: bool
    peak_bytes_per_device: int
    memory_bytes_per_device: int
    breakdown: dict[str, int]
    host_bytes: int
    tokens_per_second_bound: float
    compiled: bool
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        return dataclasses.asdict(self)


def plan(
    model: str | ModelConfig,
    device: str,
    *,
    recipe: Recipe | str | None = None,
    mode: str = "serve",
    work: Work | None = None,
    revision: str | None = None,
) -> Plan:
    """Says what a model needs on a device.

    Args:
      model: A configuration, or what `qjax.abstract.find_config` takes: `llama-3-8b`, a
        `config.json`, a model directory or artifact, a Hub id. No weights are read.
      device: A name of `qjax.devices.DEVICES`, with `-N` for N of them: `v5e-8`.
      recipe: How weights are packed: `"none"` for not at all; by default as the
        artifact is, or `nf4`, or not at all for quantization-aware training.
      mode: `"serve"`, or `"finetune"`: adapters, or `work.qat`.
      work: How many rows of how many tokens, and the settings of training.
      revision: Of a Hub id.

    Raises:
      SpecError: An unknown model, device or recipe, or settings that do not fit.
      UnsupportedError: Serving on several devices.
      MissingExtraError: A TPU, and libtpu is not installed.

    Example:
      >>> plan("llama-3-8b", "v5e-1", mode="finetune").fits
      True
    """
    work = work or Work()
    if mode not in MODES:
        raise SpecError(f"plan: mode is {mode!r:.50}; expected one of {MODES}")
    base, count = parse_device(device)
    packed: Recipe | None = None
    if not isinstance(model, ModelConfig):
        model, packed = find_config(model, revision)
    if work.context > model.max_context:
        raise SpecError(
            f"plan: context is {work.context}; the model's is {model.max_context}"
        )
    training = mode == "finetune"
    usual = None if training and work.qat is not None else "nf4"
    chosen = None if recipe == "none" else recipe or packed or usual
    kind = DEVICES[base]
    with target_device.target(kind.kind if work.kernels else "cpu"):
        shapes = model_of(model, chosen, work, training=training)
        if mode == "serve" and count > 1:
            raise UnsupportedError(
                f"plan: serving on {count} devices; one model is served by one device"
            )
        devices = topology_devices(base, count) if kind.slices else None
        run = training_parts if training else _serve
        parts = run(shapes, work, count, devices)
    made = _plan(f"{base}-{count}", kind, mode, model, work, parts, count)
    if mode == "serve" or work.optimizer.offload != "auto" or made.fits:
        return made
    away = dataclasses.replace(work.optimizer, offload="always")
    again = dataclasses.replace(work, optimizer=away)
    return plan(model, device, recipe=chosen or "none", mode=mode, work=again)


def _serve(model: Decoder, work: Work, count: int, devices: list[Any] | None) -> Parts:
    """Parts of prefill or of decoding, whichever needs more."""
    del count
    length = cache_bucket(work.context, model.config.max_context)
    cache = jax.eval_shape(lambda: model.init_cache(work.batch, length, work.cache))
    arguments = {
        **weight_bytes(nnx.state(model)),
        "cache": shard_bytes(cache),
    }
    if devices is None:
        needed = serve_temporaries(model.config, work.batch, length)
        return Parts({**arguments, "temporaries": needed}, 0, False)
    where = SingleDeviceSharding(devices[0])
    graph, state = nnx.split(model)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state
    )
    made = programs(nnx.merge(graph, placed), work.batch, length, work.cache)
    found = [program.memory_analysis() for program in made[:2]]
    return compiled_parts(arguments, max(found, key=peak_bytes))


def _plan(
    name: str,
    device: Device,
    mode: str,
    config: ModelConfig,
    work: Work,
    parts: Parts,
    count: int,
) -> Plan:
    """The plan of the parts."""
    if mode == "serve":
        bound = decode_bound(config, work.batch, parts, device)
    else:
        frozen = work.qat is None
        bound = train_bound(config, work.context, device, frozen=frozen) * count
    notes: tuple[str, ...] = ()
    if not parts.compiled:
        notes = ("an estimate: arrays are counted, temporaries guessed, not compiled",)
    peak = sum(parts.bytes.values())
    return Plan(
        device=name,
        mode=mode,
        fits=peak <= device.memory,
        peak_bytes_per_device=peak,
        memory_bytes_per_device=device.memory,
        breakdown=parts.bytes,
        host_bytes=parts.host,
        tokens_per_second_bound=bound,
        compiled=parts.compiled,
        notes=notes,
    )

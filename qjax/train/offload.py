"""Optimizer states in host memory, on the device only while they are used.

Also known as paged optimizers: between updates the moments of large parameters lie in
the memory of the host (memory kind `pinned_host`); a step fetches those of one leaf,
updates it and puts them back before it fetches the next. The device then needs room for
the moments of its largest leaf, and every step moves the state both ways.

Arrays of fewer than 100000 elements and scalars stay on the device, as bitsandbytes
pages none of these. There is no paging under pressure on TPUs: whether a state is moved
is decided before the run, from what the compiler says the step needs.

Reference: Dettmers et al., QLoRA, arXiv 2305.14314, section 3 (paged optimizers).
"""

from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from qjax.errors import SpecError, UnsupportedError
from qjax.train.fused import Fused
from qjax.train.stream import SPACE, fetched, on_host, put_back

OFFLOAD = ("never", "always", "auto")
MIN_SIZE = 100_000
"""Elements from which on an array is moved."""
_HOST, _DEVICE = "pinned_host", "device"


def to_host(tree: Any, min_size: int = MIN_SIZE) -> Any:
    """Returns a state with its large arrays in host memory.

    Args:
      tree: Arrays, in or outside of `jax.jit`, or `jax.ShapeDtypeStruct`s that have a
        sharding.
      min_size: Elements from which on an array is moved.

    Raises:
      UnsupportedError: The device has no host memory of this kind.
    """
    return jax.tree.map(
        lambda x: _moved(x, SPACE.Host) if x.ndim and x.size >= min_size else x, tree
    )


def to_device(tree: Any) -> Any:
    """Returns a state with all arrays in the memory of the device."""
    return jax.tree.map(lambda x: _moved(x, SPACE.Device) if on_host(x) else x, tree)


def _moved(x, space):
    if isinstance(x, jax.ShapeDtypeStruct):
        where = _named(x)
        kind = _HOST if space == SPACE.Host else _DEVICE
        return x.update(sharding=where.with_memory_kind(kind))
    if not isinstance(x, Tracer):
        for device in x.sharding.device_set:
            _check_device(device)
    return jax.device_put(x, space)


def _named(x):
    """How a shape is split, in the one way that keeps its memory in traces."""
    where = x.sharding
    if isinstance(where, SingleDeviceSharding):
        (device,) = where.device_set
        return NamedSharding(Mesh([device], ("one",)), PartitionSpec())
    if not isinstance(where, NamedSharding):
        raise SpecError(
            f"offload: the sharding of {x.dtype}{list(x.shape)} is {where!r:.80}, "
            "expected one on named axes or a single device"
        )
    return where


def _check_device(device):
    kinds = [memory.kind for memory in device.addressable_memories()]
    if _HOST not in kinds:
        raise UnsupportedError(
            f"offload: {device.device_kind} has memories {', '.join(kinds)}, not "
            f"{_HOST}; use offload='never'"
        )


def host_states(
    tx: optax.GradientTransformation, min_size: int = MIN_SIZE
) -> optax.GradientTransformation:
    """Returns a transformation whose state lies in host memory between updates.

    AdamW and Lion of `qjax.train.fused` fetch and put back leaf by leaf; of others the
    whole state is on the device during an update.

    Args:
      tx: The transformation.
      min_size: Elements from which on an array of its state is moved.
    """

    def init(params):
        return to_host(tx.init(params), min_size)

    if isinstance(tx, Fused):
        return Fused(init, tx.update, tx.apply)
    inner = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        updates, new = inner.update(updates, fetched(state), params, **extra)
        return updates, put_back(new, state)

    return optax.GradientTransformationExtraArgs(init, update)


def peak_bytes(memory: Any) -> int:
    """Returns the bytes that a program needs on a device, as far as its compiler says.

    Args:
      memory: `jax.jit(step).lower(...).compile().memory_analysis()`.
    """
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def should_offload(
    offload: str, memory: Any = None, available: int | None = None
) -> bool:
    """Returns whether the state of a run is to lie in host memory.

    Args:
      offload: "never", "always" or "auto".
      memory: For "auto", what the compiler says that the step needs with the state on
        the device; see `peak_bytes`. A program for several devices says it of one.
      available: For "auto", bytes of memory of a device; None if it has no limit.

    Raises:
      SpecError: `offload` is none of these, or "auto" lacks `memory`.

    Example:
      >>> compiled = step.lower(state, batch).compile()
      >>> if should_offload("auto", compiled.memory_analysis(), available_bytes()):
      ...     state = state._replace(optimizer=to_host(state.optimizer))
    """
    if offload not in OFFLOAD:
        raise SpecError(
            f"offload is {offload!r:.50}; expected one of {', '.join(OFFLOAD)}"
        )
    if offload != "auto" or available is None:
        return offload == "always"
    if memory is None:
        raise SpecError(
            "offload='auto' is decided from what the step needs; compile it and give "
            "its memory_analysis()"
        )
    return peak_bytes(memory) > available


def available_bytes() -> int | None:
    """Returns the memory of the first device in bytes; None if it tells no limit."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")

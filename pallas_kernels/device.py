"""Which device a program is made for.

Products choose a kernel, and kernels their tiles, when a program is traced. That is for
the default device, unless `target` says otherwise, as ahead-of-time compilation for a
device that is not there must.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

TPU_GENERATIONS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
    "TPU v7x": "7x",
}
"""Of the kinds of devices that the TPU kernels know."""

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "qjax_target", default=None
)


@contextlib.contextmanager
def target(kind: str) -> Iterator[None]:
    """Traces for another kind of device than the default one.

    Programs that `jax.jit` traced before are not traced again: lower a new function
    inside the context.

    Args:
      kind: as `jax.Device.device_kind` spells it: `"cpu"`, `"TPU v5 lite"`,
        `"TPU v6 lite"`, `"NVIDIA H200"`, ...

    Example:
      >>> with qjax.ops.target("TPU v6 lite"):
      ...     compiled = jax.jit(step).lower(*arguments).compile()
    """
    token = _TARGET.set(kind)
    try:
        yield
    finally:
        _TARGET.reset(token)


def device_kind() -> str:
    """Kind of the device that programs are traced for."""
    return _TARGET.get() or jax.devices()[0].device_kind


def platform() -> str:
    """Platform of that device: `cpu`, `tpu`, `cuda` or what JAX calls it."""
    kind = _TARGET.get()
    if kind is None:
        name = jax.default_backend()
        return "cuda" if name == "gpu" else name
    lowered = kind.lower()
    if lowered.startswith("tpu"):
        return "tpu"
    return "cuda" if lowered.startswith("nvidia") else lowered


def count() -> int:
    """Devices a program may be split over; several for a device that is not there."""
    return jax.device_count() if _TARGET.get() is None else max(jax.device_count(), 2)


def hopper_obstacle() -> str | None:
    """Why the GPU cannot run Hopper kernels; None where there is no GPU."""
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        return None
    capability = str(getattr(devices[0], "compute_capability", "9.0"))
    if capability.split(".")[0] == "9":
        return None
    return f"compute capability {capability}; kernels are for Hopper (9.0)"

"""Which encoder turns a weight into packed codes: a kernel of the platform, or XLA.

Encoders read the weight once, write the codes, and give the same bytes. Which one runs
is chosen when a program is traced, as `qjax.ops` chooses products; the logger
`qjax.methods` says it at debug level. A program that `jit` splits over
devices encodes by XLA; inside `jax.shard_map` every device runs the kernel on its
shard. Under `jax.vmap` mapped weights are one stack.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Shaped

import qjax.pallas_kernels.device as device
from qjax.pallas_kernels.alone import alone_or
from qjax.pallas_kernels.quantize import api, specs
from qjax.pallas_kernels.weights import WeightSpec

logger = logging.getLogger("qjax.methods")

ENCODERS = {
    "tpu": "Pallas kernel over tiles in vector memory",
    "gpu": "Pallas Mosaic GPU kernel, a column of a group per thread",
    "xla": "one fused loop",
}
"""Encoders by name, with what they do."""

PREFERENCE = {"tpu": ("tpu", "xla"), "cuda": ("gpu", "xla"), "default": ("xla",)}
"""Encoders to try in order, by platform."""


def choose(
    platform: str, spec: WeightSpec, dtype: Any
) -> tuple[str, list[tuple[str, str]]]:
    """Returns the encoder for a platform and why those preferred to it refuse.

    Args:
      platform: "cpu", "tpu" or "cuda".
      spec: what the codes will be.
      dtype: of the weight.
    """
    *kernels, last = PREFERENCE.get(platform, PREFERENCE["default"])
    refused = []
    for name in kernels:
        reason = _obstacle(name, spec, dtype)
        if reason is None:
            return name, refused
        refused.append((name, reason))
    return last, refused


def _obstacle(name, spec, dtype):
    if name == "tpu":
        return specs.tpu_obstacle(spec, dtype)
    return specs.gpu_obstacle(spec, dtype) or device.hopper_obstacle()


def encode(
    w: Float[Array, "*lead in out"],
    spec: WeightSpec,
    *,
    table: np.ndarray | None = None,
    scale: Float[Array, "*lead groups out"] | None = None,
) -> Shaped[Array, "*lead p out"]:
    """Packed nearest codes of a weight by the encoder of the platform.

    Args:
      w: finite float weight.
      spec: what the codes will be; `xla.obstacle` has nothing against it.
      table: the values of "table" codes.
      scale: float32 scales, or None for the rule of `api.encode`.

    Returns:
      The codes leaf. It has no gradient.
    """
    platforms = {"default", device.platform()} & set(PREFERENCE)
    names = {key: choose(key, spec, w.dtype)[0] for key in sorted(platforms)}
    logger.debug("quantize %s %s: %s", list(w.shape), spec, names)
    operands = lax.stop_gradient((w,) if scale is None else (w, scale))

    def run(name, w, scale=None):
        return api.encode(w, spec, table=table, scale=scale, backend=name).codes

    plain = functools.partial(run, "xla")
    mesh = jax.sharding.get_abstract_mesh()
    if set(names.values()) == {"xla"} or set(mesh.axis_names) - set(mesh.manual_axes):
        return plain(*operands)

    def on(name):
        kernel = functools.partial(run, name)
        return kernel if name == "xla" else functools.partial(alone_or, kernel, plain)

    @custom_vmap
    def call(*operands):
        return lax.platform_dependent(*operands, **{k: on(v) for k, v in names.items()})

    @call.def_vmap
    def _(size, mapped, *operands):  # pyright: ignore[reportUnusedFunction]
        pairs = zip(operands, mapped, strict=True)
        w, *given = (
            x if m else jnp.broadcast_to(x, (size, *x.shape)) for x, m in pairs
        )
        return encode(w, spec, table=table, scale=given[0] if given else None), True

    return call(*operands)

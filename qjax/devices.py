"""Devices that a plan can be made for: memory, speed, and what compilers call them.

Numbers are those of vendors' data sheets, memory what runtimes leave of it to programs.
TPUs need not be there: their compiler, libtpu, compiles for a topology by name.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
from typing import Any

from qjax.errors import MissingExtraError, SpecError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
      kind: As `jax.Device.device_kind` spells it.
      memory: Bytes that a program can have.
      flops: Dense bfloat16 operations per second.
      bandwidth: Bytes per second from and to its memory.
      slices: Topologies of a TPU by number of chips.
    """

    kind: str
    memory: int
    flops: float
    bandwidth: float
    slices: dict[int, str] = dataclasses.field(default_factory=dict)


_FLAT = {
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
}

DEVICES = {
    "v5e": Device("TPU v5 lite", int(15.75 * GIB), 197e12, 0.819e12, _FLAT),
    "v5p": Device("TPU v5", int(95.74 * GIB), 459e12, 2.765e12, _CUBES),
    "v6e": Device("TPU v6 lite", int(31.25 * GIB), 918e12, 1.638e12, _FLAT),
    "a100": Device("NVIDIA A100-SXM4-80GB", int(79.1 * GIB), 312e12, 2.039e12),
    "a100-40g": Device("NVIDIA A100-SXM4-40GB", int(39.4 * GIB), 312e12, 1.555e12),
    "h100": Device("NVIDIA H100 80GB HBM3", int(79.1 * GIB), 989e12, 3.35e12),
    "h200": Device("NVIDIA H200", int(139.8 * GIB), 989e12, 4.8e12),
    "l4": Device("NVIDIA L4", int(22.0 * GIB), 121e12, 0.3e12),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", int(23.5 * GIB), 165e12, 1.008e12),
}
"""Devices by the name that users give."""


def parse_device(name: str) -> tuple[str, int]:
    """Splits a name such as `v5e-8` into the device and how many of it there are.

    The number is of chips, also for v5p, whose names at Google Cloud count two cores a
    chip: `v5p-8` there is `v5p-4` here.

    Raises:
      SpecError: There is no such device, or no slice of that many.
    """
    lowered = name.lower()
    base, count = lowered, 1
    if lowered not in DEVICES and (found := re.fullmatch(r"(.+?)-(\d+)", lowered)):
        base, count = found[1], int(found[2])
    if base not in DEVICES:
        near = difflib.get_close_matches(base, DEVICES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise SpecError(
            f"device {name!r:.50}: {hint}known: {', '.join(DEVICES)}, with -N for N of "
            "them, such as v5e-8"
        )
    slices = DEVICES[base].slices
    if count < 1 or (slices and count not in (1, 2, *slices)):
        sizes = ", ".join(map(str, (1, 2, *slices))) if slices else "1 or more"
        raise SpecError(f"device {name!r:.50}: {count} of {base}; expected {sizes}")
    return base, count


def topology_devices(base: str, count: int) -> list[Any]:
    """Devices of a TPU slice that need not exist, to compile for.

    Raises:
      MissingExtraError: libtpu is not installed.
      SpecError: It knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtraError(
            f"{base}: a plan for TPUs compiles with libtpu, which is not installed; "
            "pip install 'qjax-llm[tpu]'"
        )
    from jax.experimental import topologies

    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    shape = DEVICES[base].slices[max(count, 4)]
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{base}:{shape}"
        )
    except Exception as error:  # libtpu has no error types of its own
        text = " ".join(str(error).split())[:200]
        raise SpecError(f"{base}-{count}: libtpu refuses {shape}: {text}") from None
    return list(found.devices)[:count]

"""Which devices share a fine-tuning run, and how its batches reach them.

A mesh has three axes. Rows of a batch are split over `data` and `fsdp`; over `fsdp`
also every matrix, packed or not, with its optimizer state (`qjax.train.layout`), so a
model need not fit one device; over `tensor` the heads and the hidden features of each
layer. Axes are ordered so that the busiest, `tensor`, has the nearest devices.

Reference: Zhao et al., arXiv 2304.11277 (FSDP); Shoeybi et al., arXiv 1909.08053
(tensor parallelism).
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from qjax.errors import SpecError

_log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""Axes that rows of a batch are split over."""
BATCH = PartitionSpec(None, ROWS)
"""Of the arrays `[accumulate, rows, time]` of a batch."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How many devices share what; at most one number may be -1, for the rest.

    Attributes:
      data: Groups of devices that hold the whole model and train on different rows.
      fsdp: Devices that share rows and parts of every matrix.
      tensor: Devices that share heads and hidden features of the same rows.

    Raises:
      SpecError: A number is not allowed.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name, size in self.sizes.items():
            if type(size) is not int or (size < 1 and size != -1):
                raise SpecError(
                    f"mesh: {name} is {size!r:.50}; expected a number of devices from "
                    "1 on, or -1 for the rest"
                )
        if list(self.sizes.values()).count(-1) > 1:
            raise SpecError("mesh: only one of data, fsdp and tensor can be -1")

    @property
    def sizes(self) -> dict[str, int]:
        """Number of devices by axis."""
        return {name: getattr(self, name) for name in AXES}

    def resolved(self, count: int) -> "Mesh":
        """The same for a number of devices, without -1.

        Raises:
          SpecError: There are too few devices, or -1 would leave some over.
        """
        sizes = self.sizes
        known = math.prod(size for size in sizes.values() if size != -1)
        if -1 in sizes.values():
            if count % known:
                raise SpecError(
                    f"mesh: {count} devices do not divide by {known} "
                    f"({_shown(sizes)}); change what is given"
                )
            sizes = {k: count // known if v == -1 else v for k, v in sizes.items()}
        elif known > count:
            raise SpecError(
                f"mesh: {_shown(sizes)} takes {known} devices; there are {count}"
            )
        return Mesh(**sizes)


def make_mesh(config: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns the mesh of a run.

    Its axes are automatic, whatever `jax.make_mesh` defaults to: what matters inside a
    step is written out, device by device.

    Args:
      config: How many devices share what.
      devices: By default all; a run on one host may leave some out.

    Raises:
      SpecError: There are too few devices, or a run on several hosts leaves some out.
    """
    found = jax.devices() if devices is None else list(devices)
    sizes = config.resolved(len(found)).sizes
    taken = math.prod(sizes.values())
    if taken < len(found):
        if jax.process_count() > 1:
            raise SpecError(
                f"mesh: {_shown(sizes)} takes {taken} of {len(found)} devices; with "
                f"{jax.process_count()} processes it has to take all; give -1 for one"
            )
        _log.info("mesh: %s takes %d of %d devices", _shown(sizes), taken, len(found))
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        devices=found[:taken],
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def automatic(mesh: Any) -> Any:
    """A mesh of the three axes with their types set to automatic.

    Raises:
      SpecError: It has other axes.
    """
    if tuple(mesh.axis_names) != AXES:
        raise SpecError(
            f"mesh: axes are {tuple(mesh.axis_names)}; expected {AXES}, as "
            "qjax.train.make_mesh makes them"
        )
    types = (AxisType.Auto,) * len(AXES)
    if isinstance(mesh, AbstractMesh):
        return mesh.update(axis_types=types)
    return jax.sharding.Mesh(mesh.devices, AXES, axis_types=types)


def row_parts(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[name] for name in ROWS)


def process_share(mesh: jax.sharding.Mesh | None) -> tuple[int, int]:
    """Which part of a batch's rows this process feeds, and how many parts there are.

    Processes that hold different devices of one row (`tensor` over hosts) feed the same
    rows. A single controller of many hosts feeds all.

    Args:
      mesh: Of the run; None where one device does all.

    Raises:
      SpecError: The rows of this process are not one equal share of all.
    """
    if mesh is None:
        return 0, 1
    rows = mesh.devices.reshape(row_parts(mesh), -1)
    own = jax.process_index()
    mine = [i for i, row in enumerate(rows) if any(d.process_index == own for d in row)]
    if not mine:
        raise SpecError(f"mesh: process {own} has none of its devices")
    count, rest = divmod(len(rows), len(mine))
    index, off = divmod(mine[0], len(mine))
    if rest or off or mine != list(range(mine[0], mine[0] + len(mine))):
        raise SpecError(
            f"mesh: process {own} holds parts {mine} of {len(rows)} of the rows, which "
            "is no equal share; make data * fsdp a multiple of the number of processes"
        )
    return index, count


def place_batch(
    batch: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices.

    Args:
      batch: Arrays `[accumulate, rows, time]` of the rows of `process_share`; arrays
        that lie on several devices already, and abstract ones, are taken as they are.
      mesh: Of the run.

    Returns:
      Arrays of the rows of all processes.

    Raises:
      SpecError: The rows do not divide among the devices.
    """
    sharding = NamedSharding(mesh, BATCH)

    def put(name: str, value: Any) -> Any:
        if isinstance(value, jax.ShapeDtypeStruct):
            rows = value.shape[1]
        elif isinstance(value, jax.Array) and len(value.sharding.device_set) > 1:
            return value
        else:
            value = np.asarray(value)
            rows = value.shape[1] * process_share(mesh)[1]
        if rows % row_parts(mesh):
            raise SpecError(
                f"batch: {rows} rows of {name} do not divide among the "
                f"{row_parts(mesh)} devices of data={mesh.shape['data']} * "
                f"fsdp={mesh.shape['fsdp']}; use a multiple of {row_parts(mesh)} rows"
            )
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        return jax.make_array_from_process_local_data(sharding, value)

    return {name: put(name, value) for name, value in batch.items()}


def on_one_device(tree: Any) -> Any:
    """Returns a tree with arrays that are on several devices of this host on one."""

    def put(x: Any) -> Any:
        many = isinstance(x, jax.Array) and len(x.sharding.device_set) > 1
        return jax.device_put(x, jax.local_devices()[0]) if many else x

    return jax.tree.map(put, tree)


def _shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())

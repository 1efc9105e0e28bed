"""Kernel calls in programs that run on several devices.

A compiler cannot look into a kernel, so left alone it would gather every operand. Here
each call says how it splits:

* columns of the result stay split as the columns of the weight are;
* rows of the result stay split as the rows of the activations are, over other axes;
* shards along the contracted axis are multiplied where they are and summed, provided
  that they hold whole groups and whole bytes; otherwise the weight is gathered, packed.

On a mesh with explicit axes the kernel runs under `jax.shard_map` by this rule; with
automatic axes the compiler applies it, but for TPUs, whose compiler cannot: there a
program on several devices computes by XLA what kernels compute on one.

Inside `jax.shard_map` there is nothing to split and the kernel runs on its shard. Under
`jax.vmap` the call runs once per weight or, where only activations are mapped, once on
all of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

import qjax.pallas_kernels.device as device
from qjax.pallas_kernels.alone import alone_or
from qjax.ops.blocks import same_variance
from qjax.pallas_kernels.weights import Weight, WeightSpec


def partitioned(
    call: Callable[..., Array],
    x: Float[Array, "m k"],
    weight: Weight,
    spec: WeightSpec,
    layer: Any,
    transpose: bool,
    other: Callable[..., Array] | None = None,
    extras: Sequence[Array] = (),
) -> Float[Array, "m n"]:
    """`call(x, weight, spec, layer)`, split over devices and mapped over batches.

    Args:
      call: the kernel.
      x: activations, `[m, k]` or, transposed, `[m, n]`.
      weight: its arrays, with a leading axis when there is a `layer`.
      spec: its spec; `call` gets the spec of the shard.
      layer: int32 scalar or None.
      transpose: whether `n` is the contracted axis.
      other: on platforms whose compiler cannot be told how a kernel splits: computes
        `other(x, *extras)`, the same product, in programs on several devices.
      extras: its operands.
    """
    present = {k: v for k, v in weight._asdict().items() if v is not None}
    split = _Split(call, spec, tuple(present), layer is not None, transpose, other)
    operands = [x, *present.values()] + ([] if layer is None else [layer])
    operands += extras
    y = _mapped(split)(*operands)
    return same_variance((y, *operands))[0]


@dataclasses.dataclass(frozen=True)
class _Split:
    """One kernel call: what is static about it."""

    call: Callable[..., Array]
    spec: WeightSpec
    names: tuple[str, ...]
    stacked: bool
    transpose: bool
    other: Callable[..., Array] | None = None

    @property
    def count(self) -> int:
        """Operands of the kernel; those of `other` follow."""
        return 1 + len(self.names) + self.stacked

    def local(self, spec: WeightSpec) -> Callable[..., Array]:
        """The call on operands of a (shard's) spec."""

        def run(x, *leaves):
            layer = leaves[len(self.names)] if self.stacked else None
            arrays = dict(zip(self.names, leaves, strict=False))
            return self.call(x, Weight(**arrays), spec, layer)

        return run


def _mapped(split: _Split) -> Callable[..., Array]:
    """Adds a rule for `jax.vmap`."""
    run = custom_vmap(_spread(split))

    @run.def_vmap
    def rule(size, batched, x, *leaves):  # pyright: ignore[reportUnusedFunction]
        if not any(batched[1:]):
            rows = x.reshape(-1, x.shape[-1])
            y = _mapped(split)(rows, *leaves)
            return y.reshape(size, -1, y.shape[-1]), True

        def one(i):
            at = (v[i] if b else v for v, b in zip((x, *leaves), batched, strict=True))
            return _mapped(split)(*at)

        return jax.lax.map(one, jnp.arange(size)), True

    return run


def _spread(split: _Split) -> Callable[..., Array]:
    """Adds the rule for programs on several devices."""
    kernel = split.local(split.spec)

    def run(x, *leaves):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.explicit_axes:
            return _explicit(split, mesh, (x, *leaves)[: split.count])
        if device.count() == 1 or mesh.manual_axes:
            return kernel(x, *leaves)
        if split.other is None:
            return _automatic(split)(x, *leaves)
        extras = leaves[split.count - 1 :]
        return alone_or(
            lambda x, *all: kernel(x, *all[: split.count - 1]),
            lambda x, *all: split.other(x, *all[split.count - 1 :]),  # pyright: ignore[reportOptionalCall]
            x,
            *leaves[: split.count - 1],
            *extras,
        )

    return run


def _explicit(split: _Split, mesh, operands) -> Array:
    """On a mesh whose shardings are part of types: a kernel per shard."""
    types = [jax.typeof(operand) for operand in operands]
    _, run, out, placed = _partition(split, mesh, types, None)
    moved = [
        jax.sharding.reshard(operand, place)
        for operand, place in zip(operands, placed, strict=True)
    ]
    specs = tuple(place.spec for place in placed)
    shards = jax.shard_map(run, in_specs=specs, out_specs=out.spec, check_vma=False)
    return shards(*moved)


def _automatic(split: _Split) -> Callable[..., Array]:
    """Under `jit`, where compilers choose shardings and ask how the kernel splits."""
    # jit keeps constants of the kernel to itself, which this rule cannot take.
    run = custom_partitioning(jax.jit(split.local(split.spec)))
    lead = "l " if split.stacked else ""
    k, n = ("n", "k") if split.transpose else ("k", "n")
    packed = {"codes": "p", "scale": "g", "zero": "g"}
    rules = [
        f"{lead}{packed[name]} n" if name in packed else f"{lead}t"
        for name in split.names
    ]
    # A scalar has no factors; each axis of a tensor needs one.
    operands = ", ".join([f"m {k}", *rules] + ([""] if split.stacked else []))
    rule = f"{operands} -> m {n}"
    run.def_partition(functools.partial(_partition, split), sharding_rule=rule)
    return run


def _partition(split: _Split, mesh, arguments, result):
    """Where each operand goes and what each device computes."""
    x, codes = arguments[0], arguments[1]
    rows = _axes(x, 0)
    along_k, along_n = _axes(codes, -2), _axes(codes, -1)
    parts = math.prod(mesh.shape[a] for a in along_k)
    if not _whole(split.spec, parts):
        along_k, parts = (), 1
    width = math.prod(mesh.shape[a] for a in along_n)
    if split.spec.n % width or split.spec.layout != "canonical":
        along_n, width = (), 1
    rows = tuple(a for a in rows if a not in along_k + along_n)
    local = dataclasses.replace(
        split.spec,
        k=split.spec.k // parts,
        n=split.spec.n // width,
        group=min(split.spec.group, split.spec.k // parts),
    )
    inner, outer = (along_n, along_k) if split.transpose else (along_k, along_n)
    run = split.local(local)

    def lower(*operands):
        y = run(*operands)
        if not inner:
            return y
        return jax.lax.psum(y.astype(jnp.float32), inner).astype(y.dtype)

    def place(*axes):
        return NamedSharding(mesh, PartitionSpec(*(a or None for a in axes)))

    lead = ((),) * split.stacked
    shared = split.spec.groups == 1
    where = {
        "codes": place(*lead, along_k, along_n),
        "scale": place(*lead, () if shared else along_k, along_n),
        "zero": place(*lead, () if shared else along_k, along_n),
        "table": place(*lead, ()),
    }
    placed = [place(rows, inner), *(where[name] for name in split.names)]
    placed += [place()] * split.stacked
    return mesh, lower, place(rows, outer), tuple(placed)


def _axes(argument: Any, axis: int) -> tuple[str, ...]:
    """Mesh axes that an operand's axis is split over."""
    spec = (*argument.sharding.spec, *(None,) * len(argument.shape))
    entry = spec[: len(argument.shape)][axis]
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _whole(spec: WeightSpec, parts: int) -> bool:
    """Whether shards along `k` hold whole groups and whole packing units."""
    rows, rest = divmod(spec.k, parts)
    unit = 8 // math.gcd(8, spec.bits)
    grouped = spec.groups == 1 or rows % spec.group == 0
    grouped = grouped and spec.layout == "canonical"
    return not rest and grouped and rows % unit == 0

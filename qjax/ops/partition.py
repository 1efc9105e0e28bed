"""Kernel calls in programs that run on several devices.

A compiler cannot look into a kernel, so left alone it would gather every operand. Here
each call says how it splits:

* columns of the result stay split as the columns of the weight are;
* rows of the result stay split as the rows of the activations are, over other axes;
* shards along the contracted axis are multiplied where they are and summed, provided
  that they hold whole groups and whole bytes; otherwise the weight is gathered, packed.

Rows sorted by expert are gathered, because groups are counted over all of them. Experts
that are themselves spread over devices are for `jax.shard_map`.

On a mesh with explicit axes the kernel runs under `jax.shard_map` by this rule; with
automatic axes the compiler applies it, but for TPUs, whose compiler cannot: there a
program on several devices computes by XLA what kernels compute on one (`on_one`).

Inside `jax.shard_map` there is nothing to split and the kernel runs on its shard. Under
`jax.vmap` the call runs once per weight or, where only activations are mapped and their
rows are independent, once on all of them.
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
from qjax.ops.blocks import same_variance
from qjax.pallas_kernels.alone import alone_or
from qjax.pallas_kernels.weights import Weight, WeightSpec


def on_one(
    name: str, kernel: Callable[..., Any], other: Callable[..., Any], *operands: Any
) -> Any:
    """`kernel(*operands)`, or `other` where a compiler for TPUs splits the program.

    Args:
      name: the kernel backend.
      kernel: calls `partitioned`.
      other: computes the same with operations that compilers can split.
      *operands: pytrees of arrays.
    """
    if name != "tpu" or jax.sharding.get_abstract_mesh().explicit_axes:
        return kernel(*operands)
    return alone_or(kernel, other, *operands)


def partitioned(
    call: Callable[..., Array],
    spec: WeightSpec,
    x: Float[Array, "m k"],
    plain: Sequence[Array],
    weights: Sequence[Weight],
    *,
    transpose: bool = False,
    independent: bool = True,
    linear: bool = True,
    told: bool = True,
) -> Float[Array, "m n"]:
    """`call(spec, x, *plain, *weights)`, split over devices and mapped over batches.

    Args:
      call: the kernel; gets the spec and the arrays of a shard.
      spec: the spec of the weights.
      x: activations, `[m, k]` or, transposed, `[m, n]`.
      plain: scalars and vectors that every device needs whole.
      weights: arrays of equal shapes, with or without one leading axis.
      transpose: whether `n` is the contracted axis.
      independent: whether a row of the result depends on one row of `x` only.
      linear: whether results for parts of the contracted axis add up to the result.
      told: whether the compiler can be told how the call splits.
    """
    names = tuple(n for n in Weight._fields if getattr(weights[0], n) is not None)
    split = _Split(
        call,
        spec,
        names,
        lead=weights[0].scale.ndim - 2,
        plain=tuple(p.ndim for p in plain),
        count=len(weights),
        transpose=transpose,
        independent=independent,
        linear=linear,
        told=told,
    )
    operands = [x, *plain, *(getattr(w, name) for w in weights for name in names)]
    y = _mapped(split)(*operands)
    return same_variance((y, *operands))[0]


@dataclasses.dataclass(frozen=True)
class _Split:
    """One kernel call: what is static about it; see `partitioned`.

    Attributes:
      names: leaves that a weight has.
      lead: their leading axes.
      plain: ranks of the plain operands.
      count: weights.
    """

    call: Callable[..., Array]
    spec: WeightSpec
    names: tuple[str, ...]
    lead: int
    plain: tuple[int, ...]
    count: int
    transpose: bool
    independent: bool
    linear: bool
    told: bool

    def local(self, spec: WeightSpec) -> Callable[..., Array]:
        """The call on operands of a (shard's) spec."""

        def run(x, *rest):
            plain, leaves = rest[: len(self.plain)], rest[len(self.plain) :]
            size = len(self.names)
            weights = (
                Weight(**dict(zip(self.names, leaves[i : i + size], strict=True)))
                for i in range(0, len(leaves), size)
            )
            return self.call(spec, x, *plain, *weights)

        return run


def _mapped(split: _Split) -> Callable[..., Array]:
    """Adds a rule for `jax.vmap`."""
    run = custom_vmap(_spread(split))

    @run.def_vmap
    def rule(size, batched, x, *rest):  # pyright: ignore[reportUnusedFunction]
        if split.independent and not any(batched[1:]):
            rows = x.reshape(-1, x.shape[-1])
            y = _mapped(split)(rows, *rest)
            return y.reshape(size, -1, y.shape[-1]), True

        def one(i):
            at = (v[i] if b else v for v, b in zip((x, *rest), batched, strict=True))
            return _mapped(split)(*at)

        return jax.lax.map(one, jnp.arange(size)), True

    return run


def _spread(split: _Split) -> Callable[..., Array]:
    """Adds the rule for programs on several devices."""
    kernel = split.local(split.spec)

    def run(*operands):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.explicit_axes:
            return _explicit(split, mesh, operands)
        if device.count() == 1 or mesh.manual_axes or not split.told:
            return kernel(*operands)
        return _automatic(split)(*operands)

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
    lead = "l " * split.lead
    k, n = ("n", "k") if split.transpose else ("k", "n")
    packed = {"codes": "p n", "scale": "g n", "zero": "g n", "table": "t"}
    if split.spec.layout != "canonical":  # no axis of such arrays is one of the matrix
        packed |= {"codes": "a b", "scale": "c d", "zero": "c d"}
    leaves = [lead + packed[name] for name in split.names] * split.count
    # A scalar has no factors; each axis of a tensor needs one.
    plain = [f"e{i}" if rank else "" for i, rank in enumerate(split.plain)]
    rule = f"{', '.join([f'm {k}', *plain, *leaves])} -> m {n}"
    run.def_partition(functools.partial(_partition, split), sharding_rule=rule)
    return run


def _partition(split: _Split, mesh, arguments, result):
    """Where each operand goes and what each device computes."""
    del result
    spec, codes = split.spec, arguments[1 + len(split.plain)]
    rows = split_axes(arguments[0], 0) if split.independent else ()
    along_k, along_n = (), ()
    if spec.layout == "canonical":
        along_k, along_n = split_axes(codes, -2), split_axes(codes, -1)
    parts = math.prod(mesh.shape[a] for a in along_k)
    if not split.linear or not _whole(spec, parts):
        along_k, parts = (), 1
    width = math.prod(mesh.shape[a] for a in along_n)
    if spec.n % width:
        along_n, width = (), 1
    rows = tuple(a for a in rows if a not in along_k + along_n)
    local = dataclasses.replace(
        spec,
        k=spec.k // parts,
        n=spec.n // width,
        group=min(spec.group, spec.k // parts),
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

    lead, shared = ((),) * split.lead, () if spec.groups == 1 else along_k
    where = {
        "codes": place(*lead, along_k, along_n),
        "scale": place(*lead, shared, along_n),
        "zero": place(*lead, shared, along_n),
        "table": place(*lead, ()),
    }
    placed = [place(rows, inner), *(place() for _ in split.plain)]
    placed += [where[name] for name in split.names] * split.count
    return mesh, lower, place(rows, outer), tuple(placed)


def split_axes(argument: Any, axis: int) -> tuple[str, ...]:
    """Mesh axes that an operand's axis is split over."""
    spec = (*argument.sharding.spec, *(None,) * len(argument.shape))
    return axes_of(spec[: len(argument.shape)][axis])


def axes_of(entry: Any) -> tuple[str, ...]:
    """Mesh axes that an entry of a `PartitionSpec` names."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _whole(spec: WeightSpec, parts: int) -> bool:
    """Whether shards along `k` hold whole groups and whole packing units."""
    rows, rest = divmod(spec.k, parts)
    unit = 8 // math.gcd(8, spec.bits)
    grouped = spec.groups == 1 or rows % spec.group == 0
    grouped = grouped and spec.layout == "canonical"
    return not rest and grouped and rows % unit == 0

"""Grouped products by the kernels of `qjax.pallas_kernels.grouped_matmul`.

What `qjax.ops.kernels` is to one matrix, this is to a stack of experts: whether a
kernel takes it, the call, and what kernels leave out (NVFP4's divisor and a table's
offset). Experts of one layer of a stack of layers are read where they lie.

In a program on several devices a call computes the columns that a device has; shards
along the contracted axis are summed when they hold whole groups, and rows are gathered,
because groups are counted over all of them. (The compiler for TPUs cannot be told; see
`qjax.pallas_kernels.alone`. There such a program runs the loop of `qjax.ops.windows`, unless its
mesh has explicit axes.) Experts that are themselves spread over devices are for
`jax.shard_map`, where every device calls with its own groups. Under `jax.vmap` calls
run one after the other.
"""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import qjax.pallas_kernels.device as device
from qjax.errors import SpecError
from qjax.ops import kernels, partition
from qjax.pallas_kernels.alone import alone_or
from qjax.pallas_kernels.weights import KernelError, Weight, WeightSpec
from qjax.wrappers import LayerOf

_ROOM = "qjax.pallas_kernels.grouped_matmul"


def flat(q: Any) -> tuple[Any, Any, int]:
    """The experts of a weight: `(stack with one leading axis, first expert, count)`.

    Args:
      q: a weight with a leading axis of experts, or a layer of a stack of such.

    Returns:
      The stack, where the experts begin in it (None: at 0), and how many there are.
    """
    if not isinstance(q, LayerOf):
        return q, None, q.shape[0]
    layers, experts = q.base.shape[:2]

    def join(leaf):
        return leaf.reshape(layers * experts, *leaf.shape[2:])

    first = jnp.asarray(q.layer, jnp.int32) * experts
    return jax.tree.map(join, q.base), first, experts


def obstacle(name: str, m: int, dtype: Any, q: Any, transpose: bool) -> str | None:
    """Why a kernel backend cannot compute a product, or None when it can."""
    spec = kernels.kernel_spec(_stack_of(q))
    if isinstance(spec, str):
        return spec
    try:
        module = importlib.import_module(f"{_ROOM}.{name}")
    except ModuleNotFoundError as error:
        return str(error)
    return module.obstacle(spec, m, dtype, transpose=transpose)


def fused_obstacle(gate: Any, up: Any) -> str | None:
    """Why two weights cannot be multiplied in one pass, or None when they can."""
    stacks = [_stack_of(q) for q in (gate, up)]
    if kernels.kernel_spec(stacks[0]) != kernels.kernel_spec(stacks[1]):
        return "gate and up have different formats"
    for name in ("codes", "scale", "zero"):
        kinds = [getattr(getattr(q, name, None), "dtype", None) for q in stacks]
        if kinds[0] != kinds[1]:
            return f"gate and up have different dtypes of {name}"
    if isinstance(gate, LayerOf) != isinstance(up, LayerOf):
        return "one of gate and up is a layer of a stack"
    for q in stacks:
        for name in ("global_scale", "offset"):
            if getattr(q, name, None) is not None:
                return f"a {name} applies to each product"
    return None


def _stack_of(q):
    return q.base if isinstance(q, LayerOf) else q


def run(
    name: str,
    x: Float[Array, "m k"],
    sizes: Int[Array, " e"],
    q: Any,
    transpose: bool,
    other: Callable[..., Array],
) -> Float[Array, "m n"]:
    """The grouped product by a kernel, without obstacle.

    Args:
      name: the backend.
      x: rows sorted by expert.
      sizes: rows of each expert.
      q: the weight.
      transpose: multiply by the transposes.
      other: `(x, sizes, q)` to the same product by operations that compilers can
        split over devices.

    Returns:
      The product in the dtype of `x`.

    Raises:
      SpecError: the arrays of `q` do not fit each other.
    """
    run = functools.partial(_finished, name, transpose)
    return _alone(name, run, other, x, sizes, q)


def _alone(name, run, other, *operands):
    """`run`, or on TPUs `other` where a program is split over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    inside = mesh.explicit_axes or mesh.manual_axes
    if name != "tpu" or device.count() == 1 or inside:
        return run(*operands)
    leaves, tree = jax.tree.flatten(operands)

    def flat_call(function):
        return lambda *leaves: function(*jax.tree.unflatten(tree, leaves))

    return alone_or(flat_call(run), flat_call(other), *leaves)


def _finished(name, transpose, x, sizes, q):
    """A kernel's product with what kernels leave out."""
    stack, first, experts = flat(q)
    divisor = getattr(stack, "global_scale", None)
    offset = getattr(stack, "offset", None)
    plain = divisor is None and offset is None
    y = _run(name, x, sizes, (stack,), first, transpose, None, plain)
    if plain:
        return y
    expert = jnp.minimum(_expert_of_row(x.shape[0], sizes), experts - 1)
    expert = expert if first is None else expert + first
    if divisor is not None:
        y = y / divisor[expert, 0]
    if offset is not None:
        inside = _expert_of_row(x.shape[0], sizes)[:, None] < experts
        total = jnp.sum(x.astype(jnp.float32), 1, keepdims=True) * offset[expert, 0]
        y = y + jnp.where(inside, total, jnp.zeros_like(total))
    return y.astype(x.dtype)


def run_gated(
    name: str,
    x: Float[Array, "m k"],
    sizes: Int[Array, " e"],
    gate: Any,
    up: Any,
    activation: str,
    other: Callable[..., Array],
) -> Float[Array, "m n"]:
    """The gated form by a kernel, without obstacle; `other` as for `run`."""

    def run(x, sizes, gate, up):
        first = flat(gate)[1]
        stacks = (flat(gate)[0], flat(up)[0])
        return _run(name, x, sizes, stacks, first, False, activation, True)

    return _alone(name, run, other, x, sizes, gate, up)


def _run(name, x, sizes, stacks, first, transpose, activation, plain):
    spec = kernels.kernel_spec(stacks[0])
    assert isinstance(spec, WeightSpec)  # `obstacle` was asked
    weights = [kernels.kernel_weight(stack, spec) for stack in stacks]
    names = tuple(n for n in Weight._fields if getattr(weights[0], n) is not None)
    leaves = [getattr(w, n) for w in weights for n in names]
    first = jnp.int32(0) if first is None else first
    out_dtype = x.dtype if plain else jnp.dtype(jnp.float32)
    call = _Call(name, spec, names, len(weights), transpose, activation, out_dtype)
    try:
        return _mapped(call)(x, sizes, first, *leaves)
    except KernelError as error:
        raise SpecError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class _Call:
    """One kernel call: what is static about it."""

    name: str
    spec: WeightSpec
    names: tuple[str, ...]
    count: int
    transpose: bool
    activation: str | None
    out_dtype: Any

    def local(self, spec: WeightSpec) -> Callable[..., Array]:
        """The call on operands of a (shard's) spec."""

        def run(x, sizes, first, *leaves):
            size = len(self.names)
            weights = tuple(
                Weight(**dict(zip(self.names, leaves[i : i + size], strict=True)))
                for i in range(0, self.count * size, size)
            )
            module = importlib.import_module(f"{_ROOM}.{self.name}")
            return module.matmul(
                x,
                sizes,
                weights,
                spec,
                first=first,
                out_dtype=self.out_dtype,
                transpose=self.transpose,
                activation=self.activation,
            )

        return run


def _mapped(call: _Call) -> Callable[..., Array]:
    """Adds a rule for `jax.vmap`."""
    run = custom_vmap(_spread(call))

    @run.def_vmap
    def rule(size, batched, *operands):  # pyright: ignore[reportUnusedFunction]
        def one(i):
            at = (v[i] if b else v for v, b in zip(operands, batched, strict=True))
            return _mapped(call)(*at)

        return jax.lax.map(one, jnp.arange(size)), True

    return run


def _spread(call: _Call) -> Callable[..., Array]:
    """Adds the rule for programs on several devices."""
    kernel = call.local(call.spec)

    def run(*operands):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.explicit_axes:
            return _explicit(call, mesh, operands)
        if device.count() == 1 or mesh.manual_axes or call.name == "tpu":
            return kernel(*operands)
        return _automatic(call)(*operands)

    return run


def _explicit(call: _Call, mesh, operands) -> Array:
    """On a mesh whose shardings are part of types: a kernel per shard."""
    types = [jax.typeof(operand) for operand in operands]
    _, run, out, placed = _partition(call, mesh, types, None)
    moved = [
        jax.sharding.reshard(operand, place)
        for operand, place in zip(operands, placed, strict=True)
    ]
    specs = tuple(place.spec for place in placed)
    shards = jax.shard_map(run, in_specs=specs, out_specs=out.spec, check_vma=False)
    return shards(*moved)


def _automatic(call: _Call) -> Callable[..., Array]:
    """Under `jit`, where compilers choose shardings and ask how the kernel splits."""
    # jit keeps constants of the kernel to itself, which this rule cannot take.
    run = custom_partitioning(jax.jit(call.local(call.spec)))
    k, n = ("n", "k") if call.transpose else ("k", "n")
    packed = {"codes": "l p n", "scale": "l g n", "zero": "l g n", "table": "l t"}
    if call.spec.layout != "canonical":  # no axis of such codes is one of the matrix
        packed["codes"] = "l a b"
    rules = [packed[name] for name in call.names] * call.count
    operands = ", ".join([f"m {k}", "e", "", *rules])
    run.def_partition(
        functools.partial(_partition, call), sharding_rule=f"{operands} -> m {n}"
    )
    return run


def _partition(call: _Call, mesh, arguments, result):
    """Where each operand goes and what each device computes."""
    del result
    codes, spec, rank = arguments[3], call.spec, len(arguments[3].shape)
    along_k, along_n = (), ()
    if spec.layout == "canonical":
        along_k, along_n = partition._axes(codes, -2), partition._axes(codes, -1)
    parts = math.prod(mesh.shape[a] for a in along_k)
    # Sums over shards come before an activation.
    if call.activation is not None or not partition._whole(spec, parts):
        along_k, parts = (), 1
    width = math.prod(mesh.shape[a] for a in along_n)
    if spec.n % width:
        along_n, width = (), 1
    local = dataclasses.replace(
        spec,
        k=spec.k // parts,
        n=spec.n // width,
        group=min(spec.group, spec.k // parts),
    )
    inner, outer = (along_n, along_k) if call.transpose else (along_k, along_n)
    run = call.local(local)

    def lower(*operands):
        y = run(*operands)
        if not inner:
            return y
        return jax.lax.psum(y.astype(jnp.float32), inner).astype(y.dtype)

    def place(*axes):
        return NamedSharding(mesh, PartitionSpec(*(a or None for a in axes)))

    shared = () if spec.groups == 1 else along_k
    where = {
        "codes": place(*((),) * (rank - 2), along_k, along_n),
        "scale": place((), shared, along_n),
        "zero": place((), shared, along_n),
        "table": place((), ()),
    }
    placed = [place((), inner), place(()), place()]
    placed += [where[name] for name in call.names] * call.count
    return mesh, lower, place((), outer), tuple(placed)


def _expert_of_row(rows, sizes):
    """The expert of each row; the number of experts behind all groups."""
    row = jnp.arange(rows, dtype=jnp.int32)
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    return jnp.searchsorted(ends, row, side="right").astype(jnp.int32)

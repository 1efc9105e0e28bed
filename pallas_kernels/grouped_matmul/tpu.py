"""Grouped products on TPU: the dense kernels of `..matmul.tpu` on a grid of visits.

A step multiplies one tile of rows by one block of one expert, all `k` rows of some
columns, packed as stored; decoding, scaling and the arrangement of `x` are those of the
dense kernels. Column blocks are the outer loop of the grid and visits (`specs.Visits`)
the inner one, with a dynamic bound: an expert's block comes from HBM once per column
block, experts without rows are never read, and a tile on a border of groups stays in
VMEM while its experts write their rows one after the other.

* few rows per expert (decode): products of bare codes, scaled after;
* many (prefill): an expert's block is decoded, scaled, once into a panel in VMEM for
  all of its tiles.

The gated form reads both weights in the same step and writes only `act(g) * u`. The
transposed product visits outside and contracts columns inside, into an accumulator of
all `k`; there an expert's weight is read once per tile.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import versions
from ..matmul import decode, tpu_plan, tpu_tiles
from ..matmul.specs import Config
from ..weights import Weight, WeightSpec
from . import specs
from .reference import ACTIVATIONS

__all__ = ["Config", "matmul", "obstacle"]

obstacle = specs.obstacle


def matmul(
    x: Any,
    group_sizes: Any,
    weights: tuple[Weight, ...],
    spec: WeightSpec,
    *,
    first: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
    transpose: bool = False,
    activation: str | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> Any:
    """`x W` per group, or the gated form for two weights; `api` checks the arguments.

    Args:
      x: `[m, k]` sorted by expert, or `[m, n]` when `transpose`.
      group_sizes: int32 `[experts]`.
      weights: one weight, or gate and up, with leading axes of experts.
      spec: what they mean.
      first: int32 scalar, where the experts begin in the leading axes, or None.
      bias: `[experts, n]` (`[experts, k]` when `transpose`) or None; one weight only.
      out_dtype: dtype of the result; default that of `x`.
      transpose: multiply by the transposes.
      activation: name of the gate's function, for two weights.
      config: tiles; default `specs.default`.
      interpret: parameters of the TPU interpreter, or False.

    Returns:
      `[m, n]`, or `[m, k]`.
    """
    m, experts = x.shape[0], group_sizes.shape[0]
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    config = config or specs.default(
        spec, m, experts, x.dtype, transpose=transpose, weights=len(weights)
    )
    # Operands of a bias or an activation are not rounded before it.
    inner = out_dtype if activation is None and bias is None else jnp.float32
    plan = tpu_plan.make_plan(spec, config, x, weights[0], transpose, jnp.dtype(inner))
    visits = specs.visits(group_sizes, m, config.rows)
    if first is not None:
        visits = visits._replace(expert=visits.expert + first.astype(jnp.int32))
    weights = tuple(_stored(plan, weight) for weight in weights)
    run = _transposed if transpose else _forward
    out = jnp.float32 if out_dtype == jnp.float16 else out_dtype
    call = functools.partial(_call, plan, visits, experts, out, interpret)
    return run(plan, call, x, visits, experts, weights, bias, activation).astype(
        out_dtype
    )


def _stored(plan, w):
    """The arrays as the kernels read them: bits of small floats, a wide table."""
    table = None if w.table is None else tpu_plan.split(w.table, plan.terms)
    table = decode.table_operand(plan.dec, plan.spec, plan.tiles.chip, table)
    return Weight(
        tpu_plan.code_bytes(plan, w.codes),
        tpu_plan.stored(w.scale),
        tpu_plan.stored(w.zero),
        table,
    )


def _operands(plan, weights, place):
    """Arrays of the weights and their blocks; `place` is `(expert, column block)`."""
    columns, found = plan.tiles.columns, {}

    def block(rows):
        return pl.BlockSpec(
            (None, rows, columns), lambda *grid: (place(*grid)[0], 0, place(*grid)[1])
        )

    def whole(shape, lead):
        def index(*grid):
            return place(*grid)[0] if lead else 0, 0, 0, 0

        return pl.BlockSpec((None, *shape), index)

    for i, w in enumerate(weights):
        for name in ("codes", "scale", "zero"):
            array = getattr(w, name)
            if array is not None:
                found[f"{name}{i}"] = (array, block(array.shape[1]))
        if w.table is not None:
            shared = w.table.ndim == 3  # the same for all experts
            table = w.table[None] if shared else w.table
            found[f"table{i}"] = (table, whole(table.shape[1:], not shared))
    groups = tpu_plan.blocks(plan, _one(weights[0]), lambda i, j: 0).get("groups")
    if groups is not None:
        array = groups[0]
        found["groups"] = (array, pl.BlockSpec(array.shape, lambda *grid: (0, 0)))
    return found


def _one(w):
    """A weight whose table has an axis of layers, as `tpu_plan.blocks` wants it."""
    return w._replace(table=None)


def _scratch(plan, count):
    """Scratch of each weight."""
    found = {}
    for i in range(count):
        for name, array in tpu_plan.staging(plan).items():
            found[f"{name}{i}"] = array
        if plan.tiles.prefill and not plan.transpose:
            dtype = plan.dec.dtype if plan.after else jnp.bfloat16
            shape = (plan.terms, plan.rows, plan.tiles.columns)
            found[f"panel{i}"] = pltpu.VMEM(shape, dtype)
    return found


def _own(refs, i):
    """References of weight `i` under the names that the dense kernels use."""
    shared = {"x", "sums", "groups", "mask", "sum"}
    found = {name: ref for name, ref in refs.items() if name in shared}
    return found | {n[:-1]: ref for n, ref in refs.items() if n.endswith(str(i))}


class _Visit:
    """What a step knows about its visit."""

    def __init__(self, refs, visit, experts):
        before = jnp.maximum(visit - 1, 0)
        start = visit == 0
        self.refs, self.visit = refs, visit
        self.group = refs["group"][visit]
        self.tile = refs["tile"][visit]
        self.real = self.group < experts
        self.new_tile = start | (refs["tile"][before] != self.tile)
        self.new_expert = start | (refs["expert"][before] != refs["expert"][visit])

    def store(self, y):
        """Writes the rows of the group; zeros elsewhere on a tile's first visit."""
        out = self.refs["y"]
        row = lax.broadcasted_iota(jnp.int32, out.shape, 0) + self.tile * out.shape[0]
        low, high = self.refs["start"][self.group], self.refs["end"][self.group]
        old = jnp.where(self.new_tile, jnp.zeros((), out.dtype), out[...])
        out[...] = jnp.where((row >= low) & (row < high), y.astype(out.dtype), old)


def _forward(plan, call, x, visits, experts, weights, bias, activation):
    """Grid of column blocks by visits."""
    spec, tiles, m = plan.spec, plan.tiles, x.shape[0]
    left, sums = tpu_plan.arranged(plan, x)
    m_tiles, n_tiles = -(-m // tiles.rows), -(-spec.n // tiles.columns)

    def row_tile(i, j, group, expert, tile, *_):
        return tile[j], 0

    inputs = {
        "x": (left, pl.BlockSpec((left.shape[0] // m_tiles, plan.rows), row_tile)),
        **_operands(plan, weights, lambda i, j, group, expert, *_: (expert[j], i)),
    }
    if sums is not None:
        inputs["sums"] = (sums, pl.BlockSpec((tiles.rows, spec.groups), row_tile))
    if bias is not None:

        def own(i, j, group, *_):
            return jnp.minimum(group[j], experts - 1), 0, i

        block = pl.BlockSpec((None, 1, tiles.columns), own)
        inputs["bias"] = (bias.astype(jnp.float32)[:, None], block)
    output = pl.BlockSpec(
        (tiles.rows, tiles.columns), lambda i, j, group, expert, tile, *_: (tile[j], i)
    )
    kernel = functools.partial(_forward_kernel, plan, experts, activation, len(weights))
    y = call(
        kernel,
        (n_tiles, visits.count),
        inputs,
        ((m_tiles * tiles.rows, spec.n), output),
        _scratch(plan, len(weights)),
    )
    return y[:m]


def _forward_kernel(plan, experts, activation, count, names, *arrays):
    refs = dict(zip(names, arrays, strict=True))
    visit = _Visit(refs, pl.program_id(1), experts)
    own = [_own(refs, i) for i in range(count)]

    @pl.when(jnp.logical_not(visit.real))
    def _rest():
        visit.store(jnp.zeros(refs["y"].shape, jnp.float32))

    if plan.tiles.prefill:

        @pl.when(visit.real & visit.new_expert)
        def _fill():
            for mine in own:
                _fill_panel(plan, dict(mine))

    @pl.when(visit.real)
    def _multiply():
        y = [_product(plan, mine) for mine in own]
        total = y[0] if activation is None else ACTIVATIONS[activation](y[0]) * y[1]
        if "bias" in refs:
            total = total + refs["bias"][...]
        visit.store(total)


def _fill_panel(plan, refs):
    """Decodes a block of an expert for all of its tiles."""
    tpu_tiles.stage(plan, refs)
    for r in range(plan.regions):
        lines = slice(r * plan.region, (r + 1) * plan.region)
        if not plan.after:
            refs["panel"][0, lines, :] = tpu_tiles.weight(plan, refs, r)
            continue
        for term in range(plan.terms):
            refs["panel"][term, lines, :] = tpu_tiles.decoded(plan, refs, r, term)


def _product(plan, refs):
    """A tile times a block."""
    if not plan.tiles.prefill:
        tpu_tiles.stage(plan, refs)
        operand = functools.partial(tpu_tiles.decoded, plan, refs)
        return tpu_tiles.accumulate(plan, refs, operand)
    if not plan.after:
        return tpu_tiles.dot(refs["x"][...], refs["panel"][0])
    for name, staged in zip(("scale", "zero"), plan.stages, strict=True):
        refs[name] = refs["staged_" + name] if staged else refs.get(name)

    def panel(r, term):
        return refs["panel"][term, r * plan.region : (r + 1) * plan.region, :]

    return tpu_tiles.accumulate(plan, refs, panel)


def _transposed(plan, call, x, visits, experts, weights, bias, activation):
    """Grid of visits by column blocks, which are contracted."""
    del activation
    spec, tiles, m = plan.spec, plan.tiles, x.shape[0]
    m_tiles, n_tiles = -(-m // tiles.rows), -(-spec.n // tiles.columns)
    x = x.astype(jnp.bfloat16 if plan.parts == 1 else jnp.float32)
    grow = (m_tiles * tiles.rows - m, n_tiles * tiles.columns - spec.n)
    x = jnp.pad(x, ((0, grow[0]), (0, grow[1])))

    def column(j, i, group):
        # Rows behind all groups multiply nothing: stay on the block at hand.
        return jnp.where(group[j] < experts, i, n_tiles - 1)

    inputs = {
        "x": (
            x,
            pl.BlockSpec(
                (tiles.rows, tiles.columns),
                lambda j, i, group, expert, tile, *_: (tile[j], column(j, i, group)),
            ),
        ),
        **_operands(
            plan,
            weights,
            lambda j, i, group, expert, *_: (expert[j], column(j, i, group)),
        ),
    }
    order = plan.dec.order(plan.region)
    if plan.per > 1 and plan.after:
        mask = np.arange(-(-plan.per // 8) * 8)[:, None] == order // spec.group
        array = jnp.asarray(mask, jnp.float32)
        inputs["mask"] = (array, pl.BlockSpec(mask.shape, lambda *grid: (0, 0)))
    scratch = _scratch(plan, 1)
    scratch["sum"] = pltpu.VMEM((tiles.rows, plan.rows), jnp.float32)
    output = pl.BlockSpec(
        (tiles.rows, plan.rows), lambda j, i, group, expert, tile, *_: (tile[j], 0)
    )
    y = call(
        functools.partial(_transposed_kernel, plan, experts),
        (visits.count, n_tiles),
        inputs,
        ((m_tiles * tiles.rows, plan.rows), output),
        scratch,
    )[:m]
    if not plan.dec.natural:
        y = y.reshape(m, plan.regions, plan.region)[:, :, np.argsort(order)]
        y = y.reshape(m, plan.rows)
    y = y[:, : spec.k]
    if bias is None:
        return y
    ends = visits.end[:-1]
    row = jnp.arange(m, dtype=jnp.int32)
    expert = jnp.searchsorted(ends, row, side="right")
    bias = jnp.take(bias.astype(jnp.float32), expert, axis=0, mode="fill", fill_value=0)
    return y.astype(jnp.float32) + bias


def _transposed_kernel(plan, experts, names, *arrays):
    refs = dict(zip(names, arrays, strict=True))
    visit, step = _Visit(refs, pl.program_id(0), experts), pl.program_id(1)

    @pl.when(step == 0)
    def _clear():
        refs["sum"][...] = jnp.zeros_like(refs["sum"])

    @pl.when(visit.real)
    def _add():
        own = _own(refs, 0)
        tpu_tiles.stage(plan, own)
        left = None
        for r in range(plan.regions):
            first = tpu_tiles.group_of(plan, r)
            lines = slice(r * plan.region, (r + 1) * plan.region)
            if not plan.after:
                weight = tpu_tiles.clean(plan, tpu_tiles.weight(plan, own, r))
                part = tpu_tiles.dot(own["x"][...], weight, ((1,), (1,)))
            else:
                same = r and plan.per == 1 and first == tpu_tiles.group_of(plan, r - 1)
                if not same:
                    left = tpu_tiles.scaled_left(plan, own, first)
                assert left is not None  # the first region made it
                part = tpu_tiles.transposed_part(plan, own, r, *left)
            own["sum"][:, lines] += part

    @pl.when(step == pl.num_programs(1) - 1)
    def _write():
        visit.store(refs["sum"][...])


def _call(plan, visits, experts, out, interpret, kernel, grid, inputs, output, scratch):
    """The pallas_call: references reach the kernel by name."""
    shape, block = output
    prefetched = ("group", "expert", "tile", "start", "end")
    names = (*prefetched, *inputs, "y", *scratch)
    semantics = ("arbitrary", "arbitrary")
    if not plan.transpose:
        semantics = ("parallel", "arbitrary")
    gated = "codes1" in inputs
    turned = "-transposed" if plan.transpose else ""
    what = "gate-up" if gated else "matmul"
    return pl.pallas_call(
        functools.partial(kernel, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=grid,
            in_specs=[block for _, block in inputs.values()],
            out_specs=block,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=versions.result(shape, out, *[a for a, _ in inputs.values()]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=plan.tiles.vmem
        ),
        cost_estimate=_cost(plan, inputs, experts, shape, out, 1 + gated),
        name=f"grouped-{what}-{plan.spec.kind}{plan.spec.bits}{turned}",
        interpret=interpret,
    )(*visits[:5], *[array for array, _ in inputs.values()])


def _cost(plan, inputs, experts, shape, out, count):
    """As if every expert had rows, or as many as there are rows."""
    m, spec = shape[0], plan.spec
    sizes = {name: a.size * a.dtype.itemsize for name, (a, _) in inputs.items()}
    stack = inputs["codes0"][0].shape[0]
    packed = sum(v for k, v in sizes.items() if k[:-1] in ("codes", "scale", "zero"))
    moved = packed // stack * min(m, experts)
    moved += sizes["x"] + shape[0] * shape[1] * jnp.dtype(out).itemsize
    flops = 2 * m * spec.k * spec.n * count * plan.parts
    gelu = m * spec.n if count > 1 else 0
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=gelu)

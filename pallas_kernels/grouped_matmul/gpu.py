"""Grouped products on Hopper GPUs: the dense kernel's tiles, experts picked per tile.

Rows are first moved apart so that every window of `Config.tokens` rows has one expert
(`specs.Windows`). Persistent blocks of threads then walk the tiles (window, columns)
with windows varying fastest, so that windows of one expert find its weight in the
second-level cache; how a tile is copied, decoded and multiplied is that of
`..matmul.gpu`. Only windows that exist are walked: experts without rows are not read.

The gated form computes the tile of the gate and that of the other factor one after the
other and keeps the first in registers, so that `act(g) * u` is all that is written.

Costs: a copy of `x` in its places, at most `m + min(m, experts) * tokens` rows, and the
result in places, gathered back. Tables are laid out again for every tile, as experts
may differ. Refused: float32 `x`, besides what the dense kernel refuses.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from ..matmul import gpu_layout, gpu_plan, gpu_specs, gpu_tiles
from ..matmul.gpu_specs import Config
from ..weights import Weight, WeightSpec
from . import specs
from .reference import ACTIVATIONS

__all__ = ["Config", "default", "matmul", "obstacle"]


def obstacle(
    spec: WeightSpec, m: int, x_dtype: Any, *, transpose: bool = False
) -> str | None:
    """Why the Hopper kernel cannot compute a product, or None when it can.

    Args:
      spec: the weight.
      m: rows of the activations.
      x_dtype: their dtype.
      transpose: whether the product is with the transposes.

    Returns:
      The reason, in words, or None.
    """
    if jnp.dtype(x_dtype) == jnp.float32:
        return "x is float32; bfloat16 and float16 are done"
    return gpu_specs.obstacle(spec, m, x_dtype, transpose=transpose)


def default(
    spec: WeightSpec,
    m: int,
    experts: int,
    x_dtype: Any,
    *,
    transpose: bool = False,
    weights: int = 1,
) -> Config:
    """Tiles: those of the dense kernel for the mean group; not measured.

    Args:
      spec: the weight.
      m: rows of the activations.
      experts: number of experts.
      x_dtype: dtype of the activations.
      transpose: whether the product is with the transposes.
      weights: matrices per expert: 2 for the gated form.

    Returns:
      The tiles.
    """
    mean = -(-m // experts)
    tokens = next((t for t in (8, 16, 32, 64, 128) if mean <= t), 128)
    found = gpu_specs.default(spec, tokens, x_dtype, x_dtype, transpose)
    # Whole tiles through shared memory need 64 rows; narrower ones are written plainly.
    tokens = min(found.tokens, 64 if weights > 1 else 128)
    found = dataclasses.replace(found, tokens=tokens, split=tokens < 64, stages=1)
    tiles = min(m, experts) * (spec.k if transpose else spec.n) // 256
    if tiles < 2 * found.blocks and not transpose:
        found = dataclasses.replace(found, warpgroups=2)
    fixed = gpu_specs.fixed_bytes(spec, found, transpose) + 4096
    stage = gpu_specs.stage_bytes(spec, found, transpose)
    stages = (gpu_specs.SHARED_BYTES - fixed) // stage
    return dataclasses.replace(found, stages=min(stages, 8))


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
      weights: one weight, or gate and up, of `..matmul.gpu_layout.prepack`.
      spec: what they mean.
      first: int32 scalar, where the experts begin in the leading axes, or None.
      bias: `[experts, n]` (`[experts, k]` when `transpose`) or None; one weight only.
      out_dtype: dtype of the result; default that of `x`.
      transpose: multiply by the transposes.
      activation: name of the gate's function, for two weights.
      config: tiles; default `default`.
      interpret: parameters of the GPU interpreter, or False.

    Returns:
      `[m, n]`, or `[m, k]`.
    """
    m, experts = x.shape[0], group_sizes.shape[0]
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if activation not in (None, *_GATES):
        parts = [
            matmul(
                x,
                group_sizes,
                (weight,),
                spec,
                first=first,
                out_dtype=jnp.float32,
                config=config,
                interpret=interpret,
            )
            for weight in weights
        ]
        return (ACTIVATIONS[activation](parts[0]) * parts[1]).astype(out_dtype)
    config = config or default(
        spec, m, experts, x.dtype, transpose=transpose, weights=len(weights)
    )
    if out_dtype.itemsize > 2:
        config = dataclasses.replace(config, split=True)
    where = specs.windows(group_sizes, m, config.tokens)
    count = where.expert.shape[0]
    parts = jnp.take(x, where.source, axis=0)
    plan = gpu_plan.make_plan(spec, parts, weights[0], config, out_dtype, transpose)
    parts = jnp.pad(parts, ((0, 0), (0, plan.inner - parts.shape[1])))
    expert = where.expert if first is None else where.expert + first.astype(jnp.int32)
    operands = [parts]
    for w in weights:
        operands += [gpu_layout.words(w), gpu_layout.scales(w)]
        operands += [w.zero] if plan.zero else []
        if spec.kind == "table":
            operands.append(hopper.table_pairs(w.table, x.dtype))
    call: Any = _call(plan, len(weights), count, activation, interpret)
    y = call(expert, where.count, *operands)
    columns = spec.k if transpose else spec.n
    if config.split:
        y = y[where.place // config.tokens, :, where.place % config.tokens]
    else:
        y = y[where.place]
    y = y[:, :columns]
    row = jnp.arange(m, dtype=jnp.int32)
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    if bias is not None:
        owner = jnp.searchsorted(ends, row, side="right")
        y = y.astype(jnp.float32) + jnp.take(bias, owner, axis=0, mode="clip").astype(
            jnp.float32
        )
    inside = (row < ends[-1])[:, None]
    return jnp.where(inside, y.astype(out_dtype), jnp.zeros((), out_dtype))


def _silu(x):
    return x / (jnp.float32(1) + jnp.exp(-x))


def _gelu_tanh(x):
    inner = jnp.float32(0.7978845608028654) * (x + jnp.float32(0.044715) * x * x * x)
    return jnp.float32(0.5) * x * (jnp.float32(1) + jnp.tanh(inner))


_GATES = {
    "silu": _silu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: jnp.maximum(x, jnp.float32(0)),
}
"""Activations that the kernel computes in registers."""


def _call(plan, weights, windows, activation, interpret):
    """The kernel, a function of experts, their number, `x` and the weights' arrays."""
    config, spec = plan.config, plan.spec
    x_type = jnp.dtype(plan.dtype)
    bits, blocks = gpu_layout.codec(spec).bits, config.rows // 64
    shape = (1, config.warpgroups * bits)
    if not plan.transpose:
        shape = (config.warpgroups, blocks * bits)
    scale_type = jnp.dtype(plan.scale_dtype)
    if scale_type == jnp.float8_e4m3fn:
        scale_type = jnp.dtype(jnp.uint8)
    stages = config.stages
    stats = (stages, plan.pieces, plan.lanes)
    scratch = dict(
        x_smem=hopper.tile((config.tokens, config.rows), x_type, stages),
        codes_smem=plgpu.SMEM((stages, *shape, 128), jnp.int32),
        scale_smem=plgpu.SMEM(stats, scale_type),
        full=plgpu.Barrier(num_arrivals=3 + bool(plan.zero), num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=stages),
    )
    if plan.zero:
        scratch["zero_smem"] = plgpu.SMEM(stats, jnp.dtype(plan.zero))
    if spec.kind == "table":
        scratch["table_smem"] = plgpu.SMEM((256, 32), jnp.int32)
        scratch["table_ready"] = plgpu.Barrier(num_arrivals=1)
        scratch["table_free"] = plgpu.Barrier(num_arrivals=config.warpgroups)
    if plan.transpose or config.smem_operand:
        scratch["operand"] = hopper.tile((64, 64), x_type, config.warpgroups)
    if not config.split:
        out_type = jnp.dtype(plan.out_dtype)
        scratch["out_smem"] = hopper.out_tiles(config.warpgroups, out_type)
    rows: int = windows * config.tokens
    out = jax.ShapeDtypeStruct((rows, plan.outer), jnp.dtype(plan.out_dtype))
    if config.split:
        shape = (windows, plan.outer, config.tokens)
        out = jax.ShapeDtypeStruct(shape, jnp.float32)
    packed = spec.k * spec.n * bits // 8
    packed += spec.groups * spec.n * scale_type.itemsize
    cost = pl.CostEstimate(
        flops=2 * rows * spec.k * spec.n * weights,
        bytes_accessed=windows * packed * weights + rows * (spec.k + spec.n) * 2,
        transcendentals=rows * spec.n * (weights - 1),
    )
    names = ["codes", "scale"] + ["zero"] * bool(plan.zero)
    names += ["table"] * (spec.kind == "table")
    return hopper.kernel(
        functools.partial(
            _body, plan, tuple(names), weights, activation, interpret is not False
        ),
        out_type=out,
        scratch=scratch,
        grid=config.blocks,
        threads=config.warpgroups + 1,
        name="grouped_hopper",
        cost=cost,
        interpret=interpret,
    )


def _body(
    plan, names, weights, activation, interpret, expert, count, x, *refs, **scratch
):
    *refs, out = refs
    size = len(names)
    stored = [
        dict(zip(names, refs[i * size : (i + 1) * size], strict=True))
        for i in range(weights)
    ]
    warpgroup, block = lax.axis_index("wg"), lax.axis_index("cta")
    total = count[0]
    tiles = total * (plan.outer // plan.width)
    own = lax.div(tiles - block + plan.config.blocks - 1, plan.config.blocks)

    def place(turn):
        """Window, its expert, and column tile of one of this block's tiles."""
        tile = block + turn * plan.config.blocks
        column = lax.div(tile, total)
        window = tile - column * total
        return window, expert[window], column

    @pl.when(warpgroup == plan.config.warpgroups)
    def _copies():
        plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")
        _copy(plan, own, place, x, stored, scratch)

    @pl.when(warpgroup < plan.config.warpgroups)
    def _computes():
        plgpu.set_max_registers(
            hopper.registers(plan.config.warpgroups), action="increase"
        )
        if plan.spec.kind == "int":
            scratch["magic"] = hopper.magic_word(plan.decode, interpret=interpret)
        _compute(
            plan, own, place, warpgroup, stored, activation, out, scratch, interpret
        )


def _copy(plan, own, place, x, stored, scratch):
    """The warpgroup that copies: stages of all tiles, one weight after the other."""
    config, steps = plan.config, plan.steps
    bits = gpu_layout.codec(plan.spec).bits

    def tile(turn, _):
        window, expert, outer = place(turn)
        for i, weight in enumerate(stored):

            def step(inner, _, i=i, weight=weight):
                number = (turn * len(stored) + i) * steps + inner
                slot = lax.rem(number, config.stages)

                @pl.when(number >= config.stages)
                def _wait():
                    plgpu.barrier_wait(scratch["free"].at[slot])

                full = scratch["full"].at[slot]
                if plan.transpose:
                    column, row = inner, outer * config.warpgroups
                    count, run = 1, config.warpgroups * bits
                else:
                    column = outer * config.warpgroups
                    row = inner * (config.rows // 64)
                    count, run = config.warpgroups, config.rows // 64 * bits
                plgpu.copy_gmem_to_smem(
                    weight["codes"].at[
                        expert, pl.ds(column, count), pl.ds(row * bits, run)
                    ],
                    scratch["codes_smem"].at[slot],
                    full,
                )
                tokens = pl.ds(window * config.tokens, config.tokens)
                plgpu.copy_gmem_to_smem(
                    x.at[tokens, pl.ds(inner * config.rows, config.rows)],
                    scratch["x_smem"].at[slot],
                    full,
                )
                piece = 0 if plan.single else lax.div(row * 64, plan.spec.group)
                lanes = pl.ds(column * 64, plan.lanes)
                for name in ("scale", "zero"):
                    if name in weight:
                        plgpu.copy_gmem_to_smem(
                            weight[name].at[expert, pl.ds(piece, plan.pieces), lanes],
                            scratch[name + "_smem"].at[slot],
                            full,
                        )

            lax.fori_loop(0, steps, step, None)

    lax.fori_loop(0, own, tile, None)


def _compute(plan, own, place, warpgroup, stored, activation, out, scratch, interpret):
    """A warpgroup that multiplies: 64 columns of tile after tile."""
    config, steps = plan.config, plan.steps

    def tile(turn, _):
        window, expert, outer = place(turn)
        column = outer * plan.width + warpgroup * 64
        results = []
        for i, weight in enumerate(stored):
            start = (turn * len(stored) + i) * steps
            if "table" in weight:
                _refill(weight["table"].at[expert], warpgroup, scratch, interpret)
            total = gpu_tiles.tile_sum(
                plan, interpret, warpgroup, start, start + steps, 0, scratch
            )
            if plan.mode == "end":
                stats = [weight["scale"].at[expert]]
                stats.append(weight["zero"].at[expert] if "zero" in weight else None)
                total = gpu_tiles.scaled_total(
                    plan, total, (None, None, *stats), column
                )
            results.append(total[0])
        y = results[0]
        if activation is not None:
            y = _GATES[activation](results[0]) * results[1]
        if config.split:
            out[window, pl.ds(column, 64), :] = y
        else:
            gpu_tiles.write(plan, warpgroup, y, None, out, column, window, scratch)

    lax.fori_loop(0, own, tile, None)
    if not config.split:
        plgpu.wait_smem_to_gmem(0)


def _refill(source, warpgroup, scratch, interpret):
    """Lays the table of an expert out once all warpgroups are done with the last."""
    plgpu.barrier_arrive(scratch["table_free"])

    @pl.when(warpgroup == 0)
    def _fill():
        plgpu.barrier_wait(scratch["table_free"])
        hopper.fill_table(source, scratch["table_smem"], interpret=interpret)
        plgpu.barrier_arrive(scratch["table_ready"])

    plgpu.barrier_wait(scratch["table_ready"])

"""Calling Hopper kernels: warpgroups with roles, a ring of stages, tiles of memory."""

import dataclasses
import functools
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import versions


def kernel(body, *, out_type, scratch, grid, threads, name, cost, interpret=False):
    """A Mosaic GPU kernel on a one-dimensional grid ("cta") of warpgroups ("wg").

    Args:
      body: `body(*inputs, *outputs, **scratch)`.
      out_type: shapes of the outputs.
      scratch: allocations by name, shared by the warpgroups of a block.
      grid: number of blocks.
      threads: warpgroups per block.
      name: name of the kernel.
      cost: a `pl.CostEstimate`.
      interpret: False, or parameters of the GPU interpreter.

    Returns:
      A function of the inputs.
    """
    mesh = plgpu.Mesh(
        grid=(grid,), grid_names=("cta",), num_threads=threads, thread_name="wg"
    )

    def scoped(*refs):
        pl.run_scoped(functools.partial(body, *refs), collective_axes="wg", **scratch)

    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    return pl.kernel(
        scoped,
        out_type=out_type,
        mesh=mesh,
        compiler_params=params,
        interpret=interpret,
        cost_estimate=cost,
        name=name,
    )


MEMORY_REGISTERS = 40
"""Registers per thread of a warpgroup that only copies."""


def registers(warpgroups: int) -> int:
    """Registers per thread of each compute warpgroup beside one that copies.

    A block starts with as many registers per thread as fit, in steps of 8, and cannot
    have more in total afterwards: one that asks for more waits for ever.
    """
    count = warpgroups + 1
    total = min(65536 // (128 * count), 248) // 8 * 8 * count
    return min(232, (total - MEMORY_REGISTERS) // warpgroups // 8 * 8)


def roles(warpgroups, copy, compute):
    """The body of a kernel whose last warpgroup copies while the others compute.

    Args:
      warpgroups: how many compute.
      copy: `copy(block)`, run by one warpgroup.
      compute: `compute(block, warpgroup)`, run by each of the others.
    """
    warpgroup, block = lax.axis_index("wg"), lax.axis_index("cta")

    @pl.when(warpgroup == warpgroups)
    def _copies():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        copy(block)

    @pl.when(warpgroup < warpgroups)
    def _computes():
        plgpu.set_max_registers(registers(warpgroups), action="increase")
        compute(block, warpgroup)


def barriers(loads, warpgroups, stages):
    """Scratch that a `Ring` needs: a stage is full after `loads` copies."""
    return {
        "full": plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }


@dataclasses.dataclass(frozen=True)
class Ring:
    """Stages of shared memory that one warpgroup fills and the others empty.

    Attributes:
      scratch: what the kernel allocated, `barriers` among it.
      stages: how many.
      first: the first step, which has the first stage.
    """

    scratch: dict[str, Any]
    stages: int
    first: Any

    def slot(self, step):
        """The stage of a step."""
        return lax.rem(step - self.first, self.stages)

    def fill(self, last, copy):
        """Runs `copy(step, slot, full)` for all steps, as their stages become free."""

        def body(step, _):
            slot = self.slot(step)

            @pl.when(step - self.first >= self.stages)
            def _wait():
                plgpu.barrier_wait(self.scratch["free"].at[slot])

            copy(step, slot, self.scratch["full"].at[slot])

        lax.fori_loop(self.first, last, body, None)

    def enter(self, step):
        """The stage of a step, once it is full."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.scratch["full"].at[slot])
        return slot

    def leave(self, slot):
        """A warpgroup is done with a stage."""
        plgpu.barrier_arrive(self.scratch["free"].at[slot])


def transpose(ref):
    """The transpose of a matrix reference."""
    return versions.transpose_ref(ref)


def swizzle(dtype, size=128):
    """Layout of shared memory in which 8 rows of `size` bytes are swizzled."""
    tiling: Any = plgpu.TilingTransform  # types of jax 0.12 call both abstract
    swizzled: Any = plgpu.SwizzleTransform
    return tiling((8, size // dtype.itemsize)), swizzled(size)


def tile(shape, dtype, stages=None):
    """Shared memory for operands of `wgmma`, swizzled by 128 bytes."""
    lead = () if stages is None else (stages,)
    return plgpu.SMEM((*lead, *shape), dtype, transforms=swizzle(dtype))


def out_tiles(warpgroups, dtype):
    """Shared memory that `write_turned` goes through."""
    return tile((2, 64, 64), dtype, warpgroups)


def write_turned(total, places, warpgroup, out, row_tile, column):
    """Writes a tile transposed, through shared memory, 64 rows of the result at a time.

    Args:
      total: `[64, tokens]` in registers, in the dtype of `out`.
      places: reference to `out_tiles`.
      warpgroup: whose.
      out: reference `[rows, columns]` in global memory.
      row_tile: which `tokens` rows.
      column: the first of 64 columns.
    """
    tokens = total.shape[1]
    for part in range(tokens // 64):
        place = places.at[warpgroup, part % 2]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        piece = total[:, part * 64 : (part + 1) * 64]
        turned = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
        transpose(place)[...] = turned
        plgpu.commit_smem()
        rows = pl.ds(row_tile * tokens + part * 64, 64)
        plgpu.copy_smem_to_gmem(place, out.at[rows, pl.ds(column, 64)])

"""Qronos: error feedback that also corrects what earlier layers got wrong.

With inputs `r` in the original model and `x` in the model quantized so far, the output
to keep is `r w`. Its best continuous approximation under `x` is

    u = (x^T x + lambda I)^-1 (x^T r + lambda I) w,

and rounding with error feedback then starts from `u`: each row is set to the least
squares solution given the rows before it. As in the paper the first row is an
exception: it is solved for while the others still have their original values.

Reference: Zhang et al., Qronos: Correcting the Past by Shaping the Future in
Post-Training Quantization, arXiv 2505.11695, algorithm 1 and theorem 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.methods.gptq import DriftGPTQ, feedback_name
from qjax.methods.hessian import Curvature, damped


@dataclasses.dataclass(frozen=True)
class Qronos(DriftGPTQ):
    """Error feedback towards the outputs of the original model; fields as `GPTQ`.

    Needs the inputs of the original model besides those of the quantized one
    (`Statistics.cross`). Where both agree it is GPTQ.
    """

    @property
    def name(self) -> str:
        """`qronos`, or `qronos-act-order` and so on."""
        return feedback_name("qronos", self)

    def corrected(self, h: Any, cross: Any, shared: Curvature) -> Curvature:
        """The factored Hessian and the map to the corrected weight."""
        return _corrected(h, cross, shared, damp=self.damp)


@functools.partial(jax.jit, static_argnames="damp")
def _corrected(h, cross, shared: Curvature, *, damp: float) -> Curvature:
    size = h.shape[0]
    index = jnp.arange(size)
    order = index if shared.order is None else shared.order
    diagonal = jnp.diagonal(damped(h, damp, shared.retries))
    drift = cross.T - h  # x^T (r - x)
    right = drift[order]
    solved = solve_factor(shared, right)
    transform = solved.at[index, order].add(1.0)  # H + drift + lambda I on the right
    first = right[0] / diagonal[order[0]]
    first = first.at[order[0]].add(1.0)
    return dataclasses.replace(shared, transform=transform, first=first)


def solve_factor(
    shared: Curvature, right: Float[Array, "in n"]
) -> Float[Array, "in n"]:
    """`(M D M^T)^-1 right`, rows in the order of rounding."""
    solve = functools.partial(
        jax.lax.linalg.triangular_solve, shared.m, left_side=True, lower=False
    )
    inner = solve(right) / shared.d[:, None]
    return solve(inner, transpose_a=True)

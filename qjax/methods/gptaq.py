"""GPTAQ: GPTQ with asymmetric calibration, rows behind absorb the drift of inputs.

With inputs `r` in the original model and `x` in the one quantized so far, each rounded
row `i` with value `t_i` also adds `t_i P_ij` to the rows `j` behind it, where

    P = alpha * triu((r - x)^T x U^T, 1) U,    U^T U = (H + lambda I)^-1.

With `H = M D M^T`, `Q = alpha * triu((r - x)^T x M^-T, 1) D^-1` and `P = Q M^-1` this
is plain error feedback on `(I - P)^-T w` under the factor `(I - P) M (I - Q)^-1`.

Reference: Li et al., GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
Calibration, arXiv 2504.02692, algorithm 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import SpecError
from qjax.methods.gptq import DriftGPTQ, feedback_name
from qjax.methods.hessian import Curvature


@dataclasses.dataclass(frozen=True)
class GPTAQ(DriftGPTQ):
    """Error feedback with the drift of earlier layers; other fields as `GPTQ`.

    Attributes:
      alpha: strength of the correction, in [0, 1]; 0 is GPTQ.

    Raises:
      SpecError: a field is out of range.
    """

    alpha: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise SpecError(f"GPTAQ: alpha is {self.alpha!r}, expected 0 to 1")

    @property
    def name(self) -> str:
        """`gptaq`, or `gptaq-act-order` and so on."""
        return feedback_name("gptaq", self)

    def corrected(self, h: Any, cross: Any, shared: Curvature) -> Curvature:
        """The factor that includes the drift, and the weight it starts from."""
        return _drifted(h, cross, shared, alpha=self.alpha)


@functools.partial(jax.jit, static_argnames="alpha")
def _drifted(h, cross, shared: Curvature, *, alpha: float) -> Curvature:
    m, order = shared.m, shared.order
    drift = cross - h  # (r - x)^T x
    if order is not None:
        drift = drift[order[:, None], order[None, :]]
    solve = functools.partial(jax.lax.linalg.triangular_solve, lower=False)
    # drift M^-T, its part above the diagonal, over D by columns.
    q = alpha * jnp.triu(solve(m, drift, transpose_a=True), 1) / shared.d[None, :]
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    left = m - q  # (I - P) M
    factor = solve(eye - q, left)
    start = solve(left, m.T, left_side=True, transpose_a=True)
    if order is not None:
        start = start[:, jnp.argsort(order)]
    return dataclasses.replace(shared, m=factor, transform=start)

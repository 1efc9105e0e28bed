"""What to do with a weight that calibration says too little about.

A Hessian of fewer tokens than inputs is singular, and error feedback fits those tokens
at the cost of all others. `choose` is the one place that decides on it: experts that no
token, or few, were routed to are rounded by `RTN("mse")`, and the reason is reported.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.formats import Additive, Format, KMeans, Trellis
from qjax.methods.base import Method, needs_of, uses_of
from qjax.methods.rtn import RTN
from qjax.methods.statistics import Statistics

TOKENS_PER_INPUT = 1
"""Calibration tokens for every input of a layer below which a Hessian is not used.

Measured on the bundled model, 12 kernels of 256 and 768 inputs at 3 and 4 bits: the
output error of `GPTQ` on other tokens over that of `RTN("mse")`, as a median, with
`minmax` and with `hessian` ranges:

    tokens / inputs   1/128  1/32   1/8    1/2    1      2
    minmax            1.22   1.32   1.52   1.68   1.33   0.91
    hessian           1.05   1.12   1.30   1.34   1.06   0.72

It is worst (up to 3) with half as many tokens as inputs; ten times the damping makes it
less bad and not good. Methods that use sums per feature alone need no more than one.
"""


class Choice(NamedTuple):
    """How a weight is quantized after a look at its statistics.

    Attributes:
      method: the method.
      statistics: what to give it; None when it takes none.
      reason: why it is not what was asked for, for reports; empty when it is.
    """

    method: Method
    statistics: Statistics | None
    reason: str


def choose(method: Method, fmt: Format, statistics: Statistics | None) -> Choice:
    """The method, or another one where there are too few tokens; not for `jit`.

    Args:
      method: what the recipe names.
      fmt: the number format.
      statistics: of the inputs of one matrix; None without calibration.
    """
    uses = uses_of(method)
    if statistics is None or not uses:
        return Choice(method, None, "")
    count, features = int(statistics.count), statistics.total.shape[-1]
    moments = statistics.hessian is not None and uses & {"hessian", "cross"}
    if count >= features * TOKENS_PER_INPUT or (count and not moments):
        return Choice(method, statistics, "")
    seen = f"{count} calibration token{'s' * (count > 1)} for {features} inputs"
    why = seen if count else "no calibration token reached it"
    if count and "square" in uses and not needs_of(method):
        reason = f"{why}; {method.name} with the mean squares of inputs alone"
        return Choice(method, dataclasses.replace(statistics, hessian=None), reason)
    if not needs_of(method):
        return Choice(method, None, f"{why}; {method.name} without them instead")
    if isinstance(fmt, Additive | KMeans | Trellis):
        reason = f"{why}; {method.name} with equal inputs instead"
        return Choice(method, equal_inputs(statistics), reason)
    plain = RTN("mse")
    return Choice(plain, None, f"{why}; {plain.name} instead")


def equal_inputs(statistics: Statistics) -> Statistics:
    """The same fields, of inputs that are uncorrelated and all of one size."""
    features = statistics.total.shape[-1]
    ones = jax.tree.map(jnp.ones_like, statistics)
    eye = jnp.eye(features, dtype=jnp.float32)
    return dataclasses.replace(
        ones,
        count=jnp.asarray(features, jnp.float32),
        total=jnp.zeros_like(ones.total),
        hessian=None if ones.hessian is None else eye,
        cross=None if ones.cross is None else eye,
    )

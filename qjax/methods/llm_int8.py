"""LLM.int8(): outlier features in 16 bits, everything else vector-wise in 8.

A few features of large models carry activations of a magnitude that would ruin an 8-bit
scale. The features whose calibration peak reaches the threshold keep their weights as
floats; the others are rounded, one scale per output:

    y = sum_{i in O} x_i w_i  +  s_x s_w sum_{i not in O} round(x_i / s_x) c_i.

With `qjax.ops.matmul(x, q, activation="int8")` the second sum is an 8-bit product whose
row scale `s_x` does not see the outliers; without it, activations stay floats.

Outliers come from calibration. The published kernel finds them in every batch instead,
which needs shapes that depend on data and cannot be compiled; a feature that first
exceeds the threshold after calibration is rounded like any other (nothing overflows:
the scale of its row grows). The paper finds that outlier features are few, systematic
and shared by all tokens. Other differences from bitsandbytes: outlier rows take no part
in the weight's scales, and keep their float value instead of a decoded 8-bit one; the
8-bit step is `absmax / 127.5` where bitsandbytes has `absmax / 127`.

Reference: Dettmers et al., LLM.int8(), arXiv 2208.07339; bitsandbytes 0.49
`backends/default/ops.py` (threshold 6.0 is the default of transformers).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.formats.base import FLOAT_SCALES, check_choice
from qjax.methods.awq import check_inner
from qjax.methods.base import Method
from qjax.methods.change import drop_inputs
from qjax.methods.rtn import RTN
from qjax.methods.statistics import Statistics
from qjax.tensor import QuantizedTensor
from qjax.wrappers import SplitInputs


class Outliers(NamedTuple):
    """What weights with one input share: outlier features, and the inner part."""

    index: Int[Array, " n"]
    inner: Any


def trim(q: QuantizedTensor) -> QuantizedTensor:
    """Removes the slots of a `SplitInputs` that hold no outlier; not under `jit`.

    Args:
      q: any tensor; without leading axes if slots are to be removed.

    Returns:
      The same weight; the base alone if no slot is used.
    """
    if not isinstance(q, SplitInputs) or q.index.ndim != 1:
        return q
    used = np.flatnonzero(np.asarray(q.index) < q.matrix[0])
    if not used.size:
        return q.base
    return dataclasses.replace(q, rows=q.rows[used], index=q.index[used])


@dataclasses.dataclass(frozen=True)
class LLMInt8(Method):
    """Keeps the rows of outlier features as floats, around another method.

    The number of outliers is a shape. `prepare` outside `jit` counts them, rounds the
    count up to a power of two (so that layers agree in structure and can be scanned)
    and leaves the tensor unwrapped when there are none. Inside `jit` there are
    `ceil(most * in)` slots, of which those above the threshold are used; `prepare`
    never takes more either, and `trim` removes the others afterwards.

    Attributes:
      threshold: peak `|x|` from which on a feature is an outlier.
      most: largest share of features that are kept, in (0, 1]; the ones with the
        largest peaks.
      inner: rounds the rest.
      dtype: of the kept rows.

    Raises:
      SpecError: a field is out of range.

    Example:
      >>> method = LLMInt8()
      >>> shared = method.prepare([w], Int(8, "channel"), statistics)
      >>> q = quantize(w, Int(8, "channel"), method, statistics=statistics,
      ...              shared=shared)
      >>> y = qjax.matmul(x, q, activation="int8")
    """

    needs = frozenset({"square"})
    eager = True  # the number of outliers is a shape

    threshold: float = 6.0
    most: float = 0.01
    inner: Method = dataclasses.field(default_factory=RTN)
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_inner("LLMInt8", self.inner)
        check_choice("LLMInt8", "dtype", self.dtype, FLOAT_SCALES)
        if not (self.threshold > 0 and 0 < self.most <= 1):
            raise SpecError(
                "LLMInt8: needs threshold > 0 and 0 < most <= 1; got "
                f"threshold={self.threshold}, most={self.most}"
            )

    @property
    def name(self) -> str:
        """`llm-int8`, or `llm-int8-gptq` and so on."""
        plain = self.inner == RTN()
        return "llm-int8" if plain else f"llm-int8-{self.inner.name}"

    def __call__(
        self,
        w: Float[Array, "in out"],
        fmt: Format,
        *,
        importance: Float[Array, "..."] | None = None,
        key: Array | None = None,
        statistics: Statistics | None = None,
        shared: Any = None,
    ) -> QuantizedTensor:
        """See `Method.__call__`; returns `SplitInputs`, or the base without outliers.

        Raises:
          SpecError: there are no statistics: outliers cannot be found while the model
            runs, because their number would be a shape that depends on data.
        """
        known = self.check_statistics(statistics)
        if shared is None:
            shared = self._shared([w], fmt, known, self.find(known, jit=True))
        index = shared.index
        w = w.astype(jnp.float32)
        top = float(jnp.finfo(self.dtype).max)
        rows = jnp.take(w, index, axis=0, mode="fill", fill_value=0)
        rows = jnp.clip(rows, -top, top).astype(self.dtype)
        base = self.inner(
            w.at[index].set(0.0, mode="drop"),
            fmt,
            importance=importance,
            key=key,
            statistics=drop_inputs(known, index),
            shared=shared.inner,
        )
        return SplitInputs(base, rows, index) if index.size else base

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Outliers:
        """Finds the outliers of the input; counts them when not traced."""
        known = self.check_statistics(statistics)
        traced = isinstance(known.peak, Tracer)
        return self._shared(weights, fmt, known, self.find(known, jit=traced))

    def find(self, statistics: Statistics, *, jit: bool) -> Int[Array, " n"]:
        """Outlier features in order; slots that are not used hold `in`.

        Args:
          statistics: of the input.
          jit: give the shape that does not depend on the peaks.
        """
        peak = statistics.peak
        features = peak.shape[0]
        slots = math.ceil(self.most * features)
        if not jit:
            count = int(np.sum(np.asarray(peak) >= self.threshold))
            slots = min(slots, 2 ** (count - 1).bit_length() if count else 0)
        size, index = jax.lax.top_k(peak, slots)
        index = jnp.where(size >= self.threshold, index, features)
        return jnp.sort(index.astype(jnp.int32))

    def _shared(self, weights, fmt, statistics, index) -> Outliers:
        rest = [w.astype(jnp.float32).at[index].set(0.0, mode="drop") for w in weights]
        inner = self.inner.prepare(rest, fmt, drop_inputs(statistics, index))
        return Outliers(index, inner)

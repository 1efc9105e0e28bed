"""Activations in 8 bits: a weight whose products round what they multiply it by.

The weight is quantized by another method; the result is `RoundedInputs`, whose products
round every row of activations to a scale of its own, `y = round(x) W`, or all of them
to one static scale. With `Int(8)` weights this is W8A8, with `Int(4)` W4A8;
equalization or outlier decomposition goes outside or inside of it, as `SmoothQuant` and
`LLMInt8` do.

Reference: Xiao et al., SmoothQuant, arXiv 2211.10438 (per-token dynamic quantization).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.formats import Format
from qjax.formats.base import check_choice
from qjax.methods.base import Method, needs_of
from qjax.methods.rtn import RTN
from qjax.methods.statistics import Statistics
from qjax.tensor import QuantizedTensor
from qjax.wrappers import ACTIVATIONS, RoundedInputs


@dataclasses.dataclass(frozen=True)
class RoundInputs(Method):
    """Another method, for products with rounded activations.

    Attributes:
      inner: quantizes the weight.
      activation: `int8` or `float8_e4m3fn`.
      static: one scale that covers the greatest activation of the calibration text,
        instead of one per row; `qjax.calibration.static_inputs` offers other rules.

    Raises:
      SpecError: a field is out of range.
    """

    inner: Method = dataclasses.field(default_factory=RTN)
    activation: str = "int8"
    static: bool = False

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner method's, and sums per feature for a static scale."""
        own = frozenset({"square"}) if self.static else frozenset()
        return needs_of(self.inner) | own

    def __post_init__(self) -> None:
        check_choice("RoundInputs", "activation", self.activation, tuple(ACTIVATIONS))

    @property
    def name(self) -> str:
        """Name of the inner method and what activations become."""
        kind = self.activation.partition("_")[0]
        return f"{self.inner.name}-a-{kind}{'-static' if self.static else ''}"

    def __call__(
        self,
        w: Float[Array, "*lead in out"],
        fmt: Format,
        *,
        importance: Float[Array, "..."] | None = None,
        key: Array | None = None,
        statistics: Statistics | None = None,
        shared: Any = None,
    ) -> QuantizedTensor:
        """See `Method.__call__`."""
        base = self.inner(
            w,
            fmt,
            importance=importance,
            key=key,
            statistics=statistics,
            shared=shared,
        )
        scale = None
        if self.static:
            peak = jnp.max(self.check_statistics(statistics).peak)
            scale = jnp.where(peak > 0, peak / ACTIVATIONS[self.activation], 1.0)
        return RoundedInputs(base, self.activation, scale)

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Any:
        """What the inner method shares."""
        return self.inner.prepare(weights, fmt, statistics)

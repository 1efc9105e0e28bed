"""Activations in 8 bits: a weight whose products round what they multiply it by.

The weight is quantized by another method; the result is `RoundedInputs`, whose products
round every row of activations to a scale of its own, `y = round(x) W`. With `Int(8)`
weights this is W8A8, with `Int(4)` W4A8; equalization or outlier decomposition goes
outside or inside of it, as `SmoothQuant` and `LLMInt8` do.

Reference: Xiao et al., SmoothQuant, arXiv 2211.10438 (per-token dynamic quantization).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float

from qjax.formats import Format
from qjax.formats.base import check_choice
from qjax.methods.base import Method
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

    Raises:
      SpecError: a field is out of range.
    """

    inner: Method = dataclasses.field(default_factory=RTN)
    activation: str = "int8"

    def __post_init__(self) -> None:
        check_choice("RoundInputs", "activation", self.activation, ACTIVATIONS)

    @property
    def name(self) -> str:
        """Name of the inner method and what activations become."""
        return f"{self.inner.name}-a-{self.activation.partition('_')[0]}"

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
        return RoundedInputs(base, self.activation)

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Any:
        """What the inner method shares."""
        return self.inner.prepare(weights, fmt, statistics)

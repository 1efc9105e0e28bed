"""What a method is: hyper-parameters and one pure function from weight to tensor."""

import abc
import dataclasses
from typing import Any

from jaxtyping import Array, Float

from qjax.formats import Format
from qjax.formats.base import Described, build_described
from qjax.tensor import QuantizedTensor

_REGISTRY: dict[str, type["Method"]] = {}


@dataclasses.dataclass(frozen=True)
class Method(Described, abc.ABC):
    """Chooses scales and codes: frozen, hashable, static in jit.

    Calling a method is a pure function of arrays: it runs under `jit` and is batched
    over the leading axes of the weight.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _REGISTRY[cls.__name__] = cls

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short name used in reports."""

    @abc.abstractmethod
    def __call__(
        self,
        w: Float[Array, "*lead in out"],
        fmt: Format,
        *,
        importance: Float[Array, "..."] | None = None,
        key: Array | None = None,
    ) -> QuantizedTensor:
        """Quantizes a finite weight.

        Args:
          w: weight, float32, bfloat16 or float16, treated as its float32 value.
          fmt: the number format.
          importance: non-negative weights of the squared error, broadcastable to `w`
            (for example `[in, 1]`: mean squared activation per input).
          key: random key, for stochastic methods.

        Returns:
          The quantized tensor, logical dtype float32.

        Raises:
          SpecError: the method does not apply to the format.
        """


def method_from_dict(spec: dict[str, Any]) -> Method:
    """Builds a method from `Method.to_dict()` output.

    Raises:
      SpecError: the kind or a field is unknown, or a value is out of range.
    """
    return build_described("method", _REGISTRY, spec)

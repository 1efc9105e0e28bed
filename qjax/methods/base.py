"""What a method is: hyper-parameters and one pure function from weight to tensor."""

import abc
import dataclasses
from typing import Any

from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.tensor import QuantizedTensor

_REGISTRY: dict[str, type["Method"]] = {}


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
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
        """Quantizes a finite float32 weight.

        Args:
          w: weight, float32.
          fmt: the number format.
          importance: non-negative weights of the squared error, broadcastable to `w`
            (for example `[in, 1]`: mean squared activation per input).
          key: random key, for stochastic methods.

        Returns:
          The quantized tensor, logical dtype float32.

        Raises:
          SpecError: the method does not apply to the format.
        """

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description; `method_from_dict` is the inverse."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"kind": type(self).__name__, **fields}


def method_from_dict(spec: dict[str, Any]) -> Method:
    """Builds a method from `Method.to_dict()` output.

    Raises:
      SpecError: the kind or a field is unknown, or a value is out of range.
    """
    fields = dict(spec)
    kind = fields.pop("kind", None)
    cls = _REGISTRY.get(kind) if isinstance(kind, str) else None
    if cls is None:
        known = ", ".join(sorted(_REGISTRY))
        raise SpecError(f"method: unknown kind {kind!r}; known kinds: {known}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise SpecError(f"method {kind}: {error}") from None

"""What a method is: hyper-parameters and one pure function from weight to tensor."""

import abc
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.formats.base import Described, build_described
from qjax.methods.statistics import Statistics
from qjax.tensor import QuantizedTensor

_REGISTRY: dict[str, type["Method"]] = {}


@dataclasses.dataclass(frozen=True)
class Method(Described, abc.ABC):
    """Chooses scales and codes: frozen, hashable, static in jit.

    Calling a method is a pure function of arrays: it runs under `jit`. Methods without
    `needs` are batched over the leading axes of the weight; the others take one matrix.

    A method that starts from another (a rotation, a search of input scales) holds it in
    a field and returns a wrapper around what that one returns.

    Attributes:
      needs: fields of `Statistics` without which the method cannot run: any of
        `"square"` (which stands for all sums per feature), `"hessian"`, `"cross"` and
        `"gradient"`.
      eager: `prepare` reads values, so it runs outside of `jit`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    eager: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _REGISTRY[cls.__name__] = cls

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short name used in reports."""

    @property
    def uses(self) -> frozenset[str]:
        """Fields that make it better where there is calibration, and are not needed."""
        return frozenset()

    @abc.abstractmethod
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
        """Quantizes a finite weight.

        Args:
          w: weight, float32, bfloat16 or float16, treated as its float32 value.
          fmt: the number format.
          importance: non-negative weights of the squared error, broadcastable to `w`
            (for example `[in, 1]`: mean squared activation per input).
          key: random key, for stochastic methods.
          statistics: of the weight's inputs, for methods with `needs`.
          shared: what `prepare` returned for these inputs; computed here when None.

        Returns:
          The quantized tensor, logical dtype float32.

        Raises:
          SpecError: the method does not apply to the format, or `statistics` lacks a
            field that it needs.
        """

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Any:
        """What the weights with one common input share, such as query, key and value.

        A factorization of the Hessian is computed once this way, and a search of input
        scales finds scales that suit all of them, which a norm can then absorb.

        Args:
          weights: all weights that multiply the input.
          fmt: the number format.
          statistics: of the input.

        Returns:
          A pytree for `shared=`, or None when nothing is shared.
        """
        del weights, fmt, statistics

    def check_statistics(self, statistics: Statistics | None) -> Statistics:
        """Returns `statistics`, which hold all fields that the method needs.

        Raises:
          SpecError: there are none, or a field is missing.
        """
        missing = sorted(
            field for field in self.needs if getattr(statistics, field, None) is None
        )
        if statistics is None or missing:
            raise SpecError(
                f"{self.name}: needs statistics of the weight's inputs "
                f"({', '.join(missing)}); pass calibration= when quantizing a model, "
                "or statistics= when quantizing an array"
            )
        return statistics


def needs_of(method: Method) -> frozenset[str]:
    """Fields of `Statistics` that a method and the methods inside it need."""
    return frozenset().union(*(m.needs for m in nested(method)))


def uses_of(method: Method) -> frozenset[str]:
    """Fields that they need or are better with."""
    return frozenset().union(*(m.needs | m.uses for m in nested(method)))


def nested(method: Method) -> Iterator[Method]:
    """A method and those inside it, from the outside in."""
    yield method
    for field in dataclasses.fields(method):
        if isinstance(inner := getattr(method, field.name), Method):
            yield from nested(inner)


def prepare(
    method: Method,
    fmt: Format,
    weights: Sequence[Float[Array, "in _"]],
    statistics: Statistics | None,
) -> Any:
    """`Method.prepare`, compiled once per method, format and shapes."""
    if any(m.eager for m in nested(method)):
        return method.prepare(weights, fmt, statistics)
    return _prepare(method, fmt, tuple(weights), statistics)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prepare(method, fmt, weights, statistics):
    return method.prepare(weights, fmt, statistics)


def method_from_dict(spec: dict[str, Any]) -> Method:
    """Builds a method from `Method.to_dict()` output.

    Raises:
      SpecError: the kind or a field is unknown, or a value is out of range.
    """
    built = {
        key: method_from_dict(value) if isinstance(value, dict) else value
        for key, value in spec.items()
    }
    return build_described("method", _REGISTRY, built)

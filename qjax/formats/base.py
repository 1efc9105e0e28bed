"""The contract every number format keeps.

A format says what stored codes mean; it never chooses scales. Its core is a pair of
pure functions on arrays: `encode(u)`, the nearest code of real numbers `u` measured in
units of the scale, and `decode(codes)`, its inverse. Which weights share a scale is the
format's `grouping`; which scale they get is a method's choice (`qjax.methods`).
"""

import abc
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from qjax.errors import SpecError
from qjax.formats.grouping import Grouping

FLOAT_SCALES = ("float32", "bfloat16", "float16")
_T = TypeVar("_T")
_REGISTRY: dict[str, type["Format"]] = {}


class Described:
    """A dataclass of plain values that a JSON object describes."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description: `{"kind": class name, field: value, ...}`."""
        own: Any = self
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(own)}
        plain = {
            name: value.to_dict() if isinstance(value, Described) else value
            for name, value in fields.items()
        }
        return {"kind": type(self).__name__, **plain}


def build_described(
    what: str, registry: Mapping[str, type[_T]], spec: Mapping[str, Any]
) -> _T:
    """Builds one of the classes of a registry from `Described.to_dict()` output.

    Args:
      what: what errors call it.
      registry: classes by name.
      spec: the description; lists become tuples.

    Returns:
      The instance.

    Raises:
      SpecError: the kind or a field is unknown, or a value is out of range.
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()}
    kind = fields.pop("kind", None)
    concrete = {n: c for n, c in registry.items() if not inspect.isabstract(c)}
    cls = concrete.get(kind) if isinstance(kind, str) else None
    if cls is None:
        known = ", ".join(sorted(concrete))
        raise SpecError(f"{what}: unknown kind {kind!r}; known kinds: {known}")
    known_fields = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    if unknown := sorted(set(fields) - known_fields):
        raise SpecError(
            f"{what} {kind}: unknown fields {unknown}; known: {sorted(known_fields)}"
        )
    try:
        return cls(**fields)
    except TypeError as error:
        raise SpecError(f"{what} {kind} {fields}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Format(Described, abc.ABC):
    """A number format for weights `[..., in, out]`: frozen, hashable, static in jit.

    A stored weight is `decode(code) * scale` (affine formats: `(code - zero) * scale`),
    computed in float32.
    """

    code_bits: ClassVar[int] = 8
    """Bits that one code occupies in its leaf (8: one array element per code)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _REGISTRY[cls.__name__] = cls

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short name used in reports, for example `int4-g128`."""

    @property
    @abc.abstractmethod
    def peak(self) -> float:
        """Largest magnitude in units of the scale: `scale = absmax / peak`."""

    @abc.abstractmethod
    def grouping(self, matrix: tuple[int, int]) -> Grouping:
        """Which weights of an `(in, out)` matrix share a scale.

        Raises:
          SpecError: the format cannot hold a matrix of this shape.
        """

    @abc.abstractmethod
    def encode(self, u: Float[Array, "..."]) -> Shaped[Array, "..."]:
        """Nearest codes of real numbers in units of the scale."""

    @abc.abstractmethod
    def decode(self, codes: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """Real numbers of codes, float32, in units of the scale."""

    @abc.abstractmethod
    def neighbour(
        self, codes: Shaped[Array, "..."], up: Shaped[Array, "..."]
    ) -> Shaped[Array, "..."]:
        """The next code above (`up`) or below, clipped to the range."""

    def encode_stochastic(
        self, u: Float[Array, "..."], key: Array
    ) -> Shaped[Array, "..."]:
        """Rounds to one of the two codes around `u`, unbiased inside the range.

        The upper code is chosen with probability `(u - low) / (high - low)`.

        Args:
          u: real numbers in units of the scale.
          key: a JAX random key.

        Returns:
          Codes as `encode` gives them; equal keys give equal codes.
        """
        near = self.encode(u)
        value = self.decode(near)
        other = self.neighbour(near, u > value)
        step = self.decode(other) - value
        odds = jnp.where(step == 0, 0.0, (u - value) / jnp.where(step == 0, 1.0, step))
        return jnp.where(jax.random.uniform(key, u.shape) < odds, other, near)


def format_from_dict(spec: dict[str, Any]) -> Format:
    """Builds a format from `Format.to_dict()` output.

    Args:
      spec: `{"kind": class name, field: value, ...}`.

    Returns:
      The format.

    Raises:
      SpecError: the kind or a field is unknown, or a value is out of range.
    """
    return build_described("format", _REGISTRY, spec)


def rounded(product: Float[Array, "..."]) -> Float[Array, "..."]:
    """A product rounded to float32 before anything is added to it.

    XLA's CPU backend contracts `a * b + c` to one operation with one rounding, so that
    results depend on what is compiled together. The (vacuous) clip stands between.

    Args:
      product: a float32 product.

    Returns:
      The same finite values.
    """
    top = float(jnp.finfo(product.dtype).max)
    return jnp.clip(product, -top, top)


def divided(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """The quotient `x / y`, correctly rounded.

    XLA rewrites division by a broadcast value to multiplication by its reciprocal,
    which rounds twice. A divisor that depends on `x` is not a broadcast.

    Args:
      x: finite dividend.
      y: divisor, broadcastable to `x`.

    Returns:
      `x / y`.
    """
    return x / jnp.where(x == x, y, 1.0)


def check_choice(where: str, name: str, got: Any, allowed: tuple) -> None:
    """Raises SpecError unless `got` is one of `allowed`."""
    kinds = {type(choice) for choice in allowed}  # 4.0 and True equal numbers
    if got not in allowed or (isinstance(got, bool | float) and type(got) not in kinds):
        choices = ", ".join(map(repr, allowed))
        raise SpecError(f"{where}: {name} is {got!r:.200}, expected one of {choices}")


def check_matrix(where: str, matrix: tuple[int, int], size: int, axis: int) -> None:
    """Raises SpecError when a group is larger than the axis it runs along."""
    if size > matrix[axis] > 0:
        label = ("in", "out")[axis]
        raise SpecError(
            f"{where}: group of {size} is larger than the {label} axis of a matrix "
            f"[in={matrix[0]}, out={matrix[1]}]; use a group of at most "
            f"{matrix[axis]}, or group='channel'"
        )

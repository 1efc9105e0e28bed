"""Dataclasses of settings from JSON and back.

Objects become dataclasses by the types of their fields, lists become tuples. Unknown
keys are refused with the names they resemble, values of the wrong type with the type
they should have, each by its path, such as `lora.rank`.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.recipes import Recipe, load_recipe, recipe_from_dict

_T = TypeVar("_T")
Hints = Mapping[type, Mapping[str, Any]]
_NONE: Hints = {}


def plain(value: Any) -> Any:
    """Returns the JSON form of a dataclass of settings; `build` is the inverse."""
    if isinstance(value, Recipe | Format):
        return load_recipe(value).to_dict()
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in _fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [*map(plain, value)] if isinstance(value, tuple | list) else value


def _fields(cls: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


def build(
    cls: type[_T], spec: Any, where: str, path: str = "", hints: Hints = _NONE
) -> _T:
    """Builds a dataclass from a JSON object.

    Args:
      cls: The dataclass.
      spec: The object; what it leaves out has its default.
      where: What errors call the source.
      path: Where it lies in the source, with a dot behind; empty for the root.
      hints: Types of fields whose annotations leave them open, by class.

    Raises:
      SpecError: A key is unknown or missing, or a value is not allowed.
    """
    at = f"{where}: {path.rstrip('.')}" if path else where
    if not isinstance(spec, Mapping):
        raise SpecError(f"{at}: expected an object, got {spec!r:.80}")
    fields = {field.name: field for field in _fields(cls)}
    for name in spec:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise SpecError(
                f"{where}: unknown key {path}{name!s:.80}; {hint}known: "
                f"{', '.join(fields)}"
            )
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in spec:
            raise SpecError(f"{where}: {path}{name} is missing")
    types_of = {**typing.get_type_hints(cls), **hints.get(cls, {})}
    values = {
        name: _value(types_of[name], value, where, f"{path}{name}", hints)
        for name, value in spec.items()
    }
    try:
        return cls(**values)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str, path: str, hints: Hints) -> Any:
    """A JSON value as its field holds it: objects as dataclasses, lists as tuples."""
    kinds: tuple[Any, ...] = _kinds(hint)
    for kind in kinds:
        if isinstance(value, Mapping) and kind is Recipe:
            return recipe_from_dict(value, f"{where}: {path}")
        if dataclasses.is_dataclass(kind) and kind is not Recipe:
            if value is not None:
                cls: Any = kind
                return build(cls, value, where, f"{path}.", hints)
    if isinstance(value, list):
        value = tuple(value)
    if type(value) is int and int not in kinds and float in kinds:
        value = float(value)
    if not _any(hint, value):
        raise SpecError(
            f"{where}: {path} is {value!r:.80}; expected "
            f"{' or '.join(map(_words, kinds))}"
        )
    return value


def _kinds(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(k for part in typing.get_args(hint) for k in _kinds(part))
    return (hint,)


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value has a type; one of `Any` and of what is not known here does."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is float:
        return type(value) in (int, float)
    if kind in (int, bool, str):
        return type(value) is kind
    if kind is type(None):
        return value is None
    if origin is typing.Literal:
        return value in inside
    if origin is tuple:
        return isinstance(value, tuple) and all(_any(inside[0], v) for v in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _any(inside[1], v) for v in value.values()
        )
    return kind is Any


def _any(hint: Any, value: Any) -> bool:
    return any(_fits(kind, value) for kind in _kinds(hint))


def _words(kind: Any) -> str:
    """A type in words."""
    known = {int: "an integer", float: "a number", str: "a string", bool: "a boolean"}
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    tuples = typing.get_origin(kind) is tuple
    return known.get(kind, "a list" if tuples else "an object")

"""Typed, range-checked access to one `config.json` dict.

Decides how a configuration value is checked: every read names its keys, type and range,
and a bad value raises one `SpecError` that says key, value and expectation. Nothing is
coerced: `"12"` is not 12, `true` is not 1. Values are only read, never executed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.errors import SpecError

REQUIRED: Any = object()
"""Default of a key that must be present."""


class ConfigReader:
    """Reads keys of one dict; the first of several names that is present counts.

    Args:
        data: The parsed JSON object.
        where: What to call it in messages.
    """

    def __init__(self, data: Mapping[str, Any], where: str = "config.json"):
        if not isinstance(data, Mapping):
            raise SpecError(f"{where}: expected a JSON object, got {_show(data)}")
        self.data = data
        self.where = where

    def integer(
        self,
        *keys: str,
        low: int = 1,
        high: int = 2**31 - 1,
        default: Any = REQUIRED,
        null: Any = REQUIRED,
    ) -> Any:
        """Returns an integer in [low, high]; `null` replaces a JSON null."""
        expected = f"an integer from {low} to {high}"
        key, value = self._find(keys, default, null, expected)
        if key is None:
            return value
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise self.bad(key, value, expected)
        return value

    def number(
        self,
        *keys: str,
        low: float = 0.0,
        high: float = 1e30,
        default: Any = REQUIRED,
        null: Any = REQUIRED,
    ) -> Any:
        """Returns a finite float in (low, high]; `null` replaces a JSON null."""
        expected = f"a number above {low:g} and at most {high:g}"
        key, value = self._find(keys, default, null, expected)
        if key is None:
            return value
        if not _is_number(value) or not low < value <= high:
            raise self.bad(key, value, expected)
        return float(value)

    def flag(self, *keys: str, default: bool, null: Any = REQUIRED) -> bool:
        """Returns a boolean."""
        key, value = self._find(keys, default, null, "true or false")
        if key is not None and not isinstance(value, bool):
            raise self.bad(key, value, "true or false")
        return value

    def text(self, *keys: str, default: Any = REQUIRED, null: Any = REQUIRED) -> Any:
        """Returns a string."""
        key, value = self._find(keys, default, null, "a string")
        if key is not None and not isinstance(value, str):
            raise self.bad(key, value, "a string")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Returns a list of `count` positive finite numbers."""
        expected = f"a list of {count} positive numbers"
        _, value = self._find((key,), REQUIRED, REQUIRED, expected)
        good = isinstance(value, list | tuple) and len(value) == count
        if not good or not all(_is_number(v) and v > 0 for v in value):
            raise self.bad(key, value, expected)
        return tuple(float(v) for v in value)

    def texts(self, key: str, count: int, choices: Sequence[str]) -> Any:
        """Returns a list of `count` strings out of `choices`; None when absent."""
        expected = f"a list of {count} strings, each one of {', '.join(choices)}"
        found, value = self._find((key,), None, None, expected)
        if found is None:
            return None
        good = isinstance(value, list | tuple) and len(value) == count
        if not good or any(v not in choices for v in value):
            raise self.bad(key, value, expected)
        return tuple(value)

    def table(self, *keys: str) -> "ConfigReader | None":
        """Returns a reader of a nested object; None when absent, null or empty."""
        key, value = self._find(keys, None, None, "an object")
        if key is None:
            return None
        if not isinstance(value, Mapping):
            raise self.bad(key, value, "an object")
        return ConfigReader(value, f"{self.where}: {key}") if value else None

    def bad(self, key: str, value: Any, expected: str) -> SpecError:
        """Returns the error that `key` has an unfit value."""
        return SpecError(
            f"{self.where}: key {key!r} is {_show(value)}; expected {expected}"
        )

    def _find(
        self, keys: Sequence[str], default: Any, null: Any, expected: str
    ) -> tuple[str | None, Any]:
        for key in keys:
            if key not in self.data:
                continue
            value = self.data[key]
            if value is not None:
                return key, value
            if null is not REQUIRED:
                return None, null
            if default is None:
                return None, None
            raise self.bad(key, value, expected)
        if default is REQUIRED:
            names = " or ".join(repr(key) for key in keys)
            raise SpecError(
                f"{self.where}: key {names} is missing; expected {expected}"
            )
        return None, default


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _show(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return f"{text} ({type(value).__name__})"

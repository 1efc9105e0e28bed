"""Settings that differ from layer to layer."""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from qjax.converters.checks import fits, pattern
from qjax.errors import FormatError

MAX_PATTERNS = 10_000
_T = TypeVar("_T")


def layer_name(where: str) -> str:
    """The layer in what errors call it, `"DIR: NAME"`."""
    return where.rpartition(": ")[2]


def object_of(settings: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object among settings, empty where it is missing.

    Raises:
      FormatError: it is something else.
    """
    found = settings.get(key) or {}
    if not isinstance(found, Mapping):
        raise FormatError(f"{where}: {key} is {found!r:.200}, expected an object")
    return found


def usual(facts: Iterable[_T]) -> _T:
    """The most frequent of some facts; of several, the one that came first."""
    return collections.Counter(facts).most_common(1)[0][0]


class Overrides:
    """Settings of a checkpoint, and of the layers that differ.

    Args:
      whole: settings of layers without their own.
      own: `(pattern, settings)`, the first that matches counts.
    """

    def __init__(
        self,
        whole: Mapping[str, Any],
        own: list[tuple[re.Pattern[str], Mapping[str, Any]]],
    ):
        self.whole, self._own = dict(whole), own

    @classmethod
    def of_gptq(cls, settings: Mapping[str, Any], where: str) -> "Overrides":
        """From GPTQModel's `dynamic`: patterns, after `+:` or nothing; `-:` skips."""
        own = []
        for text, changes in _items(settings, "dynamic", where):
            if not text.startswith("-:"):
                found = pattern(text.removeprefix("+:"), f"{where}: dynamic")
                own.append((found, changes))
        return cls(settings, own)

    @classmethod
    def of_auto_round(cls, settings: Mapping[str, Any], where: str) -> "Overrides":
        """From AutoRound's `extra_config`: names, or patterns."""
        own = []
        for text, changes in _items(settings, "extra_config", where):
            regular = set(text) & set("*+?^$[](){}|\\")
            exact = text if regular else re.escape(text) + "$"
            own.append((pattern(exact, f"{where}: extra_config"), changes))
        return cls(settings, own)

    def of(self, name: str) -> dict[str, Any]:
        """Settings of a layer."""
        for found, changes in self._own:
            if fits(found, name):
                return {**self.whole, **changes}
        return self.whole


def _items(settings, key: str, where: str):
    found = object_of(settings, key, where)
    if len(found) > MAX_PATTERNS:
        raise FormatError(
            f"{where}: {key} is {found!r:.200}, expected an object of at most "
            f"{MAX_PATTERNS:,} entries"
        )
    for text, changes in found.items():
        if not isinstance(changes, Mapping):
            raise FormatError(f"{where}: {key}.{text:.200} is not an object")
        yield text, changes

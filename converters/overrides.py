"""Settings that differ from layer to layer."""

import re
from collections.abc import Mapping
from typing import Any

from qjax.errors import FormatError

NESTED = re.compile(r"\([^)]*[+*}][^)]*\)[+*{?]")
"""Repetitions inside repetitions, which take exponential time to match."""
MAX_PATTERNS = 10_000


def layer_name(where: str) -> str:
    """The layer in what errors call it, `"DIR: NAME"`."""
    return where.rpartition(": ")[2]


def pattern(text: Any, where: str) -> re.Pattern[str]:
    """A regular expression of a settings file.

    Raises:
      FormatError: it is not one, or one that may take exponential time.
    """
    if not isinstance(text, str) or len(text) > 500 or NESTED.search(text):
        raise FormatError(f"{where}: {text!r:.200} is not a simple pattern")
    try:
        return re.compile(text)
    except re.error as error:
        raise FormatError(f"{where}: pattern {text!r}: {error}") from None


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
            if found.match(name):
                return {**self.whole, **changes}
        return self.whole


def _items(settings, key: str, where: str):
    found = settings.get(key) or {}
    if not isinstance(found, Mapping) or len(found) > MAX_PATTERNS:
        raise FormatError(f"{where}: {key} is {found!r:.200}, expected an object")
    for text, changes in found.items():
        if not isinstance(changes, Mapping):
            raise FormatError(f"{where}: {key}.{text:.200} is not an object")
        yield text, changes

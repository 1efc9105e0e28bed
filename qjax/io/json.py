"""Strict, bounded JSON objects: config.json, index files, manifests, headers.

Refused, each as `FormatError` naming the file: more than `max_bytes`, nesting beyond
`max_depth`, anything but UTF-8 without a byte-order mark, a root that is not an object,
a key given twice, NaN and Infinity, numbers beyond 64 bits or the float range, and
lone surrogates. Parsing costs about ten times the size of the text in memory.
"""

import json
import math
import os
from collections.abc import Iterable
from typing import Any

from qjax.errors import FormatError, SpecError
from qjax.io.files import read_small, shown

MAX_BYTES = 1 << 20
MAX_DEPTH = 32


def read_object(
    path: str | os.PathLike[str],
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    resolved: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Return the JSON object stored in a file.

    Args:
      path: Regular file.
      max_bytes: Largest accepted file.
      max_depth: Deepest accepted nesting; the root object is depth 1.
      resolved: Its real path, found before; opened without following another link.

    Returns:
      The object as a dict.

    Raises:
      FormatError: Any of the refusals in the module's header.
      SpecError: The file cannot be opened.
    """
    data = read_small(path, max_bytes, resolved)
    return parse_object(data, shown(path), max_bytes=max_bytes, max_depth=max_depth)


def parse_object(
    data: bytes,
    where: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
) -> dict[str, Any]:
    """Return the JSON object in `data`; `where` names it in errors.

    Args:
      data: UTF-8 text.
      where: File (and part) for messages.
      max_bytes: Largest accepted text.
      max_depth: Deepest accepted nesting; the root object is depth 1.

    Returns:
      The object as a dict.

    Raises:
      FormatError: Any of the refusals in the module's header.
    """
    if len(data) > max_bytes:
        raise FormatError(f"{where}: {len(data):,} bytes, {max_bytes:,} allowed")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise FormatError(f"{where}: starts with a byte-order mark, expected UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8 at byte {error.start}") from None
    strict = _Strict(where)
    try:
        value = json.loads(
            text,
            object_pairs_hook=strict.pairs,
            parse_int=strict.integer,
            parse_float=strict.real,
            parse_constant=strict.constant,
        )
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{where}: not valid JSON at line {error.lineno} column {error.colno}: "
            f"{error.msg}"
        ) from None
    except RecursionError:
        raise FormatError(f"{where}: nested deeper than {max_depth} levels") from None
    if not isinstance(value, dict):
        raise FormatError(
            f"{where}: the root is a {type(value).__name__}, expected a JSON object"
        )
    _check_tree(value, where, max_depth)
    return value


def encode_object(value: dict[str, Any]) -> bytes:
    """Return `value` as indented UTF-8 JSON ending in a newline.

    The same value always gives the same bytes: keys keep their order.

    Raises:
      SpecError: The value holds NaN, infinity or something that is not JSON.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SpecError(f"cannot be stored as JSON: {error}") from error
    return (text + "\n").encode("utf-8")


class _Strict:
    """Hooks of the JSON parser that refuse what the format leaves open."""

    def __init__(self, where: str):
        self._where = where

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise FormatError(f"{self._where}: key {_brief(twice)} is given twice")
        return value

    def integer(self, digits: str) -> int:
        if len(digits) > 20:
            raise FormatError(
                f"{self._where}: an integer of {len(digits):,} characters, expected "
                "at most 64 bits"
            )
        return int(digits)

    def real(self, digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise FormatError(f"{self._where}: number {digits[:40]} is out of range")
        return value

    def constant(self, name: str) -> float:
        raise FormatError(f"{self._where}: {name} is not JSON, expected a number")


def _brief(text: str) -> str:
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def _check_tree(root: dict[str, Any], where: str, max_depth: int) -> None:
    """Check depth and that every string is real Unicode, without recursion."""
    level: list[Any] = [root]
    depth = 0
    while level:
        depth += 1
        if depth > max_depth:
            raise FormatError(f"{where}: nested deeper than {max_depth} levels")
        below: list[Any] = []
        for container in level:
            items: Iterable[Any] = container
            if isinstance(container, dict):
                _check_strings(container.keys(), where)
                items = container.values()
            _check_strings(items, where)
            below.extend(v for v in items if isinstance(v, dict | list))
        level = below


def _check_strings(items: Iterable[Any], where: str) -> None:
    for item in items:
        if isinstance(item, str) and not item.isascii():
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                raise FormatError(
                    f"{where}: string {_brief(item)} holds half a surrogate pair"
                ) from None

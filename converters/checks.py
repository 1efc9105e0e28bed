"""Checks of what a foreign file says: parts, finite numbers, patterns that end."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax.errors import FormatError
from qjax.tensor import QuantizedTensor

MOST_STEPS = 10_000_000
"""Ways in which a pattern may be tried on a name; about a second."""
LONGEST = 500
_PIECE = 1 << 18
_ATOMS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:P?<?[=!:]|P<\w+>)?", re.S)


def check_parts(reader: Any, parts: Mapping[str, Any], where: str) -> None:
    """Raises unless parts have the dtypes and ranks that a reader takes.

    Args:
      reader: with `parts`; see `qjax.converters.packed.Reader`.
      parts: tensors or their headers.
      where: what errors call the layer.

    Raises:
      FormatError: one has not.
    """
    for part, leaf in parts.items():
        kind, rank = reader.parts[part]
        fits = kind in ("any", np.dtype(leaf.dtype).name) or (
            kind in ("integer", "floating")
            and jnp.issubdtype(leaf.dtype, getattr(jnp, kind))
        )
        void = 0 in leaf.shape and part not in getattr(reader, "empty", ())
        if not fits or rank not in (None, len(leaf.shape)) or void:
            what = "numbers" if kind == "any" else f"{kind} numbers"
            raise FormatError(
                f"{where}.{part}: is {leaf.dtype} {list(leaf.shape)}, expected {what}"
                f"{'' if rank is None else f' of rank {rank}'}, not empty"
            )


def finite(leaf: Any, where: str) -> None:
    """Raises unless every float of an array or a quantized tensor is finite.

    Zero, negative and subnormal scales are numbers; scales that are bytes are powers of
    two (E8M0), of which 255 is none.

    Args:
      leaf: an array, or tensors whose arrays are all looked at.
      where: what errors call it.

    Raises:
      FormatError: some are not; says how many, and where the first is.
    """
    if isinstance(leaf, tuple):
        for i, part in enumerate(leaf):
            finite(part, f"{where}.{i}")
        return
    if isinstance(leaf, QuantizedTensor):
        for field in dataclasses.fields(leaf):  # pyright: ignore[reportArgumentType]
            value = getattr(leaf, field.name)
            if value is None or field.metadata.get("static"):
                continue
            if field.name == "scale" and getattr(value, "dtype", None) == np.uint8:
                value = np.asarray(value).view(ml_dtypes.float8_e8m0fnu)
            finite(value, f"{where}.{field.name}")
        return
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return
    leaf = np.asarray(leaf)
    flat = leaf.reshape(-1)  # in pieces, which stay in the cache
    starts = range(0, flat.size, _PIECE)
    if not any(_not_finite(flat[i : i + _PIECE]).any() for i in starts):
        return
    bad = _not_finite(leaf)
    count = int(np.count_nonzero(bad))
    if count:
        first = [int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape)]
        raise FormatError(
            f"{where}: {count} of {bad.size} numbers are infinite or NaN, the first at "
            f"index {first}; the file is damaged, or its numbers overflowed"
        )


def _not_finite(x: np.ndarray) -> np.ndarray:
    """Whether numbers are infinite or NaN, by their bits where that is faster."""
    if x.dtype.itemsize == 1:
        every = np.arange(256, dtype=np.uint8).view(x.dtype).astype(np.float32)
        codes = np.flatnonzero(~np.isfinite(every)).astype(np.uint8)
        found = np.zeros(x.shape, bool)
        for code in codes:
            found |= x.view(np.uint8) == code
        return found
    if x.dtype.itemsize == 2:
        exponent = np.uint16(0x7C00 if x.dtype == np.float16 else 0x7F80)
        return (x.view(np.uint16) & exponent) == exponent
    return ~np.isfinite(x)


def pattern(text: Any, where: str) -> re.Pattern[str]:
    """A regular expression of a settings file; see `fits`.

    Raises:
      FormatError: it is not one, or its repetitions lie inside one another.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise FormatError(f"{where}: {text!r:.200} is not a simple pattern")
    steps(text, 0, where)
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(f"{where}: pattern {text!r}: {error}") from None


def fits(found: re.Pattern[str], name: str, where: str = "quantization_config") -> bool:
    """Whether a pattern matches the beginning of a name.

    Args:
      found: from `pattern`.
      name: of a layer.
      where: what errors call the settings.

    Raises:
      FormatError: finding that out may take too long.
    """
    count = steps(found.pattern, len(name), where)
    if count > MOST_STEPS:
        raise FormatError(
            f"{where}: pattern {found.pattern!r:.200} may be tried in {count:.0e} ways "
            f"on {name!r:.200}; expected at most {MOST_STEPS:.0e}"
        )
    return found.match(name) is not None


def steps(text: str, length: int, where: str) -> int:
    """A bound of the ways in which a pattern can be tried on a text.

    Alternatives of a group add up, groups multiply; `k` repetitions share the text in
    `(length + k)! / length! k!` ways.

    Args:
      text: the regular expression.
      length: of what it is tried on.
      where: what errors call it.

    Raises:
      FormatError: a group of several ways is repeated.
    """
    plain = _ATOMS.sub(lambda atom: "(" if atom[0][0] == "(" else "x", text)
    plain = re.sub(r"([*+?}])[?+]", r"\1", plain)  # lazy and possessive: as many ways
    closed, ways, repeats = (0, 0), 1, 0  # of alternatives before, and of this one
    outside: list[Any] = []
    for at, char in enumerate(plain):
        if char == "(":
            outside.append((closed, ways, repeats))
            closed, ways, repeats = (0, 0), 1, 0
        elif char == "|" or (char == ")" and outside):
            closed = closed[0] + ways, max(closed[1], repeats)
            ways, repeats = 1, 0
            if char == ")":
                inner = closed
                if inner != (1, 0) and plain[at + 1 : at + 2] in ("*", "+", "{"):
                    raise FormatError(f"{where}: {text!r:.200} is not a simple pattern")
                closed, ways, repeats = outside.pop()
                ways, repeats = ways * inner[0], repeats + inner[1]
        elif char == "?":
            ways *= 2
        elif char in "*+{":
            repeats += 1
    most = max(closed[1], repeats)
    return min((closed[0] + ways) * math.comb(length + most, most), 10**300)

"""What the tensors of an HQQ layer hold: packed codes, numbers and text.

Older files, `qmodel.pt`, nest the parts of a layer in a dict, and may store scales and
zero-points as codes too: `scale_q` with `meta_scale`, `zero_q` with `meta_zero`, or
both in `zero_scale`.

Reference: hqq 0.2.8 `core/quantize.py`, `core/bitpack.py`, `core/utils.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.converters.runs import run_codes, run_columns
from qjax.errors import FormatError, UnsupportedError

PACKINGS: dict[str, tuple[Any, int, tuple[int, ...]]] = {
    "8bit_u8": (np.uint8, 8, (0,)),
    "4bit_u8": (np.uint8, 4, (4, 0)),
    "3bit_32": (np.int32, 3, tuple(range(27, -1, -3))),
    "2bit_u8": (np.uint8, 2, (6, 4, 2, 0)),
    "1bit_u8": (np.uint8, 1, tuple(range(7, -1, -1))),
}
"""Words, the width of a code in them, and the places of runs; see `runs`."""
USUAL = {1: "1bit_u8", 2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8"} | {
    bits: "8bit_u8" for bits in (5, 6, 8)
}
DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Packed:
    """Packed codes, checked.

    Attributes:
      words: as `PACKINGS` says, `[n, cols]`.
      places: places of the runs.
      bits: code width.
      rows: rows of the matrix that was packed.
    """

    words: np.ndarray
    places: tuple[int, ...]
    bits: int
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that was packed."""
        return self.rows, self.words.shape[1]

    def codes(self) -> np.ndarray:
        """The matrix, uint8."""
        return run_codes(self.words, self.places, self.bits, self.rows)

    def columns(self, matrix: tuple[int, int]) -> np.ndarray:
        """Codes of a weight `(in, out)` as `qjax.packing` packs them."""
        return run_columns(self.words, self.places, self.bits, matrix)


def packed(words: np.ndarray, parts: Mapping[str, Any], where: str) -> Packed:
    """Packed codes as the other parts describe them.

    Raises:
      FormatError: they do not fit one another.
    """
    said = number(parts, "nbits", where)
    bits = 2 if 1 < said < 2 else said  # 1.58 bits: three levels
    packing = text(parts, "packing", where, USUAL.get(int(bits), ""))
    word, width, places = PACKINGS.get(packing, (np.uint8, 0, (0,)))
    if bits not in USUAL or (bits != width and (width != 8 or bits > 8)):
        raise FormatError(
            f"{where}: nbits is {said:g} with packing {packing!r:.100}, expected one "
            f"of {', '.join(map(str, sorted(USUAL)))} and {', '.join(PACKINGS)}"
        )
    bits, words = int(bits), np.ascontiguousarray(words)
    whole = words.shape[1] * words.itemsize % np.dtype(word).itemsize == 0
    if jnp.issubdtype(words.dtype, jnp.floating) and whole:
        words = words.view(word)
    sizes = [int(size) for size in np.asarray(parts["shape"]).reshape(-1)]
    count = sizes[0] * sizes[1] if len(sizes) == 2 and min(sizes) > 0 else 0
    rows, rest = divmod(count, words.shape[1])
    if words.dtype != word or rest or -(-rows // len(places)) != len(words):
        raise FormatError(
            f"{where}: W_q is {words.dtype} {list(words.shape)}, which is not "
            f"{packing} of a weight of shape {sizes}"
        )
    if bits < width and int(words.max()) >= 2**bits:
        raise FormatError(
            f"{where}: W_q has code {int(words.max())}, expected less than {2**bits} "
            f"for {bits} bits"
        )
    return Packed(words, places, bits, rows)


def statistic(parts: Mapping[str, np.ndarray], name: str, where: str) -> np.ndarray:
    """Scales or zero-points, of older files from codes, in the dtype they had there."""
    if name in parts:
        return parts[name]
    if "zero_scale" in parts:
        both = parts["zero_scale"]
        if both.ndim != 3 or len(both) != 2:
            raise FormatError(
                f"{where}.zero_scale: shape {list(both.shape)}, expected two matrices"
            )
        codes = both[int(name == "scale")]
        if jnp.issubdtype(codes.dtype, jnp.floating):
            return codes
    else:
        codes = parts[f"{name}_q"]
    start = f"meta_{name}."
    own = {k.removeprefix(start): v for k, v in parts.items() if k.startswith(start)}
    if missing := [p for p in ("nbits", "shape", "scale", "zero") if p not in own]:
        raise KeyError(start + missing[0])
    where = f"{where}.{name}"
    matrix = packed(codes.reshape(len(codes), -1), own, where).codes()
    dtype = jnp.dtype(compute_dtype(own, "float16", where))
    scale, zero = own["scale"].astype(dtype), own["zero"].astype(dtype)
    rows, cols = matrix.shape
    for leaf in (scale, zero):
        if leaf.size != 1 and leaf.shape not in ((rows, 1), (1, cols)):
            raise FormatError(
                f"{where}: statistics of shape {list(leaf.shape)} for {[rows, cols]}"
            )
    with np.errstate(all="ignore"):  # what is not finite is found afterwards
        return (matrix.astype(dtype) - zero) * scale


def number(parts: Mapping[str, Any], name: str, where: str) -> float:
    """The one number of a part."""
    leaf = np.asarray(parts[name])
    value = float(leaf.reshape(-1)[0]) if leaf.size == 1 else np.nan
    if not np.isfinite(value):
        raise FormatError(f"{where}.{name}: expected one number")
    return value


def text(parts: Mapping[str, Any], name: str, where: str, default: str) -> str:
    """The text of a part, or a default where it is missing."""
    if name not in parts:
        return default
    leaf = np.asarray(parts[name])
    try:
        return bytes(leaf.astype(np.uint8).tolist()).decode("ascii")
    except UnicodeDecodeError:
        raise FormatError(f"{where}.{name}: is not text") from None


def compute_dtype(parts: Mapping[str, Any], default: str, where: str) -> str:
    """The dtype that a layer computes in."""
    dtype = text(parts, "compute_dtype", where, default).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"{where}: compute_dtype is {dtype!r:.100}, expected one of "
            f"{', '.join(DTYPES)}"
        )
    return dtype


def flat_state(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tensors of a nested `qmodel.pt`, by the names of the flat layout.

    Args:
      state: `{module: {part: value}}`, where `meta` and `meta_scale` nest once more;
        tensors may be anything with a shape.
      where: what errors call the file.

    Returns:
      Tensors by name; plain values as arrays, as hqq stores them in safetensors.

    Raises:
      FormatError: it nests in another way, or two entries have one name.
    """
    made: dict[str, Any] = {}

    def walk(node: Mapping[Any, Any], name: str, depth: int) -> None:
        for key, value in node.items():
            if not isinstance(key, str):
                raise FormatError(f"{where}: {name or 'the state'} has a key {key!r}")
            inner = name if key == "meta" and name else f"{name}.{key}".lstrip(".")
            if isinstance(value, Mapping) and depth < 3:
                walk(value, inner, depth + 1)
            elif inner in made:
                raise FormatError(f"{where}: two entries are called {inner}")
            elif value is not None:
                made[inner] = _encoded(value, f"{where}: {inner}")

    walk(state, "", 0)
    return made


def _encoded(value: Any, where: str) -> Any:
    if hasattr(value, "shape"):
        return value
    if isinstance(value, bool):
        return np.array(value, np.uint8)
    if isinstance(value, int) and abs(value) < 2**31:
        return np.array(value, np.int32)
    if isinstance(value, float):
        return np.array(value, np.float32)
    if isinstance(value, str):
        return np.frombuffer(value.encode(), np.uint8)
    if isinstance(value, tuple) and all(
        type(n) is int and abs(n) < 2**63 for n in value
    ):
        return np.array(value, np.int64)
    raise FormatError(f"{where}: is a {type(value).__name__}, expected a tensor")

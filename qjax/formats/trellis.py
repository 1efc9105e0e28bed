"""Trellis codes: a weight is the value of a 16-bit state that shifts along a bitstream.

The 256 weights of a 16 x 16 tile are a walk through a trellis of `2**16` states. Weight
`t` appends `bits` bits to the state and drops as many,

    state_t = ((state_{t-1} << bits) | symbol_t) mod 2**16,   w_t = value(state_t),

so a state holds `16 / bits` symbols but costs only `bits`: the shape of a vector
quantizer of high dimension at the price of a scalar one. The walk bites its tail (the
state before the first symbol is the last one), so that a tile is exactly `256 bits`
bits. `value` is computed, not stored: a hash of the state whose distribution is close
to normal.

Tiles, their order, the bit order and the three hashes are those of EXL3 (exllamav3):
`codes` are its `trellis` tensor, `[in / 16, out / 16, 16 bits]` of 16-bit words, with
the last two axes merged. The two halves of a hash are added exactly, in float32;
exllamav3's CUDA kernels round their sum to float16.

Reference: Tseng et al., QTIP, arXiv 2406.11235, sections 3.1 and 3.2; exllamav3
`exllamav3_ext/quant/codebook.cuh`.
"""

import dataclasses
import functools
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt16, UInt32

from qjax.errors import SpecError
from qjax.formats.base import Format, check_choice
from qjax.formats.grouping import Grouping

TILE = 16
"""Rows and columns of a tile."""
STATE_BITS = 16
CODEBOOKS = ("3inst", "mcg", "mul1")
_MULTIPLIER = {"3inst": 89226354, "mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
_STEP, _SHIFT = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16)


@dataclasses.dataclass(frozen=True)
class Trellis(Format):
    """Trellis-coded quantization with computed codebooks, in EXL3's layout.

    Bits per weight: `bits`, plus one float32 scale per matrix, plus what incoherence
    processing stores (see `qjax.wrappers.Incoherent`).

    Attributes:
      bits: bits per weight, 1 to 8.
      codebook: the hash of states: `3inst`, `mcg` or `mul1`.

    Raises:
      SpecError: a field is out of range.
    """

    bits: int = 2
    codebook: str = "3inst"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise SpecError(
                f"Trellis: bits is {self.bits!r}, expected an integer from 1 to 8"
            )
        check_choice("Trellis", "codebook", self.codebook, CODEBOOKS)

    @property
    def code_bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Bits of a weight; they are not a code of their own."""
        return self.bits

    @property
    def name(self) -> str:
        """`trellis-2bit`, or `trellis-2bit-mcg` with another codebook."""
        other = "" if self.codebook == "3inst" else f"-{self.codebook}"
        return f"trellis-{self.bits}bit{other}"

    @property
    def peak(self) -> float:
        """The largest magnitude of a state's value."""
        return float(np.abs(codebook_values(self.codebook)).max())

    def grouping(self, matrix: tuple[int, int]) -> Grouping:
        """One scale per matrix, which has to consist of whole tiles."""
        if matrix[0] % TILE or matrix[1] % TILE:
            raise SpecError(
                f"{self.name}: a matrix [in={matrix[0]}, out={matrix[1]}] is not made "
                f"of {TILE} x {TILE} tiles; expected multiples of {TILE}. Keep this "
                "weight in another format"
            )
        return Grouping("tensor", matrix)

    def encode(self, u: Float[Array, "..."]) -> NoReturn:
        """Refuses: codes of neighbours depend on each other."""
        raise SpecError(
            f"{self.name}: weights are encoded a tile at a time, not one by one; use "
            "the method TrellisLDLQ"
        )

    def neighbour(self, codes: Any, up: Any) -> NoReturn:
        """Refuses: see `encode`."""
        self.encode(codes)

    def decode(self, codes: UInt16[Array, "..."]) -> Float[Array, "..."]:
        """Values of states, float32, in units of the scale."""
        return state_values(codes, self.codebook)


def state_values(
    states: Shaped[Array, "*shape"], codebook: str
) -> Float[Array, "*shape"]:
    """The value of each state.

    `3inst` and `mcg` add the two float16 halves of
    `((a s + b) & 0x8FFF8FFF) ^ 0x3B603B60`; `mul1` scales the sum of the four bytes of
    `a s`, which is close to normal as well.

    Args:
      states: unsigned integers below `2**16`.
      codebook: one of `CODEBOOKS`.

    Returns:
      Float32 values.
    """
    x = states.astype(jnp.uint32) * jnp.uint32(_MULTIPLIER[codebook])
    if codebook == "mul1":
        pairs = (x & jnp.uint32(0x00FF00FF)) + ((x >> 8) & jnp.uint32(0x00FF00FF))
        total = (pairs & jnp.uint32(0xFFFF)) + (pairs >> 16)
        # Integers times 2**-18 (the step's unit): exact whether or not it is fused.
        step, shift = (round(float(v) * 2**18) for v in (_STEP, _SHIFT))
        units = (total.astype(jnp.int32) + 1024) * step + shift
        return units.astype(jnp.float32) * jnp.float32(2.0**-18)
    if codebook == "3inst":
        x = x + jnp.uint32(64248484)
    x = (x & jnp.uint32(0x8FFF8FFF)) ^ jnp.uint32(0x3B603B60)
    return _half(x & jnp.uint32(0xFFFF)) + _half(x >> 16)


def _half(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Float16 bits of normal numbers as float32."""
    sign = (bits & jnp.uint32(0x8000)) << 16
    rest = ((bits & jnp.uint32(0x7FFF)) << 13) + jnp.uint32(112 << 23)
    return lax.bitcast_convert_type(sign | rest, jnp.float32)


@functools.cache
def codebook_values(codebook: str) -> np.ndarray:
    """The values of all `2**16` states, float32."""
    states = np.arange(2**STATE_BITS, dtype=np.uint64)
    x = (states * _MULTIPLIER[codebook] % 2**32).astype(np.uint32)
    if codebook == "mul1":
        total = x.view(np.uint8).reshape(-1, 4).sum(1, dtype=np.float64)
        scaled = (total + 1024) * np.float64(_STEP) + np.float64(_SHIFT)
        return scaled.astype(np.float32)
    if codebook == "3inst":
        x = x + np.uint32(64248484)
    x = (x & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
    halves = x.view(np.float16).reshape(-1, 2).astype(np.float32)
    return halves[:, 0] + halves[:, 1]


def split_tiles(w: Shaped[Array, "*lead in out"]) -> Shaped[Array, "*lead r c 256"]:
    """Weights of each tile in the order of the walk.

    The order is that of a tensor core's fragments: weight `8 t + k` of a tile lies in
    row `2 (t % 4) + {0, 1, 8, 9}[k % 4]` and column `t // 4 + 8 (k // 4)`.

    Args:
      w: matrices of whole tiles.

    Returns:
      `[*lead, in / 16, out / 16, 256]`.
    """
    *lead, rows, cols = w.shape
    n = len(lead)
    # Rows are (k2, t0, k0), columns (k1, t1); the walk is (t1, t0, k1, k2, k0).
    w = w.reshape(*lead, rows // TILE, 2, 4, 2, cols // TILE, 2, 8)
    order = (0, 4, 6, 2, 5, 1, 3)
    w = w.transpose(*range(n), *(n + i for i in order))
    return w.reshape(*lead, rows // TILE, cols // TILE, TILE * TILE)


def join_tiles(tiles: Shaped[Array, "*lead r c 256"]) -> Shaped[Array, "*lead in out"]:
    """Inverse of `split_tiles`."""
    *lead, r, c, _ = tiles.shape
    n = len(lead)
    w = tiles.reshape(*lead, r, c, 8, 4, 2, 2, 2)
    order = (0, 5, 3, 6, 1, 4, 2)
    w = w.transpose(*range(n), *(n + i for i in order))
    return w.reshape(*lead, r * TILE, c * TILE)


def words_to_states(
    words: UInt16[Array, "*lead words"], bits: int
) -> UInt16[Array, "*lead 256"]:
    """The states of a tile's walk.

    With each adjacent pair of words swapped they are one stream of bits, most
    significant first; state `t` is the 16 bits that end behind symbol `t`.

    Args:
      words: `16 bits` words per tile.
      bits: bits per symbol.

    Returns:
      256 states per tile.
    """
    lead = words.shape[:-1]
    pairs = words.reshape(*lead, 8 * bits, 2)[..., ::-1]
    strips = pairs.reshape(*lead, TILE, bits)
    before = jnp.roll(strips[..., -1:], 1, axis=-2)
    stream = jnp.concatenate([before, strips], -1).astype(jnp.uint32)
    states = []
    for k in range(TILE):
        word, skip = divmod((k + 1) * bits, STATE_BITS)
        state = stream[..., word] << skip
        if skip:
            state = state | (stream[..., word + 1] >> (STATE_BITS - skip))
        states.append(state.astype(jnp.uint16))
    return jnp.stack(states, -1).reshape(*lead, TILE * TILE)


def states_to_words(
    states: Shaped[Array, "*lead 256"], bits: int
) -> UInt16[Array, "*lead words"]:
    """Inverse of `words_to_states`, from the symbols that the states end with."""
    lead = states.shape[:-1]
    shifts = jnp.arange(bits - 1, -1, -1, dtype=jnp.uint16)
    stream = (states.astype(jnp.uint16)[..., None] >> shifts) & jnp.uint16(1)
    stream = stream.reshape(*lead, TILE * bits, STATE_BITS)
    places = jnp.arange(STATE_BITS - 1, -1, -1, dtype=jnp.uint16)
    words = jnp.sum(stream << places, -1, dtype=jnp.uint16)
    pairs = words.reshape(*lead, 8 * bits, 2)[..., ::-1]
    return pairs.reshape(*lead, TILE * bits)

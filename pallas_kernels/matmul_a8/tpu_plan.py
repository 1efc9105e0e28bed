"""The static numbers of a product with 8-bit activations on TPU."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ..weights import WeightSpec
from . import specs
from .specs import LANES, Config

PIECE = 512
"""Rows of a weight with one scale per column that one product takes."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one kernel does.

    Attributes:
      spec: the weight.
      config: tiles.
      activation: 8-bit type of the activations.
      zero: whether zero-points are arrays.
      signed: whether codes are stored as int8.
    """

    spec: WeightSpec
    config: Config
    activation: str
    zero: bool
    signed: bool

    @property
    def group(self) -> int:
        """Rows with one scale, at most `k`."""
        return min(self.spec.group, self.spec.k)

    @property
    def whole(self) -> bool:
        """One scale per column: sums stay as the matrix unit gives them."""
        return self.group == self.spec.k

    @property
    def parts(self) -> int:
        """Groups that share a product."""
        return specs.parts(self.spec)

    @property
    def piece(self) -> int:
        """Rows of a product.

        A multiple of 128 that divides `k` and holds whole groups, or a part of one.
        """
        wide = max(self.group, LANES)
        if not self.whole and wide <= PIECE:
            return wide if self.spec.k % wide == 0 else LANES
        piece = PIECE
        while self.group % piece or self.spec.k % piece:
            piece -= LANES
        return piece

    @property
    def unit(self) -> int:
        """Rows whose activations are summed for the zero-point."""
        return self.spec.k if self.whole else min(self.group, self.piece)

    @property
    def nibbles(self) -> bool:
        """4-bit codes are read as float8 numbers, without conversion."""
        return self.spec.bits == 4 and not self.integer

    @property
    def unit_value(self) -> float:
        """What a decoded code counts, but for the shift."""
        return 2.0**-9 if self.nibbles else 1.0

    @property
    def shift(self) -> float:
        """What decoding subtracts from a code."""
        if self.spec.kind != "int" or self.nibbles or self.signed:
            return 0.0
        return 2.0 ** (self.spec.bits - 1)

    @property
    def beyond(self) -> float:
        """What is still to subtract from decoded codes, beside zero-points."""
        return self.spec.offset - self.shift

    @property
    def rest(self) -> bool:
        """Whether sums of the activations are needed."""
        return self.zero or self.beyond != 0

    @property
    def units(self) -> int:
        """Sums per row that are kept."""
        return self.spec.k // self.unit if self.rest else 1

    @property
    def integer(self) -> bool:
        """Whether the matrix unit gives integers."""
        return self.activation == "int8"

    @property
    def sum_dtype(self) -> Any:
        """What sums are kept in."""
        return jnp.int32 if self.integer and self.whole else jnp.float32

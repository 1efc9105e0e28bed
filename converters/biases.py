"""Integers with a bias, `w = code * scale + bias`, as zero-points and back."""

import numpy as np

from qjax.converters.affine import affine, zero_of_bias
from qjax.converters.words import codes_of
from qjax.tensor import QuantizedTensor


def affine_of_bias(
    data: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    *,
    bits: int,
    matrix: tuple[int, int],
    where: str,
    group: int,
) -> QuantizedTensor:
    """A weight `code * scale + bias`; see `affine`.

    In groups whose scale is 0, the bias is the weight: they become codes of 0 with a
    zero-point of -1 and the bias for a scale.

    Args:
      data: uint8 `[n, out]`, a bit string per column.
      scale: float `[groups, out]`.
      bias: like `scale`.
      bits: code width.
      matrix: `(in, out)`.
      where: what errors call the tensor.
      group: inputs per scale.
    """
    zero, unpacked = zero_of_bias(scale, bias), False
    constant = (scale == 0) & (bias != 0)
    if constant.any():
        data, unpacked = codes_of(data, bits, matrix[0]).copy(), True
        data[np.repeat(constant, group, axis=0)[: matrix[0]]] = 0
        scale = np.where(constant, bias.astype(scale.dtype), scale)
        zero = np.where(constant, np.float32(-1), zero)
    return affine(
        data,
        scale,
        zero,
        bits=bits,
        matrix=matrix,
        where=where,
        group=group,
        unpacked=unpacked,
        dtype=scale.dtype.name,
    )


def bias_of_zero(scale: np.ndarray, zero: np.ndarray) -> np.ndarray | None:
    """Biases in the dtype of `scale` that `zero_of_bias` gives these zero-points of.

    Args:
      scale: float `[groups, out]`.
      zero: zero-points like `scale`.

    Returns:
      The biases, or None where the dtype holds none for some group.
    """
    near = (-zero.astype(np.float64) * scale.astype(np.float64)).astype(scale.dtype)
    tries = [near]
    if scale.dtype == np.float32:  # several biases, or none, give a zero-point
        tries += [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)]
    found, made = np.zeros(scale.shape, bool), near
    for bias in tries:
        good = (zero_of_bias(scale, bias) == zero) | (scale == 0)
        made = np.where(good & ~found, bias, made)
        found |= good
    return made if bool(found.all()) else None

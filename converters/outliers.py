"""Sparse corrections of foreign checkpoints as `WithOutliers`."""

import numpy as np

from qjax.errors import FormatError
from qjax.tensor import QuantizedTensor
from qjax.wrappers import WithOutliers


def csr_rows(offsets: np.ndarray, size: int, count: int, where: str) -> np.ndarray:
    """The row of each entry of a compressed sparse matrix.

    Args:
      offsets: integers `[size + 1]`: where each row begins, and where the last ends.
      size: number of rows.
      count: number of entries.
      where: what errors call the offsets.

    Returns:
      int64 `[count]`.

    Raises:
      FormatError: offsets do not rise from 0 to `count`.
    """
    offsets = offsets.astype(np.int64)
    sizes = np.diff(offsets)
    rising = offsets[0] == 0 and offsets[-1] == count and (sizes >= 0).all()
    if len(sizes) != size or not rising:
        raise FormatError(
            f"{where}: expected {size + 1} offsets that rise from 0 to {count}, the "
            f"number of entries, got {len(offsets)} from {offsets[0]} to {offsets[-1]}"
        )
    return np.repeat(np.arange(size), sizes)


def with_outliers(
    q: QuantizedTensor,
    values: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    where: str,
) -> QuantizedTensor:
    """Adds `values[k]` at input `rows[k]` and output `cols[k]`, if there are any.

    Raises:
      FormatError: an index lies outside the matrix.
    """
    if not len(values):
        return q
    for what, index, size in zip(("in", "out"), (rows, cols), q.matrix, strict=True):
        if int(index.min()) < 0 or int(index.max()) >= size:
            raise FormatError(
                f"{where}: outliers at {what} {index.min()} to {index.max()}, expected "
                f"0 to {size - 1}"
            )
    small = np.uint16 if max(q.matrix) <= 2**16 else np.int32
    return WithOutliers(q, values, rows.astype(small), cols.astype(small))

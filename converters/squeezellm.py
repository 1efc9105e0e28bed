"""SqueezeLLM checkpoints: a table of values per output, and sparse outliers.

Per linear layer: `qweight` int32 `[in * bits / 32, out]`, a bit string along `in`;
`lookup_table` float `[out, 2**bits]`, the value of every code, in any order. A layer
may have corrections that are added:

* `rows`, `cols`, `vals`: a sparse matrix `[out, in]`, where each output begins, the
  input of each entry, and its float32 value; `startrows` only serves a kernel;
* `full_rows` float32 `[in, n]`, whole outputs, and `full_row_indices` int32 `[n]`,
  which ones: `LowRank` with them and a matrix of zeros and ones.

Reference: SqueezeLLM `squeezellm/quant.py`, `squeezellm/quant_cuda_kernel.cu`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.outliers import csr_rows, with_outliers
from qjax.converters.words import packed_codes, stream
from qjax.errors import FormatError
from qjax.formats import KMeans
from qjax.tensor import CodebookTensor, QuantizedTensor
from qjax.wrappers import LowRank

PARTS = {
    "qweight": ("int32", 2),
    "lookup_table": ("floating", 2),
    "rows": ("integer", 1),
    "cols": ("integer", 1),
    "vals": ("floating", 1),
    "startrows": ("integer", 1),
    "full_rows": ("floating", 2),
    "full_row_indices": ("integer", 1),
}


class SqueezeLLM:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`.

    Attributes:
      empty: parts that may have no elements.
    """

    kind, marks, parts, stated = "squeezellm", ("lookup_table",), PARTS, ()
    empty = ("cols", "vals")

    def __init__(self, settings: Mapping[str, Any], where: str):
        del settings, where  # the shapes of a layer say all of it

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        words, cols = parts["qweight"].shape
        bits = max(parts["lookup_table"].shape[1].bit_length() - 1, 1)
        return cols, words * 32 // bits

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, a `CodebookTensor` with what is added to it."""
        words, table = parts["qweight"], parts["lookup_table"]
        cols, levels = table.shape
        bits = levels.bit_length() - 1
        if levels != 2**bits or not 2 <= bits <= 8 or words.shape[1] != cols:
            raise FormatError(
                f"{where}.lookup_table: has shape {list(table.shape)}, expected "
                f"[{words.shape[1]}, 2**bits] with 2 to 8 bits"
            )
        rows, rest = divmod(words.shape[0] * 32, bits)
        if rest:
            raise FormatError(
                f"{where}.qweight: {words.shape[0]} words per output do not hold whole "
                f"codes of {bits} bits"
            )
        fmt = KMeans(bits, table_dtype=table.dtype.name)
        codes = packed_codes(stream(words), bits, rows)
        book = np.ascontiguousarray(table.T)
        made: Any = CodebookTensor(
            codes, None, book, None, fmt, (rows, cols), "float16"
        )
        if parts.keys() & {"rows", "cols", "vals"}:
            outputs = csr_rows(parts["rows"], cols, len(parts["vals"]), f"{where}.rows")
            inputs = parts["cols"]
            if len(inputs) != len(outputs):
                raise FormatError(
                    f"{where}.cols: has {len(inputs)} entries, expected {len(outputs)}"
                )
            made = with_outliers(made, parts["vals"], inputs, outputs, where)
        whole = parts.keys() & {"full_rows", "full_row_indices"}
        return _with_whole(made, parts, where) if whole else made


def _with_whole(q: QuantizedTensor, parts, where: str) -> QuantizedTensor:
    """Adds whole outputs."""
    (rows, cols), index, values = (
        q.matrix,
        parts["full_row_indices"],
        parts["full_rows"],
    )
    inside = len(index) and 0 <= int(index.min()) <= int(index.max()) < cols
    if values.shape != (rows, len(index)) or not inside:
        raise FormatError(
            f"{where}.full_rows: has shape {list(values.shape)} for {len(index)} "
            f"outputs, expected [{rows}, {len(index)}] and outputs below {cols}"
        )
    place = np.zeros((len(index), cols), np.float16)
    place[np.arange(len(index)), index] = 1
    return LowRank(q, values, place)

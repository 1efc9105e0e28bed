"""Writing weights as the layers of another library."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qjax.converters.awq import AWQWriter
from qjax.converters.bitsandbytes import BitsAndBytesWriter
from qjax.converters.compressed_write import CompressedTensorsWriter
from qjax.converters.gptq import GPTQWriter
from qjax.converters.hqq import HQQWriter
from qjax.converters.mlx import MLXWriter
from qjax.converters.quanto import QuantoWriter
from qjax.formats import Format
from qjax.tensor import QuantizedTensor


class Writer(Protocol):
    """How one foreign format stores layers; one instance for each checkpoint.

    Attributes:
      fallback: what weights are rounded to that the format cannot hold, when asked.
    """

    fallback: Format

    def write(self, q: QuantizedTensor, where: str) -> Mapping[str, np.ndarray]:
        """The tensors of a weight `[in, out]`, by their names after the layer's.

        Raises:
          UnsupportedError: the format does not hold it exactly.
        """
        ...

    def settings(self, kept: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of all that was written.

        Args:
          kept: names of linear layers that stayed dense.
        """
        ...


WRITERS: dict[str, Callable[[], Writer]] = {
    "gptq": GPTQWriter,
    "gptq_v2": lambda: GPTQWriter("gptq_v2"),
    "awq": AWQWriter,
    "bnb": BitsAndBytesWriter,
    "hqq": HQQWriter,
    "compressed-tensors": CompressedTensorsWriter,
    "quanto": QuantoWriter,
    "mlx": MLXWriter,
}
"""Writers by the name of the format on the command line."""

EMBEDDINGS = ("mlx",)
"""Formats that hold quantized embeddings."""

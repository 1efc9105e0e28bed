"""Rounded activations as foreign checkpoints ask for them."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.overrides import layer_name
from qjax.errors import FormatError
from qjax.tensor import QuantizedTensor
from qjax.wrappers import RoundedInputs

_log = logging.getLogger(__name__)


class Activations:
    """Wraps the weights of one checkpoint in `RoundedInputs`, or says why not.

    Activations that are not computed as the checkpoint asks (4-bit floats, one scale
    per group of inputs, zero-points) are left alone: the weights are the same, and
    unrounded activations are nearer to those of the original model.

    Args:
      where: what warnings call the checkpoint.
    """

    def __init__(self, where: str):
        self._where = where
        self._said: set[str] = set()

    def once(self, text: str, kind: str | None = None) -> None:
        """Warns, once for each text, or for each kind of text."""
        if (kind or text) not in self._said:
            self._said.add(kind or text)
            _log.warning("%s: %s", self._where, text)

    def outputs(self, parts: Mapping[str, Any], where: str) -> None:
        """Warns, once, where a layer has scales for its outputs.

        Args:
          parts: the tensors of the layer.
          where: what errors call the layer.
        """
        if "output_scale" in parts:
            self.once(
                "static scales of outputs are not used, for example "
                f"{layer_name(where)}.output_scale; neither outputs nor the key and "
                "value cache are rounded by them",
                "outputs",
            )

    def left(self, q: QuantizedTensor, what: str) -> QuantizedTensor:
        """The weight alone; warns once that activations are not rounded.

        Args:
          q: the weight.
          what: how the checkpoint rounds activations.
        """
        self.once(
            f"activations ({what}) are not rounded, so that only the weights are "
            "those of the checkpoint's own runtime"
        )
        return q

    def rounded(
        self, q: QuantizedTensor, activation: str, scale: Any, where: str
    ) -> QuantizedTensor:
        """The weight in `RoundedInputs`.

        Args:
          q: the weight.
          activation: `int8` or `float8_e4m3fn`.
          scale: the static scale, or None for one scale per token.
          where: what errors call the layer.

        Raises:
          FormatError: a static scale is not positive and finite.
        """
        if scale is None:
            return RoundedInputs(q, activation)
        if scale.size != 1:
            return self.left(q, f"{activation} with {scale.size} static scales")
        scale = np.asarray(scale).astype(np.float32).reshape(())
        if not np.isfinite(scale) or scale <= 0:
            raise FormatError(f"{where}: the scale of activations is {scale}")
        return RoundedInputs(q, activation, scale)

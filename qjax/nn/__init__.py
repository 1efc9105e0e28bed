"""Flax NNX modules over quantized weights, and conversion of any NNX module."""

from qjax.nn.base import QuantizedLayer as QuantizedLayer
from qjax.nn.base import QuantizedParam as QuantizedParam
from qjax.nn.base import fake_quantize as fake_quantize
from qjax.nn.linear import QEmbed as QEmbed
from qjax.nn.linear import QLinear as QLinear

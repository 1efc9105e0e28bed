"""Flax NNX modules over quantized weights, and conversion of any NNX module."""

from qjax.nn.base import QuantizedLayer as QuantizedLayer
from qjax.nn.base import QuantizedParam as QuantizedParam
from qjax.nn.base import fake_quantize as fake_quantize
from qjax.nn.conv import QConv as QConv
from qjax.nn.einsum import QEinsum as QEinsum
from qjax.nn.linear import QEmbed as QEmbed
from qjax.nn.linear import QLinear as QLinear
from qjax.nn.quantize import freeze as freeze
from qjax.nn.quantize import quantize_module as quantize_module
from qjax.nn.report import WeightReport as WeightReport
from qjax.nn.report import quantization_report as quantization_report

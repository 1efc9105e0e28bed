"""From tokens to statistics of every layer's inputs."""

from qjax.calibration.blocks import BlockStream as BlockStream
from qjax.calibration.capture import calibrate as calibrate
from qjax.calibration.capture import capture as capture
from qjax.calibration.histograms import MSE as MSE
from qjax.calibration.histograms import Entropy as Entropy
from qjax.calibration.histograms import Percentile as Percentile
from qjax.calibration.observers import MeanStd as MeanStd
from qjax.calibration.observers import MinMax as MinMax
from qjax.calibration.observers import MovingAverage as MovingAverage
from qjax.calibration.observers import Observer as Observer
from qjax.calibration.static import static_inputs as static_inputs
from qjax.calibration.windows import CONTEXT as CONTEXT
from qjax.calibration.windows import calibration_windows as calibration_windows

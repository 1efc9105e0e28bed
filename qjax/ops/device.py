"""Which device a program is made for; see `qjax.pallas_kernels.device`."""

from qjax.pallas_kernels.device import count as count
from qjax.pallas_kernels.device import device_kind as device_kind
from qjax.pallas_kernels.device import platform as platform
from qjax.pallas_kernels.device import target as target

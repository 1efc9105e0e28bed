"""Which codes to choose: one algorithm per file."""

from qjax.methods.additive import AQLM as AQLM
from qjax.methods.array import quantize as quantize
from qjax.methods.base import Method as Method
from qjax.methods.base import method_from_dict as method_from_dict
from qjax.methods.fused import explain as explain
from qjax.methods.hqq import HQQ as HQQ
from qjax.methods.kmeans import Lloyd as Lloyd
from qjax.methods.rtn import RTN as RTN
from qjax.methods.statistics import Statistics as Statistics

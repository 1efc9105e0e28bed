"""Which codes to choose: one algorithm per file."""

from qjax.methods.array import quantize as quantize
from qjax.methods.base import Method as Method
from qjax.methods.base import method_from_dict as method_from_dict
from qjax.methods.fused import explain as explain
from qjax.methods.gptaq import GPTAQ as GPTAQ
from qjax.methods.gptq import GPTQ as GPTQ
from qjax.methods.hessian import check_curvature as check_curvature
from qjax.methods.hqq import HQQ as HQQ
from qjax.methods.ldlq import LDLQ as LDLQ
from qjax.methods.qronos import Qronos as Qronos
from qjax.methods.rtn import RTN as RTN
from qjax.methods.spqr import SpQR as SpQR
from qjax.methods.statistics import Statistics as Statistics

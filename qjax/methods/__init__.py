"""Which codes to choose: one algorithm per file."""

from qjax.methods.array import quantize as quantize
from qjax.methods.base import Method as Method
from qjax.methods.base import method_from_dict as method_from_dict
from qjax.methods.base import needs_of as needs_of
from qjax.methods.base import prepare as prepare
from qjax.methods.fused import explain as explain
from qjax.methods.gptq import GPTQ as GPTQ
from qjax.methods.hqq import HQQ as HQQ
from qjax.methods.rtn import RTN as RTN
from qjax.methods.statistics import Statistics as Statistics
from qjax.methods.trellis import TrellisLDLQ as TrellisLDLQ

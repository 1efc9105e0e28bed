"""Which codes to choose: one algorithm per file."""

from qjax.methods.array import quantize as quantize
from qjax.methods.awq import AWQ as AWQ
from qjax.methods.base import Method as Method
from qjax.methods.base import method_from_dict as method_from_dict
from qjax.methods.base import needs_of as needs_of
from qjax.methods.base import prepare as prepare
from qjax.methods.fold import fold_into_norm as fold_into_norm
from qjax.methods.fold import fold_into_previous as fold_into_previous
from qjax.methods.fused import explain as explain
from qjax.methods.gptq import GPTQ as GPTQ
from qjax.methods.hqq import HQQ as HQQ
from qjax.methods.learned_rotation import learn_rotation as learn_rotation
from qjax.methods.learned_rotation import rounding_loss as rounding_loss
from qjax.methods.llm_int8 import LLMInt8 as LLMInt8
from qjax.methods.rotation import Rotate as Rotate
from qjax.methods.rtn import RTN as RTN
from qjax.methods.smoothquant import SmoothQuant as SmoothQuant
from qjax.methods.statistics import Statistics as Statistics
from qjax.methods.trellis import TrellisLDLQ as TrellisLDLQ

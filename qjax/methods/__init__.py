"""Which codes to choose: one algorithm per file."""

from qjax.methods.array import quantize as quantize
from qjax.methods.awq import AWQ as AWQ
from qjax.methods.base import Method as Method
from qjax.methods.base import method_from_dict as method_from_dict
from qjax.methods.base import needs_of as needs_of
from qjax.methods.base import prepare as prepare
from qjax.methods.blockscales import tune_block_scales as tune_block_scales
from qjax.methods.blockwise import BlockReport as BlockReport
from qjax.methods.fisher import fisher_gradients as fisher_gradients
from qjax.methods.fold import fold_into_norm as fold_into_norm
from qjax.methods.fold import fold_into_previous as fold_into_previous
from qjax.methods.fused import explain as explain
from qjax.methods.gptq import GPTQ as GPTQ
from qjax.methods.hqq import HQQ as HQQ
from qjax.methods.learned_rotation import learn_rotation as learn_rotation
from qjax.methods.learned_rotation import rounding_loss as rounding_loss
from qjax.methods.llm_int8 import LLMInt8 as LLMInt8
from qjax.methods.lowrank import LowRankRepair as LowRankRepair
from qjax.methods.rotation import Rotate as Rotate
from qjax.methods.rtn import RTN as RTN
from qjax.methods.signround import SignRound as SignRound
from qjax.methods.signround import tune_block as tune_block
from qjax.methods.smoothquant import SmoothQuant as SmoothQuant
from qjax.methods.statistics import Statistics as Statistics
from qjax.methods.trellis import TrellisLDLQ as TrellisLDLQ
from qjax.methods.tune import tune_scales as tune_scales

"""Which codes to choose: one algorithm per file."""

from qjax.methods.array import quantize as quantize
from qjax.methods.base import Method as Method
from qjax.methods.base import method_from_dict as method_from_dict
from qjax.methods.blockscales import tune_block_scales as tune_block_scales
from qjax.methods.blockwise import BlockReport as BlockReport
from qjax.methods.fisher import fisher_gradients as fisher_gradients
from qjax.methods.fused import explain as explain
from qjax.methods.hqq import HQQ as HQQ
from qjax.methods.lowrank import LowRankRepair as LowRankRepair
from qjax.methods.rtn import RTN as RTN
from qjax.methods.signround import SignRound as SignRound
from qjax.methods.signround import tune_block as tune_block
from qjax.methods.statistics import Statistics as Statistics
from qjax.methods.tune import tune_scales as tune_scales

"""Operations on dense or quantized weights, and what chooses how they run."""

from qjax.ops.embed import embed as embed
from qjax.ops.grouped import explain_grouped as explain_grouped
from qjax.ops.grouped import gated_experts as gated_experts
from qjax.ops.grouped import grouped_gate_up as grouped_gate_up
from qjax.ops.grouped import grouped_matmul as grouped_matmul
from qjax.ops.grouped import sort_by_expert as sort_by_expert
from qjax.ops.matmul import explain as explain
from qjax.ops.matmul import matmul as matmul
from qjax.ops.prepack import canonical as canonical
from qjax.ops.prepack import prepack as prepack
from qjax.pallas_kernels.device import target as target

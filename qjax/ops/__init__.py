"""Operations on dense or quantized weights: `matmul`, `embed`, `explain`, `target`."""

from qjax.ops.device import target as target
from qjax.ops.embed import embed as embed
from qjax.ops.matmul import explain as explain
from qjax.ops.matmul import matmul as matmul

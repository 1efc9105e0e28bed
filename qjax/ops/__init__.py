"""Operations on dense or quantized weights: `matmul`, `embed`, `explain`."""

from qjax.ops.embed import embed as embed
from qjax.ops.matmul import explain as explain
from qjax.ops.matmul import matmul as matmul

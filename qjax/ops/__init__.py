"""Operations on dense or quantized weights, and what chooses how they run."""

from qjax.ops.device import target as target
from qjax.ops.embed import embed as embed
from qjax.ops.matmul import explain as explain
from qjax.ops.matmul import matmul as matmul
from qjax.ops.prepack import canonical as canonical
from qjax.ops.prepack import prepack as prepack

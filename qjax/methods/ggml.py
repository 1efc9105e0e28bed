"""llama.cpp's own quantizers, bit for bit, and better ones, for `Ggml` formats.

What llama.cpp calls an imatrix are the mean squares of a layer's inputs: they weigh the
errors of the inputs' weights, and the types' searches for scales depend on them. Here
they come from `importance`, or from the statistics of calibration.

Two things differ from llama.cpp, both only where it would store something useless: an
input whose mean square is 0 counts as a millionth of the mean one (groups of Q6_K whose
inputs are all 0 would become 0), and scales beyond the range of float16 are clipped to
it instead of becoming infinite.

Reference: ggml `src/ggml-quants.c` (MIT).
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.formats.base import check_choice
from qjax.formats.ggml import Ggml
from qjax.ggml import GgmlTensor
from qjax.methods.base import Method
from qjax.methods.statistics import Statistics

_FLOOR = 1e-6
MODES = ("llamacpp", "best")


@dataclasses.dataclass(frozen=True)
class GGML(Method):
    """The quantizers of llama.cpp for `Ggml` formats.

    Attributes:
      mode: `llamacpp`, the codes and scales that llama.cpp chooses, or `best`, which
        starts from those and only takes what lowers the weighted error of a block; see
        `qjax.methods.ggml_best`.

    Raises:
      SpecError: a field is out of range.
    """

    mode: str = "llamacpp"
    uses: ClassVar[frozenset[str]] = frozenset({"square"})

    def __post_init__(self) -> None:
        check_choice("GGML", "mode", self.mode, MODES)

    @property
    def name(self) -> str:
        """`ggml`."""
        return "ggml"

    def __call__(
        self,
        w: Float[Array, "*lead in out"],
        fmt: Format,
        *,
        importance: Float[Array, "..."] | None = None,
        key: Array | None = None,
        statistics: Statistics | None = None,
        shared: Any = None,
    ) -> GgmlTensor:
        """See `Method.__call__`; `importance` goes before `statistics`."""
        del key, shared
        if not isinstance(fmt, Ggml):
            raise SpecError(
                f"{self.name}: makes llama.cpp's blocks, got {fmt.name}; use "
                'fmt=Ggml("q4_k") or another of its types'
            )
        matrix = (w.shape[-2], w.shape[-1])
        fmt.grouping(matrix)
        from qjax.methods.ggml_best import REFINED
        from qjax.methods.ggml_encode import ENCODERS, encode  # many types, each a file

        best = self.mode == "best"
        if best and fmt.type not in REFINED:
            raise SpecError(
                f"{self.name}: no better blocks than llama.cpp's for {fmt.type}; use "
                f'mode="llamacpp", or one of {", ".join(sorted(REFINED))}'
            )

        weights = _imatrix(importance, statistics, w.shape)
        if weights is None and ENCODERS[fmt.type].needy:
            raise SpecError(
                f"{self.name}: {fmt.type} needs an imatrix, as in llama.cpp; pass "
                "calibration= when quantizing a model, or importance= or statistics= "
                "when quantizing an array"
            )

        def one(args):
            """One matrix of the leading axes."""
            w, weights = args
            return encode(fmt.type, w.astype(jnp.float32), weights, best=best)

        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[-2:]), (w, weights))
        codes = jax.lax.map(one, flat)
        return GgmlTensor(codes.reshape(*w.shape[:-2], *codes.shape[-2:]), fmt, matrix)


def _imatrix(importance, statistics: Statistics | None, shape) -> Array | None:
    """Weights of the errors of inputs `[*lead, in, 1]` (or `out`), or None."""
    if importance is None and statistics is None:
        return None
    if importance is None:
        assert statistics is not None
        unseen = statistics.count == 0
        importance = statistics.square / jnp.where(unseen, 1.0, statistics.count)
        importance = jnp.where(unseen, 1.0, importance)[:, None]
    importance = jnp.asarray(importance, jnp.float32)
    importance = importance.reshape((1,) * (2 - importance.ndim) + importance.shape)
    own = shape[-1] if importance.shape[-1] > 1 else 1
    importance = jnp.broadcast_to(importance, (*shape[:-1], own))
    mean = jnp.mean(importance, axis=(-2, -1), keepdims=True)
    floor = jnp.where(mean > 0, _FLOOR * mean, 1.0)
    return jnp.where(importance > 0, importance, floor)

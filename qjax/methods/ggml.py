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
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.formats.base import check_choice
from qjax.formats.ggml import Ggml
from qjax.ggml import GgmlTensor
from qjax.methods.base import Method
from qjax.methods.hessian import Curvature, curvature
from qjax.methods.layerwise import activation_order
from qjax.methods.statistics import Statistics

_FLOOR = 1e-6
MODES = ("llamacpp", "best")


@dataclasses.dataclass(frozen=True)
class GGML(Method):
    """The quantizers of llama.cpp for `Ggml` formats.

    Attributes:
      mode: `llamacpp`, the codes and scales that llama.cpp chooses, or `best`, which
        starts from those and only takes what lowers the error: with the Hessian of a
        layer's inputs that of the outputs, column by column (see
        `qjax.methods.ggml_feedback`), else the weighted error of a block (see
        `qjax.methods.ggml_best`).

    Raises:
      SpecError: a field is out of range.
    """

    mode: str = "llamacpp"

    def __post_init__(self) -> None:
        check_choice("GGML", "mode", self.mode, MODES)

    @property
    def name(self) -> str:
        """`ggml`, or `ggml-best`."""
        return "ggml" if self.mode == "llamacpp" else f"ggml-{self.mode}"

    @property
    def uses(self) -> frozenset[str]:
        """Mean squares of inputs and, for better blocks, their products."""
        more = {"hessian"} if self.mode == "best" else set()
        return frozenset({"square", *more})

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Curvature | None:
        """The factored Hessian, inputs by its falling diagonal."""
        del weights
        from qjax.methods.ggml_feedback import DAMP

        if self.mode != "best" or statistics is None or statistics.hessian is None:
            return None
        order = activation_order(jnp.diagonal(statistics.hessian), True, fmt)
        return curvature(statistics.hessian, order, damp=DAMP)

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
        del key
        if not isinstance(fmt, Ggml):
            raise SpecError(
                f"{self.name}: makes llama.cpp's blocks, got {fmt.name}; use "
                'fmt=Ggml("q4_k") or another of its types'
            )
        matrix = (w.shape[-2], w.shape[-1])
        fmt.grouping(matrix)
        from qjax.methods.ggml_encode import ENCODERS, encode  # many types, each a file
        from qjax.methods.ggml_feedback import fed_back
        from qjax.methods.ggml_kinds import BETTER

        best = self.mode == "best"
        if best and fmt.type not in BETTER:
            raise SpecError(
                f"{self.name}: no better blocks than llama.cpp's for {fmt.type}; use "
                f'mode="llamacpp", or one of {", ".join(sorted(BETTER))}'
            )

        weights = _imatrix(importance, statistics, w.shape)
        if weights is None and ENCODERS[fmt.type].needy:
            raise SpecError(
                f"{self.name}: {fmt.type} needs an imatrix, as in llama.cpp; pass "
                "calibration= when quantizing a model, or importance= or statistics= "
                "when quantizing an array"
            )

        hessian = None if statistics is None or not best else statistics.hessian
        if hessian is not None and shared is None:
            shared = self.prepare([], fmt, statistics)

        def one(args):
            """One matrix of the leading axes."""
            w, weights = args
            w = w.astype(jnp.float32)
            if hessian is None:
                return encode(fmt.type, w, weights, best=best)
            return fed_back(fmt.type, w, encode(fmt.type, w, weights), shared, hessian)

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

"""GPTQ: rows are rounded one by one, and those left make up for the errors so far.

    v_i = round(w_i + sum_{j < i} M_ji (w_j - v_j)),   H + lambda I = M D M^T,

with `H` the second moments of the layer's inputs. It is the update of the original,
written with a factor of `H` instead of one of its inverse. Inputs that never fire are
rounded to nearest (the original sets their weights to zero).

Reference: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers, arXiv 2210.17323; activation order and static groups as in
its repository, group-aware order as in GPTQModel (`act_group_aware`).
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.formats.base import check_choice
from qjax.methods.base import Method
from qjax.methods.hessian import Curvature, curvature
from qjax.methods.layerwise import (
    ORDERS,
    activation_order,
    check_format,
    is_static,
    quantize_rows,
)
from qjax.methods.ranges import RANGES
from qjax.methods.statistics import Statistics
from qjax.tensor import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class GPTQ(Method):
    """Error feedback under the Hessian of the layer's inputs.

    Attributes:
      damp: share of the mean diagonal of the Hessian that is added to it; multiplied by
        ten while the Hessian has no Cholesky factor.
      act_order: round inputs by falling diagonal of the Hessian: False; `"group"`, the
        inputs inside each group and the groups, which needs no permutation; or True,
        all inputs. With True, groups are formed in that order and the result is
        `Permuted`, unless scales are static or do not depend on the order.
      static_groups: choose the scales of all groups before the first row is rounded
        (True), or each when the loop reaches it (False). None: True for `minmax`, whose
        extremes grow with the errors that rows take over, and for scales that are
        quantized themselves; False for scales that are searched.
      range: how scales are chosen: `minmax`, `mse` (weighted by the Hessian's diagonal)
        or `hessian` (least error of the layer's output); see `qjax.methods.ranges`.

    Raises:
      SpecError: a field is out of range.
    """

    damp: float = 0.01
    act_order: bool | str = False
    static_groups: bool | None = None
    range: str = "minmax"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        check_feedback(self)

    @property
    def name(self) -> str:
        """`gptq`, or `gptq-act-order`, `gptq-hessian` and so on."""
        return feedback_name("gptq", self)

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Curvature:
        """The factored Hessian, in the order of rounding; see `check_curvature`."""
        del weights
        h = self.check_statistics(statistics).hessian
        assert h is not None  # check_statistics
        order = activation_order(jnp.diagonal(h), self.act_order, fmt)
        return curvature(h, order, damp=self.damp)

    def __call__(
        self,
        w: Float[Array, "in out"],
        fmt: Format,
        *,
        importance: Float[Array, "..."] | None = None,
        key: Array | None = None,
        statistics: Statistics | None = None,
        shared: Any = None,
    ) -> QuantizedTensor:
        """See `Method.__call__`; `importance` is what the Hessian stands for."""
        del importance, key
        check_format(self.name, fmt, w)
        static = self.static_groups
        if static is None and self.range == "minmax":
            static = True
        static = is_static(fmt, static, w.shape[0])
        if shared is None:
            shared = self.prepare([w], fmt, statistics)
        grouped = self.act_order == "group"
        return quantize_rows(
            w, fmt, shared, rule=self.range, static=static, grouped=grouped
        )


class DriftGPTQ(GPTQ):
    """GPTQ whose weight is corrected for what earlier layers did to the inputs.

    Needs the inputs of the original model besides those of the quantized one
    (`Statistics.cross`).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "cross"})

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Curvature:
        """The factored Hessian, and how the weight is corrected."""
        shared = super().prepare(weights, fmt, statistics)
        assert statistics is not None  # checked there
        return self.corrected(statistics.hessian, statistics.cross, shared)

    @abc.abstractmethod
    def corrected(self, h: Any, cross: Any, shared: Curvature) -> Curvature:
        """The factor with the correction, from second and cross moments."""


def check_feedback(method: Any) -> None:
    """Raises SpecError unless the fields that these methods share are in range."""
    where = type(method).__name__
    number = isinstance(method.damp, int | float) and 0 <= method.damp < float("inf")
    if isinstance(method.damp, bool) or not number:
        raise SpecError(
            f"{where}: damp is {method.damp!r}, expected a share of the mean diagonal, "
            "0 or more"
        )
    check_choice(where, "act_order", method.act_order, ORDERS)
    check_choice(where, "static_groups", method.static_groups, (None, False, True))
    check_choice(where, "range", method.range, RANGES)


def feedback_name(start: str, method: Any) -> str:
    """Name of a method with the options that change its result most."""
    order = {False: [], True: ["act-order"], "group": ["group-order"]}
    parts = [start, *order[method.act_order]]
    parts += ["static"] if method.static_groups else []
    return "-".join([*parts, *([] if method.range == "minmax" else [method.range])])

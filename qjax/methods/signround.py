"""SignRound (AutoRound): rounding and ranges learned by signed gradient descent.

For every weight an offset `v` in [-0.5, 0.5] chooses between rounding down and up, and
multipliers move the ends of each group's range (`qjax.methods.rounding`). Both follow
the sign of the gradient with a learning rate that falls linearly to zero,

    v <- clip(v - lr (1 - t / steps) sign(dL / dv)),

so that with `lr = 1 / steps` every offset can just travel its whole range. `L` is

* for a block (`tune_block`): the squared error of the block's output against the
  original block, on mini-batches of calibration samples;
* for one matrix (calling the method): `tr(E^T H E)`, `E` the rounding error and `H` the
  second moments of the inputs, without mini-batches.

Differences from the reference package: the iterate kept is chosen by the error over all
samples at a few checks, not by that of one mini-batch; ranges start from any rule of
`RTN`; symmetric formats keep positive scales.

Memory of `tune_block`: the samples, activations of one mini-batch, and about eight
float32 copies of the block's weights.

Reference: Cheng et al., Optimize Weight Rounding via Signed Gradient Descent, arXiv
2309.05516, algorithm 1; auto-round `wrapper.py`, `sign_sgd.py`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.formats.base import check_choice
from qjax.methods.base import Method
from qjax.methods.blockwise import (
    Apply,
    BlockReport,
    Samples,
    check_steps,
    descend,
    order_of,
    report_of,
)
from qjax.methods.rounding import Offsets, Rounding, check_format
from qjax.methods.rtn import RTN, RULES
from qjax.methods.statistics import Statistics
from qjax.tensor import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class SignRound(Method):
    """Learned rounding, for `Int`, `NF4`, `FP4`, `MXFP4` and `NVFP4`.

    Called on one matrix it minimizes the layer's own output error; a model is better
    served block by block, with `tune_block`.

    Attributes:
      steps: of signed gradient descent.
      lr: first learning rate of the offsets; None for `1 / steps`.
      minmax_lr: first learning rate of the range multipliers; None for `lr`; 0 leaves
        ranges as the rule chose them.
      batch: calibration samples per step, for blocks.
      checks: how many times a block's error over all samples is measured.
      seed: of the order of samples.
      rule: of `RTN`, for the ranges to start from; `auto` is the reference package's.

    Raises:
      SpecError: a field is out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    steps: int = 200
    lr: float | None = None
    minmax_lr: float | None = None
    batch: int = 8
    checks: int = 5
    seed: int = 0
    rule: str = "auto"

    def __post_init__(self) -> None:
        check_steps("SignRound", steps=self.steps, batch=self.batch, checks=self.checks)
        check_choice("SignRound", "rule", self.rule, RULES)
        lr_ok = self.lr is None or self.lr > 0
        minmax_ok = self.minmax_lr is None or self.minmax_lr >= 0
        if not (lr_ok and minmax_ok and type(self.seed) is int and self.seed >= 0):
            raise SpecError(
                "SignRound: needs lr > 0 or None, minmax_lr >= 0 or None and a "
                f"non-negative integer seed; got lr={self.lr}, "
                f"minmax_lr={self.minmax_lr}, seed={self.seed!r}"
            )

    @property
    def name(self) -> str:
        """`signround`."""
        return "signround"

    def __call__(
        self,
        w: Float[Array, "*lead in out"],
        fmt: Format,
        *,
        importance: Float[Array, "..."] | None = None,
        key: Array | None = None,
        statistics: Statistics | None = None,
        shared: Any = None,
    ) -> QuantizedTensor:
        """See `Method.__call__`. `importance` weighs the `mse` rule only."""
        del key, shared
        check_format(self.name, fmt)
        hessian = self.check_statistics(statistics).mean_hessian()
        if w.ndim != 2 or hessian.shape[0] != w.shape[0]:
            raise SpecError(
                f"{self.name}: weight {list(w.shape)} and Hessian "
                f"{list(hessian.shape)}; expected [in, out] and [in, in]"
            )
        w = w.astype(jnp.float32)
        if importance is None:
            importance = jnp.diagonal(hessian)[:, None]
        rounding = self.start(w, fmt, importance)

        def error(offsets):
            miss = rounding.fake(offsets) - w
            return jnp.sum(miss * jnp.matmul(hessian, miss, precision="highest"))

        def step(t, carry):
            offsets, best, least = carry
            loss, slope = jax.value_and_grad(error)(offsets)
            best, least = _better(offsets, loss, best, least)
            return self.move(offsets, slope, t), best, least

        start = rounding.start()
        carry = (start, start, jnp.asarray(jnp.inf, jnp.float32))
        last, best, least = lax.fori_loop(0, self.steps, step, carry)
        best, _ = _better(last, error(last), best, least)
        return rounding.freeze(best)

    def start(self, w: Any, fmt: Format, importance: Any = None) -> Rounding:
        """The weight with the range that the rule fits."""
        return Rounding.build(w, fmt, RTN(self.rule).fit, importance)

    def move(self, offsets: Offsets, slope: Offsets, step: Any) -> Offsets:
        """One step of signed gradient descent.

        Args:
          offsets: before the step.
          slope: gradient there.
          step: number of the step, from 0.
        """
        lr = 1.0 / self.steps if self.lr is None else self.lr
        ends = lr if self.minmax_lr is None else self.minmax_lr
        rates = Offsets(lr, ends, None if offsets.low is None else ends)  # pyright: ignore[reportArgumentType]
        left = 1.0 - step.astype(jnp.float32) / self.steps

        def down(x, g, rate):
            return x - rate * left * jnp.sign(g)

        return jax.tree.map(down, offsets, slope, rates).clipped()


def tune_block(
    apply: Apply,
    weights: Mapping[str, Float[Array, "in out"]],
    formats: Mapping[str, Format],
    inputs: Float[Array, "samples time dim"],
    targets: Float[Array, "samples time dim"],
    method: SignRound | None = None,
    *,
    rest: Any = None,
    mask: Any = None,
    importance: Mapping[str, Any] | None = None,
) -> tuple[dict[str, QuantizedTensor], BlockReport]:
    """Quantizes all weights of a block together, for the block's output.

    The program is compiled once per `apply`, formats, method and shapes. To use it for
    all blocks of a model, pass the same function object each time, and in `rest`
    whatever differs between blocks (norms, biases, rotary tables, weights that stay).

    Args:
      apply: pure function `(weights, x)`, or `(weights, x, rest)` when `rest` is given,
        to the block's output; `weights` has the keys of `formats`, dense float32, and
        `x` is `[batch, time, dim]` for any batch.
      weights: dense weights by path, finite.
      formats: the number format of every weight.
      inputs: what enters the block in the model quantized so far.
      targets: what the original block returned for its own inputs.
      method: hyper-parameters; default `SignRound()`.
      rest: pytree for `apply`, not tuned.
      mask: 1 for tokens that count, 0 for padding, `[samples, time]`.
      importance: error weights for the `mse` rule, by path, broadcastable to the
        weight (for example the mean square of each input, `[in, 1]`).

    Returns:
      The quantized tensors by path, logical dtype that of the weight, whose dense
      values are those `apply` was last given for the kept iterate; and a report.

    Raises:
      SpecError: paths or shapes do not match, or rounding to a format cannot be
        learned.
      NonFiniteError: the error is not finite.
    """
    method = method or SignRound()
    if set(weights) != set(formats) or not weights:
        raise SpecError(
            f"tune_block: weights {sorted(weights)} and formats {sorted(formats)}; "
            "expected the same paths in both, at least one"
        )
    for path, fmt in formats.items():
        check_format(f"tune_block: {path}", fmt)
        if weights[path].ndim != 2:
            raise SpecError(
                f"tune_block: {path} has shape {list(weights[path].shape)}, expected "
                "[in, out]; pass the experts of a stack one by one"
            )
        fmt.grouping((weights[path].shape[0], weights[path].shape[1]))
    samples = Samples.build(inputs, targets, mask, rest, "tune_block")
    order = order_of(samples.inputs.shape[0], method.batch, method.steps, method.seed)
    packed, kept, checks, first = _tune(
        {path: jnp.asarray(weights[path]) for path in sorted(weights)},
        samples,
        order,
        dict(importance or {}),
        apply,
        tuple(formats[path] for path in sorted(formats)),
        method,
    )
    packed = {
        path: dataclasses.replace(q, dtype=jnp.dtype(weights[path].dtype).name)
        for path, q in packed.items()
    }
    return packed, report_of(kept, checks, first, "tune_block")


@functools.partial(jax.jit, static_argnames=("apply", "formats", "method"))
def _tune(weights, samples: Samples, order, importance, apply, formats, method):
    roundings = {
        path: method.start(w, fmt, importance.get(path))
        for (path, w), fmt in zip(weights.items(), formats, strict=True)
    }

    def fake(offsets):
        return {path: r.fake(offsets[path]) for path, r in roundings.items()}

    def slope(offsets, index):
        def error(offsets):
            total, tokens = samples.error(apply, fake(offsets), index)
            return total / jnp.maximum(tokens, 1.0)

        return jax.grad(error)(offsets)

    def full(offsets):
        return samples.mean_error(apply, fake(offsets), order.shape[1])

    def update(offsets, slopes, state, step):
        moved = {p: method.move(offsets[p], slopes[p], step) for p in offsets}
        return moved, state

    start = {path: r.start() for path, r in roundings.items()}
    kept, checks, first = descend(start, (), update, slope, full, order, method.checks)
    packed = {path: r.freeze(kept.values[path]) for path, r in roundings.items()}
    kept = kept._replace(values=None)
    return packed, kept, checks, first


def _better(offsets, loss, best, least):
    """The offsets of the lesser loss, and that loss."""
    improved = loss < least
    best = jax.tree.map(lambda a, b: jnp.where(improved, a, b), offsets, best)
    return best, jnp.where(improved, loss, least)

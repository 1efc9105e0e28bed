"""End-to-end tuning of an already quantized model: codes stay, scales learn.

Adam on the continuous leaves (`qjax.methods.continuous`) minimizes the divergence from
the original model on calibration text,

    KL = mean over tokens of sum_v p_v (log p_v - log q_v),  p teacher, q student.

A slice of the calibration data is never trained on; the iterate with the least
divergence there is kept, in the dtypes that are stored, so that the result is never
worse than the start on it. Learning rates are relative to the size of each value.

Cost of a step: forward and backward of the quantized model, which `qjax.ops.matmul`
does without holding dense weights, and one forward pass of the teacher. Memory: three
float32 copies of the leaves that move, the activations of one batch, and the logits of
teacher and student.

Reference: Chen et al., EfficientQAT, arXiv 2407.11062, section 3.3 (E2E-QP: only
quantization parameters are trained end to end); Hinton et al., arXiv 1503.02531.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from qjax.errors import NonFiniteError, SpecError
from qjax.methods.continuous import Continuous, adam
from qjax.tensor import QuantizedTensor

Logits = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class TuningReport:
    """What end-to-end tuning did, all losses in nats per token.

    Attributes:
      start: divergence on the held-out batches before the first step.
      best: the same for what was kept.
      step: the step after which that was; 0 when tuning never helped.
      held_out: `(step, divergence)` at every check.
      training: divergence on the batch of each step.
    """

    start: float
    best: float
    step: int
    held_out: tuple[tuple[int, float], ...]
    training: tuple[float, ...]


def tune_scales(
    logits_fn: Logits,
    params: Any,
    batches: Sequence[Int[Array, "batch time"]],
    teacher: Callable[[Any], Any] | Sequence[Any],
    *,
    steps: int = 64,
    lr: float = 1e-3,
    held_out: int | None = None,
    checks: int = 4,
    vectors: bool = False,
    decoded: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Any, TuningReport]:
    """Tunes scales and other continuous leaves against the original model.

    Args:
      logits_fn: pure function `(params, tokens [batch, time]) -> [batch, time, vocab]`.
      params: pytree with quantized tensors, for example `decoder.params()`.
      batches: token batches, ideally of one shape (each shape compiles once). They are
        used in order and repeatedly; the last ones are held out.
      teacher: the original model's logits: a function of a batch of tokens (jit it), or
        one array per batch.
      steps: Adam steps, with a cosine decay of the learning rate to zero.
      lr: first learning rate, relative to the size of each value.
      held_out: batches at the end that are not trained on; default an eighth, at least
        one.
      checks: how many times the held-out divergence is measured on the way.
      vectors: also tune norms and biases (float leaves of rank 1).
      decoded: give `logits_fn` dense weights, decoded once per step. Faster where
        products with dense weights are; memory is that of the dense model, twice.
      progress: called with the step and its training loss.

    Returns:
      The tuned parameters, of the same structure, shapes and dtypes, and a report.

    Raises:
      SpecError: too few batches, an option out of range, or nothing to tune.
      NonFiniteError: the divergence before the first step is not finite.
    """
    batches = list(batches)
    kept = max(1, len(batches) // 8) if held_out is None else held_out
    _check(batches, teacher, steps, lr, kept, checks)
    split = Continuous.split(params, vectors=vectors, where="tune_scales")
    runner = _Runner(logits_fn, split, batches, teacher, adam(lr, steps), decoded)
    held = range(len(batches) - kept, len(batches))
    deltas = split.zeros()
    state = runner.init(deltas)
    best = start = runner.held_out(deltas, held)
    if not np.isfinite(start):
        raise NonFiniteError(
            f"tune_scales: the divergence from the teacher is {start} before any step; "
            "expected finite logits from both models"
        )
    kept_deltas, kept_step = deltas, 0
    checked, training = [(0, start)], []
    marks = {-(-steps * (i + 1) // checks) for i in range(checks)}
    for step in range(1, steps + 1):
        index = (step - 1) % (len(batches) - kept)
        deltas, state, loss = runner.step(deltas, state, index)
        training.append(loss)
        if progress is not None:
            progress(step, loss)
        if step in marks:
            checked.append((step, runner.held_out(deltas, held)))
            if checked[-1][1] < best:
                best, kept_deltas, kept_step = checked[-1][1], deltas, step
    report = TuningReport(start, best, kept_step, tuple(checked), tuple(training))
    return split.merge(kept_deltas, stored=True), report


def kl_divergence(
    teacher: Float[Array, "*batch vocab"], student: Float[Array, "*batch vocab"]
) -> Float[Array, ""]:
    """Mean divergence of the student's distribution from the teacher's, in nats.

    Args:
      teacher: logits.
      student: logits of the same shape.
    """
    p = jax.nn.log_softmax(teacher.astype(jnp.float32), axis=-1)
    q = jax.nn.log_softmax(student.astype(jnp.float32), axis=-1)
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))


class _Runner:
    """Compiled training and evaluation steps over the batches of one run."""

    def __init__(self, logits_fn, split, batches, teacher, rule, decoded):
        self._split, self._batches, self._teacher = split, batches, teacher
        self.init = rule.init

        def loss(deltas, split, tokens, target, *, stored):
            params = split.merge(deltas, stored=stored)
            params = decode(params) if decoded else params
            return kl_divergence(target, logits_fn(params, tokens))

        @functools.partial(jax.jit, donate_argnums=1)
        def step(deltas, state, split, tokens, target):
            value, slope = jax.value_and_grad(functools.partial(loss, stored=False))(
                deltas, split, tokens, target
            )
            updates, state = rule.update(slope, state)
            return optax.apply_updates(deltas, updates), state, value

        self._step = step
        self._loss = jax.jit(functools.partial(loss, stored=True))

    def step(self, deltas, state, index):
        tokens, target = self._batch(index)
        deltas, state, loss = self._step(deltas, state, self._split, tokens, target)
        return deltas, state, float(loss)

    def held_out(self, deltas, held) -> float:
        """Mean divergence over the tokens of the held-out batches, as stored."""
        total = count = 0.0
        for index in held:
            tokens, target = self._batch(index)
            loss = self._loss(deltas, self._split, tokens, target)
            total += float(loss) * tokens.size
            count += tokens.size
        return total / count

    def _batch(self, index):
        tokens = jnp.asarray(self._batches[index])
        made = callable(self._teacher)
        return tokens, self._teacher(tokens) if made else self._teacher[index]


def decode(params: Any) -> Any:
    """The same parameters with every quantized tensor dense, float32."""

    def dense(node):
        packed = isinstance(node, QuantizedTensor)
        return node.dequantize(jnp.float32) if packed else node

    return jax.tree.map(dense, params, is_leaf=lambda x: isinstance(x, QuantizedTensor))


def _check(batches, teacher, steps, lr, kept, checks):
    counts = {"steps": steps, "held_out": kept, "checks": checks}
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise SpecError(
                f"tune_scales: {name} is {value!r}, expected a positive integer"
            )
    if not lr > 0:
        raise SpecError(f"tune_scales: lr is {lr!r}, expected a positive number")
    if len(batches) <= kept:
        raise SpecError(
            f"tune_scales: {len(batches)} batches, {kept} of them held out, leave none "
            "to train on; pass more batches"
        )
    if not callable(teacher) and len(teacher) != len(batches):
        raise SpecError(
            f"tune_scales: {len(teacher)} teacher logits for {len(batches)} batches; "
            "expected one array per batch, or a function of tokens"
        )

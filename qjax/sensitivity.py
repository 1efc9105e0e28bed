"""What quantizing some kernels alone does to a model's predictions.

Kernels are given the errors of a cheap probe, one unit after the other (`by_kl`), or
their effect is predicted from gradients of the loss (`by_gradient`). `distortion` says
how much better or worse a candidate is than the probe.

Reference: Dong et al., HAWQ, arXiv 1905.03696 (sensitivity by layer).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.evaluate import Windows, as_scorer, score_windows
from qjax.formats import Format, Int
from qjax.methods import RTN, Method, Statistics, needs_of, quantize
from qjax.models import Decoder

PROBE = Int(3, "channel", symmetric=False), RTN("mse")
"""What sensitivity is measured with; fits matrices of any shape."""

Units = Sequence[tuple[str, ...]]
Progress = Callable[[int, int, str], None]


@functools.cache
def distortion(fmt: Format, method: Method) -> float:
    """Mean squared error on a `[256, 256]` standard normal matrix, white inputs."""
    w = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    statistics = None
    if needs_of(method):
        x = jnp.eye(256, dtype=jnp.float32)
        zeros = Statistics.zeros(256, hessian=True, cross=True, gradient=(256, 256))
        statistics = dataclasses.replace(zeros.add(x, x), gradient=jnp.ones(w.shape))
    q = quantize(w, fmt, method, statistics=statistics)
    return float(jnp.mean(jnp.square(q.dequantize(jnp.float32) - w)))


def by_kl(
    model: Decoder,
    params: Mapping[str, Any],
    units: Units,
    tokens: np.ndarray,
    progress: Progress | None,
) -> np.ndarray:
    """KL divergence from the original when one unit alone has the probe's errors.

    Args:
      model: the dense model.
      params: its parameters by path.
      units: paths of kernels that are quantized together.
      tokens: int32 `[windows, time]`.
      progress: called with units done, their number and a name.
    """
    baseline = as_scorer(model)
    count, time = tokens.shape
    windows = Windows(
        tokens.reshape(-1),
        time,
        start=np.arange(count) * time,
        length=np.full(count, time),
        first=np.ones(count, np.int64),
    )
    found = []
    for i, unit in enumerate(units):
        changed = dict(params)
        for path in unit:
            q = quantize(params[path], *PROBE, name=path)
            changed[path] = q.dequantize().astype(params[path].dtype)
        other = as_scorer(Decoder(model.config, changed, dtype=model.dtype))
        scores = score_windows(other, windows, baseline=baseline)
        assert scores.kl is not None  # there is a baseline
        found.append(max(float(np.mean(scores.kl, dtype=np.float64)), 1e-12))
        if progress is not None:
            progress(i + 1, len(units), unit[0])
    return np.array(found)


def by_gradient(
    model: Decoder,
    params: Mapping[str, Any],
    units: Units,
    tokens: np.ndarray,
    progress: Progress | None,
) -> np.ndarray:
    """`1/2 sum E[g^2] delta^2` per unit, `g` the gradient of a window's mean loss.

    Args:
      model: the dense model.
      params: its parameters by path.
      units: paths of kernels that are quantized together.
      tokens: int32 `[windows, time]`.
      progress: called with windows done, their number and a name.
    """
    kernels = {path: params[path] for unit in units for path in unit}

    def loss(kernels, window):
        changed = Decoder(model.config, {**params, **kernels}, dtype=model.dtype)
        logits, _ = changed(window[None, :-1])
        logp = jax.nn.log_softmax(logits[0].astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(logp, window[1:, None], axis=-1))

    run = jax.jit(jax.grad(loss))
    total = {path: 0.0 for path in kernels}
    miss = {
        path: jnp.square(quantize(w, *PROBE).dequantize(jnp.float32) - w)
        for path, w in kernels.items()
    }
    for i, window in enumerate(jnp.asarray(tokens)):
        gradient = run(kernels, window)
        for path in kernels:
            score = jnp.sum(jnp.square(gradient[path].astype(jnp.float32)) * miss[path])
            total[path] += float(score)
        if progress is not None:
            progress(i + 1, len(tokens), "gradients")
    # Squared gradients of a mean over tokens are 1 / time of those of single tokens.
    scale = 0.5 * (tokens.shape[1] - 1) / len(tokens)
    return np.array([max(scale * sum(total[p] for p in u), 1e-12) for u in units])


SCORES = {"kl": by_kl, "gradient": by_gradient}
"""Ways to measure sensitivity."""

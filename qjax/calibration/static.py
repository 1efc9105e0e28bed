"""Static scales of rounded activations, by any observer.

Weights are quantized first, with scales of their own per row; then the quantized model
runs over the calibration text, and an observer of each weight's activations chooses the
one scale that takes their place.

Reference: Xiao et al., SmoothQuant, arXiv 2211.10438, section 2 (static and dynamic).
"""

import dataclasses
from typing import Any

from jaxtyping import Array

from qjax.calibration.blocks import BlockStream
from qjax.calibration.observers import MinMax, Observer, static_scale
from qjax.calibration.windows import calibration_windows
from qjax.errors import SpecError
from qjax.models.decoder import Decoder
from qjax.wrappers import RoundedInputs, Wrapper


def static_inputs(
    model: Decoder, tokens: Any, observer: Observer | None = None, *, batch: int = 8
) -> Decoder:
    """Gives the rounded activations of a model's blocks static scales.

    Args:
      model: with weights in `RoundedInputs`, such as recipe `w8a8` makes.
      tokens: token ids `[windows, time]` or `[tokens]`.
      observer: chooses the range of each weight's activations; default `MinMax()`.
      batch: windows per step.

    Returns:
      The model with a scale in every `RoundedInputs` of its blocks. That of a head
      stays as it is.

    Raises:
      SpecError: no weight rounds its activations; `tokens` are not token ids.

    Example:
      >>> model = qjax.quantize_model(path, "w8a8", calibration=tokens)
      >>> model = static_inputs(model, tokens, Percentile(99.99))
    """
    observer = observer or MinMax()
    ids = calibration_windows(tokens, vocab_size=model.config.vocab_size)
    stream = BlockStream(model.config, ids, model.dtype, batch=batch)
    params, found = model.params(), 0
    stream.embed(params, params)
    for layer in range(model.config.layers):
        start = f"layers.{layer}."
        own = {p[len(start) :]: w for p, w in params.items() if p.startswith(start)}
        rounded = {p: _activation(w) for p, w in own.items()}
        which = {p: name for p, name in rounded.items() if name is not None}
        if which:
            states = stream.observe(layer, own, observer, which)
            for path, name in which.items():
                scale = static_scale(observer, states[path], name)
                own[path] = params[start + path] = _with_scale(own[path], scale)
        found += len(which)
        stream.advance(layer, own, own)
    if not found:
        raise SpecError(
            "static_inputs: no weight of a block rounds its activations; quantize with "
            "a recipe such as w8a8, or methods in RoundInputs"
        )
    made = Decoder(model.config, params, dtype=model.dtype)
    made.assets, made.report = model.assets, model.report
    return made


def _activation(w: Any) -> str | None:
    """What a weight rounds activations to."""
    while isinstance(w, Wrapper):
        if isinstance(w, RoundedInputs):
            return w.activation
        w = w.base
    return None


def _with_scale(w: Any, scale: Array) -> Any:
    """A weight whose `RoundedInputs` has a static scale."""
    if isinstance(w, RoundedInputs):
        return dataclasses.replace(w, scale=scale)
    return dataclasses.replace(w, base=_with_scale(w.base, scale))

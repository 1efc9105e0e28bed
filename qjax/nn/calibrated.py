"""Freezing a layer with statistics of its inputs, each expert with its own.

A batched kernel `[*batch, in, out]` is quantized matrix after matrix, so that one
factored Hessian is in memory at a time; matrices that calibration says too little about
fall back (`qjax.methods.fallback`). What was done otherwise than the recipe asks is the
layer's `note`.
"""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.errors import NonFiniteError, SpecError
from qjax.formats import Format
from qjax.methods import Method, Statistics, needs_of, prepare, quantize
from qjax.methods.fallback import Choice, choose, equal_inputs
from qjax.methods.hessian import damping_raised, singular
from qjax.nn.base import QuantizedLayer, QuantizedParam
from qjax.tensor import QuantizedTensor

_log = logging.getLogger(__name__)


def freeze_calibrated(
    layer: QuantizedLayer, path: str, statistics: Statistics | None, nonfinite: str
) -> None:
    """Stores codes made with statistics, and warns of what was done otherwise.

    Args:
      layer: on the fly, with a method that uses statistics.
      path: what errors and warnings call the weight.
      statistics: of its inputs; None when calibration did not see it.
      nonfinite: see `qjax.quantize`.

    Raises:
      SpecError: the statistics are of another kernel.
      NonFiniteError: the weight or a Hessian holds NaN or infinity.
    """
    fmt, method = layer.format, layer.method
    assert fmt is not None and method is not None  # callers check
    w = layer.to_matrix(layer.variable.get_value())
    features = w.shape[layer.weight_axis]
    if statistics is None:
        needs = needs_of(method)
        statistics = Statistics.zeros(
            features, hessian="hessian" in needs, cross="cross" in needs
        )
    lead = statistics.count.shape
    if lead not in ((), w.shape[:-2]) or statistics.total.shape[-1] != features:
        raise SpecError(
            f"{path}: its statistics are sums [batch, in] of shape "
            f"{[*statistics.total.shape]}, but the kernel is {[*w.shape]}; pass what "
            "calibrate gave for this very layer"
        )
    if lead:
        packed, layer.method, note = _each(w, fmt, method, statistics, path, nonfinite)
    else:
        choice = choose(method, fmt, statistics)
        packed, note = _one(w, fmt, choice, path, nonfinite, layer.weight_axis)
        layer.method = choice.method
    if note:
        layer.note = note
        _log.warning("%s: %s", path, note)
    setattr(layer, layer.weight_name, QuantizedParam(packed))


def _each(
    w: Float[Array, "*lead in out"],
    fmt: Format,
    method: Method,
    statistics: Statistics,
    path: str,
    nonfinite: str,
) -> tuple[QuantizedTensor, Method, str]:
    """Quantizes a stack matrix by matrix; the tensor, its method and the note."""
    lead = statistics.count.shape
    made: dict[tuple[int, ...], QuantizedTensor] = {}
    notes: dict[str, list[Any]] = {}
    choices = {
        index: choose(method, fmt, statistics.part(index))
        for index in np.ndindex(*lead)
    }
    # Fallbacks come last: they take the layout of the others.
    for index in sorted(choices, key=lambda i: bool(choices[i].reason)):
        choice, name = choices[index], f"{path}{[*index]}"
        q, note = _one(w[index], fmt, choice, name, nonfinite)
        first = next(iter(made.values()), q)
        if choice.reason and _layout(q) != _layout(first):
            why = choice.reason.partition(";")[0]
            reason = f"{why}; {method.name} with equal inputs instead"
            equal = equal_inputs(statistics.part(index))
            choices[index] = Choice(method, equal, reason)
            q, note = _one(w[index], fmt, choices[index], name, nonfinite)
        if _layout(q) != _layout(first):
            raise SpecError(
                f"{name}: {method.name} gives it another layout than the matrices "
                "before it, so they cannot be stacked; use a method whose result does "
                "not depend on the inputs' values, such as GPTQ"
            )
        made[index] = q
        if note:
            notes.setdefault(note, []).append(index[0] if len(lead) == 1 else index)

    def stack(*leaves: Array) -> Array:
        return jnp.stack(leaves).reshape(*lead, *leaves[0].shape)

    packed = jax.tree.map(stack, *(made[index] for index in np.ndindex(*lead)))
    used = {choice.method for choice in choices.values()}
    text = "; ".join(f"{sorted(which)}: {note}" for note, which in notes.items())
    return packed, used.pop() if len(used) == 1 else method, text


def _layout(q: QuantizedTensor) -> Any:
    """What two tensors have in common that can be stacked."""
    leaves, tree = jax.tree.flatten(q)
    return tree, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _one(
    w: Float[Array, "*lead in out"],
    fmt: Format,
    choice: Choice,
    name: str,
    nonfinite: str,
    axis: int = -2,
) -> tuple[QuantizedTensor, str]:
    """The quantized matrix, and what is to be noted of it."""
    method, statistics, note = choice
    options: dict[str, Any] = {"axis": axis, "nonfinite": nonfinite, "name": name}
    if statistics is None:
        return quantize(w, fmt, method, **options), note
    options["statistics"] = statistics
    if w.ndim == 2:
        # Bad weights are the business of `quantize`.
        clean = jnp.where(jnp.isfinite(w), w, jnp.zeros_like(w))
        clean = jnp.swapaxes(clean, axis, -2)
        options["shared"] = prepare(method, fmt, [clean], statistics)
        if raised := damping_raised(options["shared"], name):
            note = f"damping of its Hessian raised {raised} times"
    q = quantize(w, fmt, method, **options)
    if not all(_finite(leaf) for leaf in jax.tree.leaves(q)):
        raise NonFiniteError(singular(name, method.name))
    return q, note


def _finite(leaf: Array) -> bool:
    """Whether an array holds no NaN; codes that are not floats never do."""
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    return not floats or bool(jnp.isfinite(leaf.astype(jnp.float32)).all())

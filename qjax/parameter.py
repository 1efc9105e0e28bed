"""Quantizing one parameter by a recipe, and what the report says of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.artifact import tensor_report
from qjax.errors import NonFiniteError, SpecError
from qjax.methods import Statistics, quantize
from qjax.methods.array import check_finite, count_nonfinite
from qjax.methods.fallback import choose
from qjax.methods.hessian import output_error, singular
from qjax.methods.llm_int8 import trim
from qjax.recipes import Recipe
from qjax.tensor import QuantizedTensor

TABLES = ("embed.embedding", "embed.position")


def quantize_parameter(
    path: str,
    w: Any,
    recipe: Recipe,
    *,
    nonfinite: str = "raise",
    statistics: Statistics | None = None,
    shared: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Quantizes or keeps one parameter by a recipe.

    Args:
      path: dotted path, which rules match.
      w: float array. Embedding tables `[vocab, dim]` are quantized along `dim`.
      recipe: the rules.
      nonfinite: see `quantize`.
      statistics: of the inputs of `w`, for methods that need them.
      shared: what the rule's method prepared for these inputs.

    Returns:
      `(leaf, report)`: a quantized tensor with its format, method, error and size, or
      `w` itself with the reason it was kept.

    Raises:
      SpecError: `w` is quantized already, or the rule's format does not fit it.
      NonFiniteError: `w` holds NaN or infinity.
    """
    if isinstance(w, QuantizedTensor):
        raise SpecError(
            f"{path}: is already quantized ({w.format.name}); quantize the original "
            "model instead"
        )
    source, base = tensor_report(path, w), source_report(path, w)
    if nonfinite != "raise" and (bad := count_nonfinite(w)):
        base["nonfinite"] = bad
    rule = recipe.match(path, w.shape)
    if rule is None or rule.format is None:
        if nonfinite == "raise":
            check_finite(w, path)
        reason = "vector" if len(w.shape) < 2 else "kept by the recipe"
        kept = {"shape": source["shape"], "dtype": source["format"], "reason": reason}
        return w, {**kept, "nbytes": source["nbytes"], **base}
    method, known, reason = choose(rule.method, rule.format, statistics)
    if reason:
        shared, base["fallback"] = None, reason
    options: dict[str, Any] = {"axis": -1 if path in TABLES else -2}
    if known is not None:
        options |= {"statistics": known, "shared": shared}
    try:
        q = quantize(w, rule.format, method, nonfinite=nonfinite, name=path, **options)
    except SpecError as error:
        text = str(error)
        raise SpecError(text if path in text else f"{path}: {text}") from None
    q = trim(q)
    made = quantized_report(path, w, q, method.name)
    hessian = None if statistics is None else statistics.hessian
    if statistics is not None and hessian is not None and float(statistics.count):
        made["output_error"] = float(_output_error(jnp.asarray(w), q, hessian))
    return q, {**made, **base}


def source_report(path: str, w: Any) -> dict[str, Any]:
    """What the report says of a tensor before it is quantized."""
    nbytes = tensor_report(path, w)["nbytes"]
    count = nbytes // jnp.dtype(w.dtype).itemsize
    return {"parameters": count, "source_bytes": nbytes}


def quantized_report(path: str, w: Any, q: Any, method: str) -> dict[str, Any]:
    """What the report says of a quantized tensor."""
    error = float(_relative_error(jnp.asarray(w), q)) if q.size else 0.0
    if not np.isfinite(error):
        raise NonFiniteError(singular(path, method))
    return {**tensor_report(path, q), "method": method, "error": error}


@jax.jit
def _relative_error(w, q):
    """Root-mean-square error relative to that of the zero matrix."""
    w = jnp.nan_to_num(w.astype(jnp.float32))
    miss = jnp.sum(jnp.square(w - q.dequantize(jnp.float32)))
    return jnp.sqrt(miss / jnp.maximum(jnp.sum(jnp.square(w)), 1e-38))


@jax.jit
def _output_error(w, q, hessian):
    """Root-mean-square error of the layer's output, relative to that output."""
    w = jnp.nan_to_num(w.astype(jnp.float32))

    miss = jnp.sum(output_error(w - q.dequantize(jnp.float32), hessian))
    whole = jnp.sum(output_error(w, hessian))
    return jnp.sqrt(jnp.maximum(miss, 0.0) / jnp.maximum(whole, 1e-38))

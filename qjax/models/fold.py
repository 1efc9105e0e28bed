"""Absorbs the input scales of a decoder layer in its norms and dense layers.

After AWQ or SmoothQuant, query, key and value share one vector of input scales, and so
do gate and up: the norms before them absorb these. What reads attention's mix (the
output projection) or the MLP's hidden features (down) can only be absorbed by values
and up while those are dense; otherwise its `InputScaled` stays, one multiplication per
feature. `fold_layer` does what is exact for a configuration and leaves the rest.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from qjax.errors import QjaxError
from qjax.methods.fold import fold_into_norm, fold_into_previous
from qjax.models.config import ModelConfig
from qjax.models.weights import HEAD
from qjax.tensor import QuantizedTensor
from qjax.wrappers import InputScaled


def readers(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Norms whose only readers are linear layers: norm path to kernel paths.

    A norm that follows the residual sum feeds the next sum as well and is not listed.
    """
    if config.norm_after:
        return {}
    attention = tuple(f"attn.{name}.kernel" for name in "qkv")
    names = ("gate", "up") if config.gated else ("up",)
    return {
        "attn_norm": attention,
        "mlp_norm": tuple(f"mlp.{name}.kernel" for name in names),
    }


def fold_layer(config: ModelConfig, layer: Mapping[str, Any]) -> dict[str, Any]:
    """Folds input scales of one layer where that is exact.

    Args:
      config: the architecture.
      layer: parameters of one layer by path; a prefix such as `layers.3.` may precede
        all of them.

    Returns:
      The parameters with norms (and dense values or up projections) scaled, in float32,
      and the wrappers that they absorbed gone. The layer computes the same function up
      to float rounding.
    """
    found = next(iter(layer), "")
    prefix = found[: found.index(".", 7) + 1] if found.startswith("layers.") else ""
    out = dict(layer)
    for norm, kernels in readers(config).items():
        paths = [prefix + path for path in kernels]
        where = f"{prefix}{norm}"
        scale, bias, new = fold_into_norm(
            out.get(f"{where}.scale"),
            [out[path] for path in paths],
            bias=out.get(f"{where}.bias"),
            offset=config.norm_offset,
        )
        changed = {f"{where}.scale": scale, f"{where}.bias": bias}
        out |= {path: leaf for path, leaf in changed.items() if leaf is not None}
        out |= dict(zip(paths, new, strict=True))
    shared = (config.kv_heads, config.heads)
    _fold_previous(out, f"{prefix}attn.v", f"{prefix}attn.o.kernel", shared)
    down = out[f"{prefix}mlp.down.kernel"]
    if config.gated or (config.activation == "relu" and _positive(down)):
        _fold_previous(out, f"{prefix}mlp.up", f"{prefix}mlp.down.kernel", (1, 1))
    return out


def fold_params(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Folds the input scales of all layers, and of an untied head; see `fold_layer`.

    Args:
      config: the architecture.
      params: all parameters by path, such as `Decoder.params()` of a quantized model.
    """
    out = dict(params)
    for index in range(config.layers):
        prefix = f"layers.{index}."
        part = {path: leaf for path, leaf in params.items() if path.startswith(prefix)}
        out |= fold_layer(config, part)
    if config.final_norm and HEAD in out:
        scale, bias, (head,) = fold_into_norm(
            out.get("norm.scale"),
            [out[HEAD]],
            bias=out.get("norm.bias"),
            offset=config.norm_offset,
        )
        changed = {"norm.scale": scale, "norm.bias": bias, HEAD: head}
        out |= {path: leaf for path, leaf in changed.items() if leaf is not None}
    return out


def _positive(consumer: Any) -> bool:
    """Whether `relu(s x) = s relu(x)` for the consumer's input scale."""
    return isinstance(consumer, InputScaled) and bool(jnp.all(consumer.s > 0))


def _fold_previous(out: dict[str, Any], before: str, after: str, heads) -> None:
    """Folds in place if the previous layer is dense and heads agree."""
    kernel, consumer = out[f"{before}.kernel"], out[after]
    if isinstance(kernel, QuantizedTensor) or not isinstance(consumer, InputScaled):
        return
    bias = out.get(f"{before}.bias")
    try:
        kernel, bias, base = fold_into_previous(
            kernel, consumer, bias=bias, heads=heads
        )
    except QjaxError:  # heads that share values are scaled differently: stays as it is
        return
    out[f"{before}.kernel"], out[after] = kernel, base
    if bias is not None:
        out[f"{before}.bias"] = bias

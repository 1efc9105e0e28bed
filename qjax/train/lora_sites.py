"""Where adapters can go: the layers of a model that multiply by one matrix.

A layer of a scanned stack stands for several weights, each with our path
(`layers.3.attn.q`) and, in a `Decoder`, the name that its family's checkpoints give it
(`model.layers.3.self_attn.q_proj`). Layers that multiply but cannot have an adapter are
found too, with the reason: convolutions, subclasses that compute something of their
own, layers with a product function of their own.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qjax.models import Decoder, plan
from qjax.nn.base import QuantizedLayer, fake_quantize
from qjax.nn.einsum import QEinsum
from qjax.nn.lora import ADAPTED
from qjax.nn.swap import LAYERS, custom_function, dotted, equation_of
from qjax.ops import canonical
from qjax.tensor import QuantizedTensor

Place = tuple[Any, Any]
"""A module, list or dict, and the attribute, index or key of a layer in it."""

_OWN = (*ADAPTED, *ADAPTED.values())
_CONVOLUTIONS = (nnx.Conv, nnx.ConvTranspose)


@dataclasses.dataclass(eq=False)
class Site:
    """A layer that multiplies by a weight; of a stack, all its layers.

    Attributes:
      layer: The layer itself.
      places: Where it is; several if it is shared.
      paths: Our path of every weight in it.
      names: Other names of every weight.
      stacked: Whether the leaves have an axis of layers.
      reason: Why it cannot have an adapter, or nothing.
    """

    layer: Any
    places: list[Place]
    paths: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    stacked: bool
    reason: str = ""

    @property
    def embedding(self) -> bool:
        """Whether it is a table that is looked up."""
        return hasattr(self.layer, "embedding")

    @property
    def head(self) -> bool:
        """Whether it gives the logits, which `all-linear` leaves out."""
        return self.paths[0].split(".")[-1] in ("head", "lm_head")

    @property
    def adapter(self) -> Any:
        """The adapter that is there, or None."""
        return getattr(self.layer, "lora", None)

    def replace(self, layer: Any) -> None:
        """Puts another layer in its places."""
        for parent, name in self.places:
            if isinstance(parent, nnx.List | list | dict):
                parent[name] = layer
            else:
                setattr(parent, name, layer)
        self.layer = layer

    def converted(self) -> Any:
        """The layer as one of ours, which shares its variables."""
        kind = LAYERS.get(type(self.layer))
        build: Any = None if kind is None else kind.build
        return self.layer if build is None else build(self.layer, None, None)

    def shape(self) -> tuple[int, ...]:
        """Shape `[*lead, in, out]` of one weight in matrix form."""
        layer = self.converted()
        value = layer.variable.get_value()
        if not isinstance(value, QuantizedTensor):
            value = jax.eval_shape(layer.to_matrix, value)
        return tuple(value.shape[1:] if self.stacked else value.shape)

    def leaf(self, index: int) -> Any:
        """One weight in matrix form, dense or packed, as it lies at rest."""
        value = canonical(self.converted().variable.get_value())
        if self.stacked:
            value = jax.tree.map(lambda x: x[index], value)
        return self.matrix(value)

    def matrix(self, w: Any) -> Any:
        """A weight in matrix form, if it is not in it."""
        if isinstance(w, QuantizedTensor):
            return w
        return self.converted().to_matrix(jnp.asarray(w))

    def unmatrix(self, w: Any) -> Any:
        """A weight, or a stack of them, as the layer holds it."""
        layer = self.converted()
        if isinstance(w, QuantizedTensor) or not isinstance(layer, QEinsum):
            return w
        return layer.equation.from_matrix(w, layer.kernel_shape)

    def served(self, w: Any) -> Float[Array, "*lead in out"]:
        """What the layer multiplies by if its weight is `w`, float32."""
        layer = self.converted()
        if layer.format is None or isinstance(w, QuantizedTensor):
            return dense(w)
        return dense(fake_quantize(w, layer.format, layer.method, layer.weight_axis))


def dense(leaf: Any) -> Float[Array, "*lead in out"]:
    """A weight as float32."""
    if isinstance(leaf, QuantizedTensor):
        return leaf.dequantize("float32")
    return leaf.astype("float32")


def sites(model: Any) -> list[Site]:
    """Every layer of a model that multiplies by a weight, in the order of paths.

    Args:
      model: A `Decoder`, or any NNX module that holds layers.
    """
    found: dict[int, Site] = {}
    names = _foreign(model)
    for parts, parent in nnx.iter_graph(model):
        for name, layer in _children(parent):
            if not isinstance(layer, (QuantizedLayer, *LAYERS)):
                continue
            if id(layer) in found:
                found[id(layer)].places.append((parent, name))
                continue
            paths = _paths(model, (*parts, name))
            stacked = isinstance(model, Decoder) and paths[0].startswith("layers.")
            others = tuple(names.get(path, ()) for path in paths)
            reason = _reason(layer)
            if isinstance(parent, tuple):
                reason = "is in a tuple, where it cannot be replaced"
            site = Site(layer, [(parent, name)], paths, others, stacked, reason)
            found[id(layer)] = site
    return sorted(found.values(), key=lambda site: _order(site.paths[0]))


def _children(parent: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(parent, nnx.List | list | tuple):
        yield from enumerate(parent)
    elif isinstance(parent, dict):
        yield from list(parent.items())
    elif isinstance(parent, nnx.Module):
        yield from list(vars(parent).items())


def _reason(layer: Any) -> str:
    """Why a layer cannot have an adapter, or nothing."""
    kind = type(layer)
    if isinstance(layer, _CONVOLUTIONS) or not issubclass(kind, (*_OWN, *LAYERS)):
        return f"a {kind.__name__} has no adapters"
    if kind not in _OWN and kind not in LAYERS:
        return f"a {kind.__name__} computes something of its own"
    if getattr(layer, "qat", None) is not None:
        return "is in quantization-aware training, which takes QAT(lora=...)"
    if name := custom_function(layer):
        return f"its {name} is a function of its own"
    equation = equation_of(layer)
    return str(equation) if isinstance(equation, Exception) else ""


def _order(path: str) -> list[tuple[int, int, str]]:
    parts = path.split(".")
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]


def _paths(model: Any, parts: tuple[Any, ...]) -> tuple[str, ...]:
    """Our paths of the weights of a layer at these attributes."""
    if not isinstance(model, Decoder):
        return (dotted(parts),)
    if parts[0] == "layers":
        start, stop = model.runs[int(parts[1])]
        rest = dotted(parts[2:])
        return tuple(f"layers.{i}.{rest}" for i in range(start, stop))
    tables = {"embed.tokens": "embed", "embed.places": "embed.position"}
    path = dotted(parts)
    return (tables.get(path, path),)


def _foreign(model: Any) -> dict[str, tuple[str, ...]]:
    """Names in checkpoints of a decoder's family by our path."""
    if not isinstance(model, Decoder):
        return {}
    names: dict[str, list[str]] = {}
    for entry in plan(model.config):
        for path in entry.paths:
            own = path.removesuffix(".kernel").removesuffix(".embedding")
            for name in (entry.name, *entry.aliases):
                names.setdefault(own, []).append(name.removesuffix(".weight"))
    return {path: tuple(own) for path, own in names.items()}

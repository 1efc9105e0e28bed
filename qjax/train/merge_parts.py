"""Merging an adapter into weights, and measuring what that costs.

A model is trained and served as `served = W + delta`, `W` the base with its rounding
(packed or not) and `delta` all that the adapter changes, magnitudes of DoRA included.

* `dequantized`: `served`, dense, rounded to the dtype of the original once.
* `requantized`: `served` rounded to the base's own formats again. That is coarser than
  most adapters are fine; QA-LoRA over real zero-points is exact (see `requantize`).
* `original`: the 16-bit model before quantization, with the adapter. What quantization
  had done to `W`, which the adapter may have learned to undo, is gone, so the result is
  not the model that was trained; for most models it is the better one.

Every adapted weight is measured: `error` is the norm of `merged - served`, `rounding`
that of what rounding alone did, `delta` that of the change itself. Errors above the
delta mean that the adapter is lost in them. Memory is one layer.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp

from qjax.converters.adapters import attached, merged
from qjax.converters.peft_settings import Adapter, Factors
from qjax.errors import SpecError
from qjax.models import ModelConfig
from qjax.models.weights import EMBEDDING, HEAD
from qjax.nn.linear import transpose
from qjax.tensor import QuantizedTensor
from qjax.train.requantize import into_zero, requantize
from qjax.train.sources import Part

MODES = ("original", "dequantized", "requantized")


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """One merged weight; norms are Frobenius norms.

    Attributes:
      format: of the result, such as `bfloat16` or `int4-g64`.
      delta: norm of what the adapter changes.
      error: norm of the difference from the weight that was served unmerged.
      rounding: norm of what rounding the result changed.
    """

    format: str
    delta: float
    error: float
    rounding: float

    @property
    def relative(self) -> float | None:
        """`error / delta`; None if the adapter changes nothing."""
        return self.error / self.delta if self.delta else None


@dataclasses.dataclass
class MergeReport:
    """What became of an adapter.

    Attributes:
      mode: one of `MODES`.
      tensors: measures of every adapted weight, by path.
      replaced: tensors that the adapter held whole, by their names in its file.
    """

    mode: str
    tensors: dict[str, MergedTensor] = dataclasses.field(default_factory=dict)
    replaced: list[str] = dataclasses.field(default_factory=list)

    @property
    def relative(self) -> float | None:
        """Error over delta of all weights together; None if nothing changes."""
        delta = math.hypot(*(t.delta for t in self.tensors.values()))
        error = math.hypot(*(t.error for t in self.tensors.values()))
        return error / delta if delta else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        tensors = {
            path: dataclasses.asdict(own) | {"relative": own.relative}
            for path, own in self.tensors.items()
        }
        return {
            "mode": self.mode,
            "relative": self.relative,
            "tensors": tensors,
            "replaced": list(self.replaced),
        }


def merge_parts(
    config: ModelConfig,
    parts: Iterable[Part],
    adapter: Adapter,
    mode: str,
    report: MergeReport,
    *,
    originals: Iterable[Part] | None = None,
    recipe: str | None = None,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Merges part by part.

    Args:
      config: the base model.
      parts: its parameters, part by part, the embeddings first.
      adapter: what to merge.
      mode: one of `MODES`; see the module's header.
      report: is filled.
      originals: for `original`, the parts of the model before quantization.
      recipe: JSON of the recipe that the base was quantized with, or None.

    Yields:
      The parts of the merged model; see `qjax.converters.adapters.attached`.

    Raises:
      SpecError: an unknown mode, or originals of another model.
      FormatError, UnsupportedError: see `attached` and `requantize`.
    """
    check_mode(mode, originals is not None)
    report.replaced = [*adapter.saved, *adapter.base]
    source, base = parts, _identity
    if originals is not None:
        source, base = _in_step(parts, originals)
        recipe = None

    def adapt(path: str, leaf: Any, own: Factors) -> Any:
        dtype, before = leaf.dtype, dense(base(path, leaf))
        served = merged(before, own)
        target = merged(dense(leaf), own) if mode == "original" else served
        made = None
        if mode == "requantized" and isinstance(leaf, QuantizedTensor):
            made = into_zero(leaf, own)
            made = requantize(leaf, target, path) if made is None else made
        made = target.astype(dtype) if made is None else made
        report.tensors[path] = _measured(made, before, served, target)
        return made

    for layer, part in attached(config, source, adapter, recipe, adapt):
        if mode != "requantized":
            part = {path: _at_rest(leaf) for path, leaf in part.items()}
        yield layer, part


def check_mode(mode: str, original: bool) -> None:
    """Refuses an unknown mode, and one without the model that it needs."""
    if mode not in MODES:
        raise SpecError(f"merge: mode is {mode!r}, expected one of {', '.join(MODES)}")
    if original != (mode == "original"):
        needs = "mode 'original' needs" if mode == "original" else "only it takes"
        raise SpecError(f"merge: mode is {mode!r}; {needs} the original model")


def dense(leaf: Any) -> Any:
    """A weight, packed or not, in float32."""
    if isinstance(leaf, QuantizedTensor):
        return leaf.dequantize(jnp.float32)
    return jnp.asarray(leaf).astype(jnp.float32)


def _at_rest(leaf: Any) -> Any:
    return leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf


def _identity(_: str, leaf: Any) -> Any:
    return leaf


def _measured(made: Any, before: Any, served: Any, target: Any) -> MergedTensor:
    def norm(x: Any, y: Any) -> float:
        return float(jnp.linalg.norm(x - y))

    if isinstance(made, QuantizedTensor):
        name = made.format.name
    else:
        name = jnp.dtype(made.dtype).name
    w = dense(made)
    return MergedTensor(name, norm(served, before), norm(w, served), norm(w, target))


def _in_step(
    parts: Iterable[Part], originals: Iterable[Part]
) -> tuple[Iterator[Part], Callable[[str, Any], Any]]:
    """The originals, and what gives the base's weight of a path beside them."""
    held: dict[str, Any] = {}

    def walk() -> Iterator[Part]:
        ours = iter(parts)
        for layer, part in originals:
            _, own = next(ours, (None, {}))
            keep = {p: x for p, x in held.items() if p == EMBEDDING}
            held.clear()
            held.update({**keep, **own})
            shapes = [
                {p: tuple(leaf.shape) for p, leaf in one.items() if p != HEAD}
                for one in (part, own)
            ]
            if shapes[0] != shapes[1]:
                raise SpecError(
                    "merge: the original model has other weights than the base in "
                    f"{'the layers around' if layer is None else f'layer {layer}'}; "
                    "pass the model that the base was quantized from"
                )
            for path, leaf in part.items():
                if isinstance(leaf, QuantizedTensor):
                    raise SpecError(
                        f"merge: {path} of the original model is quantized; pass the "
                        "model as it was before"
                    )
            yield layer, part

    def base(path: str, _: Any) -> Any:
        if path == HEAD and HEAD not in held:  # tied
            return transpose(held[EMBEDDING])
        return held[path]

    return walk(), base

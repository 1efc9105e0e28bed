"""What quantizing a model tells: progress while it runs, a report when it is done."""

import dataclasses
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
      done: parts finished (embeddings, each layer, the end).
      total: parts in all.
      part: file name of the part just finished.
      resumed: the part was already there from an interrupted run.
      seconds: since the start of this run.
    """

    done: int
    total: int
    part: str
    resumed: bool
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizationReport:
    """What a run did; `to_dict()` has the keys of `qjax quantize --json`.

    Compared by identity: a model that carries one stays hashable, as `jit` needs.

    Attributes:
      recipe: name of the recipe.
      bits_per_weight: all stored bits over all parameters of the model.
      quantized_bits_per_weight: the same over quantized tensors only.
      size_bytes: bytes of weights written.
      source_bytes: bytes of the same weights in the source.
      seconds: wall time.
      peak_memory_bytes: high-water mark of the process's resident memory.
      tensors: one entry per quantized tensor: name, format, method, bits_per_weight,
        error (relative root-mean-square), shape, nbytes; calibrated ones also
      output_error (the same of the layer's output on the calibration tokens).
      kept: one entry per tensor kept in float: name, shape, dtype, nbytes, reason.

    Entries of tensors with NaN or infinite weights (which only `nonfinite="zero"` and
    `"clip"` let through) carry their count as `nonfinite`; kept tensors keep them.
    """

    recipe: str
    bits_per_weight: float
    quantized_bits_per_weight: float
    size_bytes: int
    source_bytes: int
    seconds: float
    peak_memory_bytes: int
    tensors: tuple[dict[str, Any], ...]
    kept: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        fields = dataclasses.asdict(self)
        return {**fields, "tensors": list(self.tensors), "kept": list(self.kept)}


def quantization_report(
    recipe: str, entries: Mapping[str, dict[str, Any]], seconds: float
) -> QuantizationReport:
    """The report of a run from the entries of its tensors by path.

    Args:
      recipe: its name.
      entries: of all tensors; those with an `error` were quantized.
      seconds: wall time of the run.
    """
    quantized = {p: e for p, e in entries.items() if "error" in e}
    kept = {p: e for p, e in entries.items() if "error" not in e}

    def bits(which: Mapping[str, dict[str, Any]]) -> float:
        count = sum(e["parameters"] for e in which.values())
        return 8 * sum(e["nbytes"] for e in which.values()) / max(count, 1)

    return QuantizationReport(
        recipe=recipe,
        bits_per_weight=bits(entries),
        quantized_bits_per_weight=bits(quantized),
        size_bytes=sum(e["nbytes"] for e in entries.values()),
        source_bytes=sum(e["source_bytes"] for e in entries.values()),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        tensors=tuple({"name": p, **e} for p, e in quantized.items()),
        kept=tuple({"name": p, **e} for p, e in kept.items()),
    )


def peak_memory_bytes() -> int:
    """High-water mark of resident memory, plus that of devices where they tell."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    for device in jax.local_devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        peak += (stats or {}).get("peak_bytes_in_use", 0)
    return peak

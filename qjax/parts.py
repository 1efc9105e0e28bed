"""Quantizing a model part by part: embeddings, each layer, what follows the layers.

A `PartQuantizer` applies a recipe to one part after the other and keeps the books of
the run. With calibration tokens it also carries their activations from block to block
and gives every method the statistics it needs, layer by layer in the order they run.
Beyond a part it holds the activations (on the host) and one Hessian.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.artifact import tensor_report
from qjax.calibration import BlockStream
from qjax.checkpoint import hold
from qjax.errors import SpecError
from qjax.methods import (
    SignRound,
    Statistics,
    needs_of,
    prepare,
    tune_block,
    uses_of,
)
from qjax.methods.array import check_finite
from qjax.methods.hessian import damping_raised
from qjax.models import ModelConfig
from qjax.models.fold import fold_layer
from qjax.parameter import quantize_parameter, quantized_report, source_report
from qjax.recipes import Recipe, Rule
from qjax.reports import Progress, QuantizationReport, quantization_report
from qjax.tensor import QuantizedTensor, with_dtype
from qjax.wrappers import InputScaled


class PartQuantizer:
    """Quantizes the parts of one model in order.

    Args:
      recipe: the rules.
      config: the architecture.
      tokens: calibration windows, int32 `[windows, time]`, or None.
      dtype: of calibration activations.
      nonfinite: see `qjax.quantize`.
      progress: called after each part.
      batch: calibration windows per step.
      mesh: devices that share the calibration batches.
      importances: in place of tokens, mean squares of the inputs of weights and how
        many inputs they are of, by path (an importance matrix).

    Raises:
      SpecError: a method of the recipe needs calibration and there are no tokens.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: ModelConfig,
        *,
        tokens: np.ndarray | None = None,
        dtype: Any = jnp.float32,
        nonfinite: str = "raise",
        progress: Callable[[Progress], None] | None = None,
        batch: int = 8,
        mesh: Any = None,
        importances: Mapping[str, tuple[np.ndarray, int]] | None = None,
    ):
        self._importances = importances or {}
        self._recipe, self._config = recipe, config
        self._nonfinite, self._progress = nonfinite, progress
        self._dtype = jnp.dtype(dtype)
        self._start = time.perf_counter()
        self._done = 0
        self.entries: dict[str, dict[str, Any]] = {}
        rules = [rule for rule in recipe.rules if rule.format is not None]
        needs = frozenset[str]().union(*(needs_of(r.method) for r in rules))
        uses = frozenset[str]().union(*(uses_of(r.method) for r in rules))
        if needs and tokens is None and (needs - {"square"} or not importances):
            method = next(r.method.name for r in rules if needs_of(r.method))
            raise SpecError(
                f"recipe {recipe.name!r}: its method {method} needs calibration; pass "
                "calibration= token ids or the path of a text (--calibration FILE), or "
                "take a data-free recipe such as hqq-int4-g64"
            )
        self._stream = None
        if tokens is not None and uses:
            learned = any(isinstance(rule.method, SignRound) for rule in rules)
            reference = "cross" in uses or learned
            self._stream = BlockStream(
                config, tokens, dtype, reference=reference, batch=batch, mesh=mesh
            )

    def part(
        self, layer: int | None, first: bool, part: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Quantizes one part by the recipe and records each tensor.

        Args:
          layer: index of the layer; None before and after the layers.
          first: whether it is the first part.
          part: dense parameters by path.

        Returns:
          Leaves by path, packed where the recipe says so.
        """
        if self._stream is None:
            done = {path: self._one(path, w) for path, w in part.items()}
        elif layer is not None:
            done = self._block(layer, part)
        elif first:
            done = {path: self._one(path, w) for path, w in part.items()}
        else:
            done = self._final(part)
        self.follow(layer, first, done, part)
        return done

    def follow(
        self,
        layer: int | None,
        first: bool,
        packed: Mapping[str, Any],
        dense: Mapping[str, Any],
    ) -> None:
        """Moves the calibration activations past a part that is quantized already."""
        if self._stream is None:
            return
        if layer is not None:
            self._stream.advance(
                layer, self._own(layer, packed), self._own(layer, dense)
            )
        elif first:
            self._stream.embed(self._held(packed), self._held(dense))

    def _held(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Leaves as the stream computes with them."""
        return {path: hold(leaf, self._dtype) for path, leaf in leaves.items()}

    def _own(self, layer: int, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """A layer's leaves by path relative to it, as the stream computes with them."""
        start = len(f"layers.{layer}.")
        return {path[start:]: leaf for path, leaf in self._held(leaves).items()}

    def _block(self, layer: int, part: Mapping[str, Any]) -> dict[str, Any]:
        """Quantizes a layer, kernel after kernel in the order they run."""
        assert self._stream is not None  # callers check
        prefix = f"layers.{layer}."
        dense = self._own(layer, part)
        done = self._learned(layer, part, dense)
        packed = dense | self._own(layer, done)
        waiting = dict.fromkeys(path for path in part if path not in done)
        done = {**part, **done}
        for group in self._stream.groups(layer, dense):
            paths = [prefix + path for path in group]
            rules = {p: self._recipe.match(p, part[p].shape) for p in paths}
            used = {p: r for p, r in rules.items() if r is not None and p in waiting}
            needs = frozenset[str]().union(*(uses_of(r.method) for r in used.values()))
            statistics = None
            if needs:
                statistics = self._stream.collect(layer, group, packed, dense, needs)
            done |= self._group(part, used, statistics)
            for path in used:
                packed[path[len(prefix) :]] = hold(done[path], self._dtype)
                waiting.pop(path)
        done |= {path: self._one(path, part[path]) for path in waiting}
        return self._folded(done)

    def _learned(
        self, layer: int, part: Mapping[str, Any], dense: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Kernels whose rounding is learned, all of the block together."""
        assert self._stream is not None  # callers check
        prefix = f"layers.{layer}."
        rules = {path: self._recipe.match(path, w.shape) for path, w in part.items()}
        found = {
            path[len(prefix) :]: rule
            for path, rule in rules.items()
            if rule is not None and isinstance(rule.method, SignRound)
        }
        if not found:
            return {}
        methods = {rule.method for rule in found.values()}
        if len(methods) > 1:
            raise SpecError(
                f"layers.{layer}: rules with different settings of SignRound; a block "
                "is learned as a whole, so give its kernels one"
            )
        weights = {p: jnp.asarray(part[prefix + p], jnp.float32) for p in found}
        for path, w in weights.items():
            check_finite(w, prefix + path)
        (method,) = methods
        tuned, report = tune_block(
            self._stream.block(layer),
            weights,
            {p: rule.format for p, rule in found.items() if rule.format is not None},
            jnp.asarray(self._stream.x),
            jnp.asarray(self._stream.targets(layer, dense)),
            method,  # pyright: ignore[reportArgumentType]
            rest={p: w for p, w in dense.items() if p not in found},
        )
        extra = {"block_error": [report.start, report.best]}
        done = {}
        for path, q in tuned.items():
            w = part[prefix + path]
            done[prefix + path] = with_dtype(q, jnp.dtype(w.dtype).name)
            entry = quantized_report(prefix + path, w, q, found[path].method.name)
            self.entries[prefix + path] = {
                **entry,
                **source_report(prefix + path, w),
                **extra,
            }
        return done

    def _folded(self, part: dict[str, Any]) -> dict[str, Any]:
        """Lets norms absorb input scales, and corrects what was reported of them."""
        if not any(isinstance(leaf, InputScaled) for leaf in part.values()):
            return part
        folded = fold_layer(self._config, part)
        for path, leaf in folded.items():
            if leaf is part[path]:
                continue
            report = tensor_report(path, leaf)
            kept = {k: report[k] for k in ("nbytes", "bits_per_weight")}
            if not isinstance(leaf, QuantizedTensor):
                kept = {"nbytes": report["nbytes"], "dtype": report["format"]}
                kept["reason"] = "absorbed input scales"
            self.entries[path] |= kept
        return folded

    def _group(
        self,
        part: Mapping[str, Any],
        rules: Mapping[str, Rule],
        statistics: Statistics | None,
    ) -> dict[str, Any]:
        """Quantizes kernels with one common input, sharing what can be shared."""
        kinds: dict[Any, list[str]] = {}
        for path, rule in rules.items():
            kinds.setdefault((rule.format, rule.method), []).append(path)
        done = {}
        for (fmt, method), paths in kinds.items():
            shared = None
            if statistics is not None:
                weights = [jnp.asarray(part[path]) for path in paths]
                shared = prepare(method, fmt, weights, statistics)
            raised = damping_raised(shared, paths[0])
            for path in paths:
                done[path] = self._one(path, part[path], statistics, shared)
                if raised and "fallback" not in self.entries[path]:
                    self.entries[path]["damping_raised"] = raised
        return done

    def _final(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Quantizes the head with statistics of its input, and what else follows."""
        assert self._stream is not None  # callers check
        done = {}
        for path, w in part.items():
            rule = self._recipe.match(path, w.shape)
            needs = frozenset[str]() if rule is None else uses_of(rule.method)
            if rule is None or not needs:
                done[path] = self._one(path, w)
                continue
            statistics = self._stream.head(self._held(part), needs)
            done |= self._group(part, {path: rule}, statistics)
        return done

    def _one(
        self,
        path: str,
        w: Any,
        statistics: Statistics | None = None,
        shared: Any = None,
    ) -> Any:
        if statistics is None and path in self._importances:
            mean, count = self._importances[path]
            zeros = Statistics.zeros(len(mean))
            counted = {"count": zeros.count + count, "square": mean * float(count)}
            statistics = dataclasses.replace(zeros, **counted)
        leaf, self.entries[path] = quantize_parameter(
            path,
            w,
            self._recipe,
            nonfinite=self._nonfinite,
            statistics=statistics,
            shared=shared,
        )
        return leaf

    def step(self, name: str, *, resumed: bool = False) -> None:
        """Reports a finished part."""
        self._done += 1
        if self._progress is not None:
            seconds = time.perf_counter() - self._start
            total = self._config.layers + 2
            self._progress(Progress(self._done, total, name, resumed, seconds))

    def report(self, entries: Mapping[str, dict[str, Any]]) -> QuantizationReport:
        """The report of a run from the entries of all its parts."""
        seconds = time.perf_counter() - self._start
        return quantization_report(self._recipe.name, entries, seconds)

"""Activations that flow through a decoder while it is quantized, block by block.

A `BlockStream` holds what enters the next block, once as the quantized model computes
it (`x`) and, for methods that compare with the original, once as the original does
(`r`). Both lie in host memory, `windows * time * dim` numbers each; the device sees one
batch at a time. Inside a block the layers are quantized in the order they run, and each
sees the errors of those before it ("true sequential").

Inputs that statistics were taken of are kept until the block is done, up to `KEPT`
bytes, and later passes over the block start from them: attention runs once.

`qjax.calibration.programs` has the compiled functions that do the work.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from qjax.calibration import programs
from qjax.calibration.capture import check_inputs, groups
from qjax.calibration.observers import Observer
from qjax.calibration.programs import Leaves
from qjax.methods import Statistics
from qjax.models.config import ModelConfig

KEPT = 4 << 30
"""Bytes of layer inputs that are kept while a block is quantized."""


class BlockStream:
    """Calibration activations between two blocks of a decoder.

    Args:
      config: the architecture.
      tokens: int32 `[windows, time]`.
      dtype: of activations; Hessians are float32 always.
      reference: keep the original model's activations too.
      batch: windows per step.
      mesh: devices to split batches over, along its first axis; parameters are whole
        on each, and sums are over all of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokens: np.ndarray,
        dtype: Any,
        *,
        reference: bool = False,
        batch: int = 8,
        mesh: Mesh | None = None,
    ):
        self.config, self.tokens = config, tokens
        self.dtype = np.dtype(dtype).name
        self.batch = min(batch, len(tokens))
        if mesh is not None:
            devices = mesh.devices.shape[0]
            self.batch = -(-self.batch // devices) * devices
        self.mesh = mesh
        self.x: np.ndarray = np.zeros(0)
        self.r: np.ndarray | None = None
        self._reference = reference
        self._known: dict[str, np.ndarray] = {}  # inputs of layers, by path
        self._known_r: dict[str, np.ndarray] = {}

    def embed(self, packed: Leaves, dense: Leaves) -> None:
        """Starts the stream.

        Args:
          packed: embeddings by path as the quantized model has them.
          dense: the original ones.
        """
        self.x = self._each(
            lambda t: programs.embed(self.config, self.dtype, packed, t)
        )
        if self._reference:
            self.r = self._each(
                lambda t: programs.embed(self.config, self.dtype, dense, t)
            )

    def groups(self, layer: int, leaves: Leaves) -> tuple[tuple[str, ...], ...]:
        """Kernels of a block that share an input, in the order they run."""
        shape = (1, *self.x.shape[1:])
        x = jax.ShapeDtypeStruct(shape, self.x.dtype)
        found: list[Any] = []

        def trace(leaves: Any, x: Any) -> None:
            found.extend(programs.run(self.config, layer, leaves, x)[1])

        jax.eval_shape(trace, dict(leaves), x)
        return groups(found)

    def collect(
        self,
        layer: int,
        group: tuple[str, ...],
        packed: Leaves,
        dense: Leaves,
        needs: frozenset[str],
    ) -> Statistics:
        """Statistics of the input that some kernels of a block share.

        Args:
          layer: index of the block.
          group: the kernels, relative to the block, such as `("attn.q.kernel",)`.
          packed: parameters of the block as far as it is quantized.
          dense: its original parameters.
          needs: fields of `Statistics` to collect.

        Raises:
          NonFiniteError: an input is NaN or infinite; names the layer.
        """
        cross = "cross" in needs
        features = dense[group[0]].shape[-2]
        total = Statistics.zeros(
            features, hessian="hessian" in needs or cross, cross=cross
        )
        kind, inputs, others = self._kind(layer), [], []
        for batch in self._batches(self._known, self._known_r, cross):
            total, entering, other = programs.collect(
                self.config, kind, group[0], total, dict(packed), dict(dense), *batch
            )
            inputs.append(np.asarray(entering))
            others.append(other if other is None else np.asarray(other))
        check_inputs({group[0]: total}, f"layers.{layer}.")
        self._keep(self._known, group, inputs)
        if cross:
            self._keep(self._known_r, group, others)
        return total

    def _keep(self, known: dict[str, np.ndarray], group: Any, parts: list[Any]) -> None:
        held = {id(a): a.nbytes for a in known.values()}
        if sum(held.values()) + sum(part.nbytes for part in parts) <= KEPT:
            known.update(dict.fromkeys(group, np.concatenate(parts)[: len(self.x)]))

    def advance(self, layer: int, packed: Leaves, dense: Leaves) -> None:
        """Moves the stream past a block."""
        kind = self._kind(layer)

        def move(leaves: Leaves, x: np.ndarray, known: Leaves) -> np.ndarray:
            run = functools.partial(programs.block, self.config, kind, dict(leaves))
            return self._each(run, x, known)

        self.x = move(packed, self.x, self._known)
        if self.r is not None:
            self.r = move(dense, self.r, self._known_r)
        self._known, self._known_r = {}, {}

    def targets(self, layer: int, dense: Leaves) -> np.ndarray:
        """What the original block makes of the original (or else quantized) input."""
        run = functools.partial(
            programs.block, self.config, self._kind(layer), dict(dense)
        )
        return self._each(run, self.x if self.r is None else self.r, {})

    def block(self, layer: int) -> Callable[[Leaves, Array, Leaves], Array]:
        """The block as `(weights, x, rest)` to its output; one object per kind."""
        return programs.block_function(self.config, self._kind(layer))

    def head(self, norm: Leaves, needs: frozenset[str]) -> Statistics:
        """Statistics of the head's input, behind the last norm."""
        total = Statistics.zeros(self.x.shape[-1], hessian="hessian" in needs)
        for x, _, _, _, weight in self._batches({}, {}, False):
            total = programs.collect_head(self.config, total, dict(norm), x, weight)
        check_inputs({"head.kernel": total})
        return total

    def observe(
        self, layer: int, leaves: Leaves, observer: Observer, paths: Iterable[str]
    ) -> dict[str, Any]:
        """What an observer has seen of the activations that some weights round.

        Args:
          layer: index of the block.
          leaves: its parameters.
          observer: the rule.
          paths: weights with `RoundedInputs` in them, relative to the block.

        Returns:
          States of the observer by path.
        """
        kind = self._kind(layer)
        states = {path: observer.init() for path in paths}
        for x, _, _, _, weight in self._batches({}, {}, False):
            states = programs.observe(
                self.config, kind, observer, states, dict(leaves), x, weight
            )
        return states

    def _kind(self, layer: int) -> int:
        """The first layer that computes as this one, so that programs are shared."""
        return programs.first_alike(self.config, layer)

    def _place(self, x: np.ndarray) -> Any:
        if self.mesh is None:
            return jnp.asarray(x)
        spec = PartitionSpec(self.mesh.axis_names[0])
        return jax.device_put(x, NamedSharding(self.mesh, spec))

    def _slices(self, x: np.ndarray):
        """Batches of one size, the last padded."""
        for start in range(0, len(x), self.batch):
            part = x[start : start + self.batch]
            spare = [(0, self.batch - len(part)), *[(0, 0)] * (x.ndim - 1)]
            yield self._place(np.pad(part, spare)), len(part)

    def _batches(self, known: Leaves, known_r: Leaves, cross: bool):
        """`(x, r, known, known_r, weight)` of each batch; `r` only if asked for."""
        sources = [self.x, *known.values()]
        others = [self.r, *known_r.values()] if cross and self.r is not None else []
        count = len(sources)
        for parts in zip(*map(self._slices, (*sources, *others)), strict=True):
            arrays, real = [part for part, _ in parts], parts[0][1]
            mask = (np.arange(self.batch) < real).astype(np.float32)
            weight = np.repeat(mask[:, None], self.x.shape[1], axis=1)
            r = arrays[count] if others else None
            yield (
                arrays[0],
                r,
                dict(zip(known, arrays[1:count], strict=True)),
                dict(zip(known_r, arrays[count + 1 :], strict=True)),
                self._place(weight),
            )

    def _each(
        self, function: Any, x: np.ndarray | None = None, known: Leaves | None = None
    ) -> np.ndarray:
        """Applies a function to every batch (of tokens) and joins the results."""
        sources = [self.tokens] if x is None else [x, *(known or {}).values()]
        out = []
        for parts in zip(*map(self._slices, sources), strict=True):
            arrays = [part for part, _ in parts]
            given = {} if x is None else dict(zip(known or {}, arrays[1:], strict=True))
            y = function(arrays[0]) if x is None else function(arrays[0], given)
            out.append(np.asarray(y)[: parts[0][1]])
        return np.concatenate(out)

"""What enters each layer of an NNX module, and statistics of it.

`capture` runs a module once and returns, beside its result, the inputs of every layer
with a kernel in the form the kernel is quantized for, `[tokens, in]`, or
`[*batch, tokens, in]` where an einsum multiplies by one matrix per batch index, such as
one per expert. It works inside `jit`; layers need no preparation and are not changed.
`calibrate` sums `Statistics` over batches and feeds `quantize_module(...,
statistics=)`.

Refuses layers that run inside a scan of the module's own, whose inputs cannot leave it;
convolutions and embeddings are passed over.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qjax.errors import NonFiniteError, SpecError, UnsupportedError
from qjax.methods import Statistics
from qjax.nn.einsum import QEinsum
from qjax.nn.linear import QLinear
from qjax.nn.swap import dotted, equation_of


class Seen(NamedTuple):
    """The input of one call of one layer.

    Attributes:
      path: dotted path of the layer's weight, such as `attn.q.kernel`.
      x: the input as `[*batch, *tokens, in]`.
      source: number of the array that entered, and of how it is read; layers that
        share it share statistics.
      batch: how many leading axes of `x` are the kernel's, each index of them with a
        matrix of its own.
    """

    path: str
    x: Float[Array, "*tokens in"]
    source: int
    batch: int = 0


class _Tap(nnx.Module):
    """A layer that notes what it is called with."""

    def __init__(self, inner: Any, path: str, notes: "_Notes"):
        self.inner, self.path, self.notes = inner, path, notes

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        x = self.notes.given.get(f"{self.path}.kernel", x)
        self.notes.add(self.path, x, _Layout.of(self.inner, x.ndim))
        return self.inner(x, *args, **kwargs)


class _Layout(NamedTuple):
    """How a layer reads its input: `[*batch, *tokens, *contracted]` by these axes."""

    batch: tuple[int, ...]
    tokens: tuple[int, ...]
    contracted: tuple[int, ...]

    @classmethod
    def of(cls, node: Any, ndim: int) -> "_Layout":
        equation = _equation(node)
        if equation is None:
            return cls((), tuple(range(ndim - 1)), (ndim - 1,))
        full = equation.expand(ndim)
        free = [c for c in full.x if c not in full.kernel]
        kinds = (full.batch, free, full.contracted)
        return cls(*(tuple(full.x.index(c) for c in kind) for kind in kinds))

    def matrix(self, x: Any) -> Any:
        """The input with its contracted axes last and flat."""
        x = jnp.transpose(x, (*self.batch, *self.tokens, *self.contracted))
        return x.reshape(*x.shape[: len(self.batch) + len(self.tokens)], -1)


class _Notes:
    """Inputs in the order of calls; equal and hashable by identity, so static."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.seen: list[Seen] = []
        # Kept alive, so that identities stay unique.
        self._sources: list[tuple[Any, _Layout]] = []

    def add(self, path: str, raw: Any, layout: _Layout) -> None:
        known = enumerate(self._sources)
        found = next((i for i, (x, how) in known if x is raw and how == layout), None)
        if found is None:
            found = len(self._sources)
            self._sources.append((raw, layout))
        x, batch = layout.matrix(raw), len(layout.batch)
        self.seen.append(Seen(f"{path}.kernel", x, found, batch))


def capture(
    module: Any,
    *args: Any,
    call: Callable[..., Any] | None = None,
    given: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, list[Seen]]:
    """Runs a module and returns its result and the inputs of its layers.

    Args:
      module: an NNX module; dense, on the fly or frozen layers alike.
      *args: what it is called with.
      call: `(module, *args, **kwargs)` to its result; default calls it.
      given: inputs known already, by path; they replace what a layer is called with,
        so that inside `jit` what they were computed from is not computed again.
      **kwargs: likewise.

    Returns:
      The result, and one `Seen` per call of a layer, in order.
    """
    notes = _Notes(given or {})

    def tap(parts: tuple[Any, ...], node: Any) -> Any:
        wanted = isinstance(node, (QLinear, QEinsum)) or type(node) in _FLAX
        wanted = wanted and not isinstance(_equation(node), UnsupportedError)
        return _Tap(node, dotted(parts), notes) if wanted else node

    tapped = nnx.recursive_map(tap, nnx.clone(module))
    out = tapped(*args, **kwargs) if call is None else call(tapped, *args, **kwargs)
    return out, notes.seen


_FLAX = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)


def _equation(node: Any) -> Any:
    return getattr(node, "equation", None) or equation_of(node)


def calibrate(
    module: Any,
    batches: Iterable[Any],
    *,
    needs: frozenset[str] | set[str] = frozenset({"hessian"}),
    call: Callable[..., Any] | None = None,
) -> dict[str, Statistics]:
    """Statistics of the inputs of every layer of a module.

    Args:
      module: any NNX module. Its layers are calibrated as they are now, all at once;
        a `Decoder` is better served by `quantize_model(..., calibration=)`, which lets
        every layer see the errors of those before it.
      batches: what the module is called with: arrays, or tuples of arguments.
      needs: fields of `Statistics`; `"hessian"` or `"square"`.
      call: see `capture`.

    Returns:
      Statistics by dotted path of the kernel. Layers that share an input share them.
      Those of a batched kernel, such as one matrix per expert, have its batch axes in
      front; rows of its input that are all zero fill up a dispatch and do not count.

    Raises:
      SpecError: there are no batches, or a field cannot be collected this way.
      NonFiniteError: an input is NaN or infinite; names the layer.
      UnsupportedError: a layer runs inside a scan of the module.

    Example:
      >>> stats = qjax.calibration.calibrate(model, batches)
      >>> model = qjax.nn.quantize_module(
      ...     model, recipe, freeze=True, statistics=stats
      ... )
    """
    if unknown := sorted(set(needs) - {"hessian", "square"}):
        raise SpecError(f"calibrate: cannot collect {unknown} of a whole module")
    graph, state = nnx.split(module)
    leaders: dict[str, str] = {}

    def step(state: Any, total: Any, args: Any) -> Any:
        _, seen = capture(nnx.merge(graph, state), *args, call=call)
        leaders.update(_leaders(seen))
        found: dict[str, Statistics] = dict(total)
        for one in seen:
            if leaders[one.path] == one.path:
                add_input(found, one, hessian="hessian" in needs)
        return found

    run, total = jax.jit(step), {}
    with inside_scan():
        for batch in batches:
            total = run(state, total, batch if isinstance(batch, tuple) else (batch,))
    if not total:
        raise SpecError(
            "calibrate: no statistics were collected; pass at least one batch and a "
            "module with Linear, LinearGeneral, Einsum or quantized layers"
        )
    check_inputs(total)
    return {path: total[leader] for path, leader in leaders.items()}


def add_input(total: dict[str, Statistics], one: Seen, *, hessian: bool) -> None:
    """Adds one input to the statistics of its layer."""
    before, lead = total.get(one.path), one.x.shape[: one.batch]
    if before is None:
        zeros = Statistics.zeros(one.x.shape[-1], hessian=hessian)
        before = jax.tree.map(lambda a: jnp.zeros((*lead, *a.shape), a.dtype), zeros)
    add: Any = Statistics.add if not lead else _add_filled
    for _ in lead:
        add = jax.vmap(add)
    total[one.path] = add(before, one.x)


def _add_filled(before: Statistics, x: Any) -> Statistics:
    """Adds the rows that are not all zero."""
    return before.add(x, weight=jnp.any(x != 0, axis=-1).astype(jnp.float32))


def _leaders(seen: list[Seen]) -> dict[str, str]:
    """For each path, the first path with the same inputs in all its calls."""
    sources: dict[str, tuple[int, ...]] = {}
    for one in seen:
        sources[one.path] = (*sources.get(one.path, ()), one.source)
    first: dict[tuple[int, ...], str] = {}
    return {path: first.setdefault(key, path) for path, key in sources.items()}


def groups(seen: list[Seen]) -> tuple[tuple[str, ...], ...]:
    """Paths that share an input, in the order of the calls."""
    found: dict[str, list[str]] = {}
    for path, leader in _leaders(seen).items():
        found.setdefault(leader, []).append(path)
    return tuple(map(tuple, found.values()))


def check_inputs(total: Mapping[str, Statistics], where: str = "") -> None:
    """Raises NonFiniteError when inputs were NaN or infinite; names the layer."""
    for path, one in total.items():
        sums = jnp.sum(one.total, axis=-1) + jnp.max(one.peak, axis=-1, initial=0.0)
        bad = np.argwhere(~np.isfinite(np.asarray(sums)))
        if len(bad):
            expert = str(bad[0].tolist()) if sums.ndim else ""
            raise NonFiniteError(
                f"{where}{path}{expert}: its inputs on the calibration tokens are NaN "
                "or infinite; expected finite activations. Check the weights of the "
                "layers before it, or calibrate in float32"
            )


@contextlib.contextmanager
def inside_scan() -> Iterator[None]:
    """Turns the escape of a scanned layer's inputs into a clear error."""
    try:
        yield
    except jax.errors.UnexpectedTracerError:
        raise UnsupportedError(
            "calibrate: a layer runs inside a scan of the module, so its inputs cannot "
            "be read; calibrate the scanned block by itself, layer by layer"
        ) from None

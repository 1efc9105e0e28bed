"""What enters each layer of an NNX module, and statistics of it.

`capture` runs a module once and returns, beside its result, the inputs of every layer
with a kernel in the form the kernel is quantized for, `[tokens, in]`. It works inside
`jit`; layers need no preparation and are not changed. `calibrate` sums `Statistics`
over batches and feeds `quantize_module(..., statistics=)`.

Refuses layers that run inside a scan of the module's own, whose inputs cannot leave it;
convolutions, embeddings and einsums with batched kernels are passed over.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
      x: the input as `[*tokens, in]`.
      source: number of the array that entered; layers that share it share statistics.
    """

    path: str
    x: Float[Array, "*tokens in"]
    source: int


class _Tap(nnx.Module):
    """A layer that notes what it is called with."""

    def __init__(self, inner: Any, path: str, notes: "_Notes"):
        self.inner, self.path, self.notes = inner, path, notes

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        x = self.notes.given.get(f"{self.path}.kernel", x)
        self.notes.add(self.path, x, _as_matrix(self.inner, x))
        return self.inner(x, *args, **kwargs)


class _Notes:
    """Inputs in the order of calls; equal and hashable by identity, so static."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.seen: list[Seen] = []
        self._sources: list[Any] = []  # kept alive, so that identities stay unique

    def add(self, path: str, raw: Any, x: Any) -> None:
        found = next((i for i, s in enumerate(self._sources) if s is raw), None)
        if found is None:
            found = len(self._sources)
            self._sources.append(raw)
        self.seen.append(Seen(f"{path}.kernel", x, found))


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
        return _Tap(node, dotted(parts), notes) if wanted and _plain(node) else node

    tapped = nnx.recursive_map(tap, nnx.clone(module))
    out = tapped(*args, **kwargs) if call is None else call(tapped, *args, **kwargs)
    return out, notes.seen


_FLAX = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)


def _equation(node: Any) -> Any:
    return getattr(node, "equation", None) or equation_of(node)


def _plain(node: Any) -> bool:
    """Whether a layer multiplies by one matrix."""
    equation = _equation(node)
    return equation is None or not (
        isinstance(equation, UnsupportedError) or equation.batch
    )


def _as_matrix(node: Any, x: Any) -> Any:
    """The input with its contracted axes last and flat."""
    equation = _equation(node)
    if equation is None:
        return x
    full = equation.expand(x.ndim)
    order = [c for c in full.x if c not in full.contracted]
    x = jnp.transpose(x, [full.x.index(c) for c in (*order, *full.contracted)])
    return x.reshape(*x.shape[: len(order)], -1)


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
    before = total.get(one.path)
    if before is None:
        before = Statistics.zeros(one.x.shape[-1], hessian=hessian)
    total[one.path] = before.add(one.x)


def _leaders(seen: list[Seen]) -> dict[str, str]:
    """For each path, the first path with the same inputs in all its calls."""
    sources: dict[str, tuple[Any, ...]] = {}
    for one in seen:
        key = (one.source, one.x.shape[-1])
        sources[one.path] = (*sources.get(one.path, ()), key)
    first: dict[tuple[Any, ...], str] = {}
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
        if not bool(jnp.isfinite(jnp.sum(one.total) + jnp.max(one.peak, initial=0.0))):
            raise NonFiniteError(
                f"{where}{path}: its inputs on the calibration tokens are NaN or "
                "infinite; expected finite activations. Check the weights of the "
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

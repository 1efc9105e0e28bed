"""The adapter of one weight: its first values, or given ones, checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from qjax.errors import SpecError, UnsupportedError
from qjax.tensor import QuantizedTensor
from qjax.train.lora_config import LoRA
from qjax.train.lora_init import key_of, loftq, pissa, random_factors, table_factors
from qjax.train.lora_sites import Site, dense


@dataclasses.dataclass(frozen=True)
class Own:
    """The adapter of one weight.

    Attributes:
      a, b, scale, alpha, magnitude, squares, pool, rate: See `qjax.nn.lora.Adapter`.
      base: The weight below, in matrix form, if it is another than before; or None.
    """

    a: Any
    b: Any
    scale: float
    alpha: float
    magnitude: Any = None
    squares: Any = None
    pool: int = 1
    rate: float = 0.0
    base: Any = None

    @property
    def rank(self) -> int:
        """Columns of A."""
        return self.a.shape[-1]

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        more = 0 if self.magnitude is None else self.magnitude.size
        return self.a.size + self.b.size + more

    @property
    def change(self) -> str:
        """What became of the weight below; see `AdaptedModule`."""
        if self.base is None:
            return "kept"
        packed = isinstance(self.base, QuantizedTensor)
        return "requantized" if packed else "changed"


def first(
    site: Site,
    index: int,
    config: LoRA,
    numbers: tuple[int, float],
    key: Array,
    original: Any = None,
) -> Own:
    """The adapter that a weight starts with.

    Args:
      site: Its layer.
      index: Its number there.
      config: The settings.
      numbers: Its rank and alpha.
      key: PRNG key of all adapters.
      original: For PiSSA and LoftQ, the weight before it was quantized, or None.

    Raises:
      SpecError: The settings do not fit the weight.
      UnsupportedError: This kind of weight cannot have this variant or init.
    """
    path, shape, (rank, alpha) = site.paths[index], site.shape(), numbers
    check_variant(path, site, config.variant, config.init)
    rows = shape[len(shape) - 2]
    if config.variant == "qalora" and rows % config.pool:
        raise SpecError(
            f"{path}: has {rows} inputs, which pool={config.pool} does not divide"
        )
    pool = config.pool if config.variant == "qalora" else 1
    scale = config.scale(rank, alpha, rows)
    if site.embedding:
        a, b = table_factors(key_of(key, path), shape, rank)
        return Own(a, b, scale, alpha)
    base = None
    if config.init in ("pissa", "loftq"):
        a, b, base = _decomposed(site, index, config, rank, scale, original)
    else:
        a, b = random_factors(config.init, key_of(key, path), shape, rank, pool)
    magnitude = squares = None
    if config.variant == "dora":
        w = site.served(site.leaf(index) if base is None else base)
        squares = jnp.sum(w * w, axis=-2)
        w = w + scale * jnp.matmul(a, b, precision="highest")
        magnitude = jnp.sqrt(jnp.sum(w * w, axis=-2))
    rate = float(config.dropout)
    return Own(a, b, scale, alpha, magnitude, squares, pool, rate, base)


def given(site: Site, index: int, own: Mapping[str, Any], dropout: float) -> Own:
    """An adapter of `adapter_tree`, checked.

    Args:
      site: The layer of the weight.
      index: Its number there.
      own: The adapter.
      dropout: For further training.

    Raises:
      SpecError: It is incomplete, or of another shape.
      UnsupportedError: This kind of weight cannot have this variant.
    """
    path, (*lead, rows, cols) = site.paths[index], site.shape()
    if lacking := [name for name in ("a", "b", "scale") if name not in own]:
        raise SpecError(
            f"load_adapter_tree: {path} lacks {', '.join(lacking)}; it has "
            f"{', '.join(own) or 'nothing'}"
        )
    a, b = (jnp.asarray(own[name], jnp.float32) for name in ("a", "b"))
    if a.ndim != len(lead) + 2 or b.shape != (*lead, a.shape[-1], cols):
        raise _misfit(path, a, b, (*lead, rows, cols))
    pool, rest = divmod(rows, max(a.shape[-2], 1))
    if rest or a.shape[:-2] != tuple(lead) or not a.size:
        raise _misfit(path, a, b, (*lead, rows, cols))
    magnitude = squares = None
    if own.get("magnitude") is not None:
        magnitude = jnp.asarray(own["magnitude"], jnp.float32)
        if magnitude.shape != (*lead, cols):
            raise SpecError(
                f"load_adapter_tree: {path} has a magnitude {list(magnitude.shape)}; "
                f"expected {[*lead, cols]}"
            )
        w = site.served(site.leaf(index))
        squares = jnp.sum(w * w, axis=-2)
    variant = "lora" if magnitude is None else "dora"
    check_variant(path, site, variant if pool == 1 else "qalora", "kaiming")
    scale = float(own["scale"])
    alpha = float(own.get("alpha", scale * a.shape[-1]))
    rate = 0.0 if site.embedding else dropout
    return Own(a, b, scale, alpha, magnitude, squares, pool, rate)


def check_variant(path: str, site: Site, variant: str, init: str) -> None:
    """Refuses what a kind of weight cannot have.

    Raises:
      UnsupportedError: It cannot.
    """
    what = ""
    if site.embedding and variant not in ("lora", "rslora"):
        what = f"is a table of embeddings, which has no {variant}"
    elif site.embedding and init in ("pissa", "loftq"):
        what = f"is a table of embeddings, which has no init={init!r}"
    elif variant == "qalora" and init in ("pissa", "loftq"):
        what = f"qalora has no init={init!r}, factors of what is averaged"
    if what:
        raise UnsupportedError(
            f"{path}: {what}; leave it out of the targets, or use another"
        )


def _misfit(path: str, a: Any, b: Any, shape: tuple[int, ...]) -> SpecError:
    *lead, rows, cols = shape
    return SpecError(
        f"load_adapter_tree: {path} has a {list(a.shape)} and b {list(b.shape)}; "
        f"expected {[*lead, rows, 'rank']} and {[*lead, 'rank', cols]}"
    )


def _decomposed(
    site: Site, index: int, config: LoRA, rank: int, scale: float, original: Any
) -> tuple[Array, Array, Any]:
    """Factors by singular values, and the new weight below them or None."""
    path, shape = site.paths[index], site.shape()
    if rank > min(shape[-2:]):
        raise SpecError(
            f"{path}: rank {rank} exceeds {min(shape[-2:])}, the rank of a weight of "
            f"shape {list(shape)}; lower it, or use init='kaiming'"
        )
    leaf = site.leaf(index)
    if original is not None:
        original = _original(site, path, leaf, original)
    if config.init == "pissa":
        return pissa(leaf, original, rank, scale, path)
    rounds = config.loftq_rounds
    a, b, base = loftq(leaf, original, rank, scale, rounds, path)
    return a, b, base if rounds else None


def _original(site: Site, path: str, leaf: Any, original: Any) -> Any:
    """The weight that a leaf was quantized from, in matrix form, checked."""
    shape = site.shape()
    expected = getattr(site.converted(), "kernel_shape", shape)
    if isinstance(original, QuantizedTensor):
        expected = shape
    if tuple(original.shape) != tuple(expected):
        raise SpecError(
            f"{path}: the original has shape {list(original.shape)}, the packed weight "
            f"{list(expected)}; pass the model that it was quantized from"
        )
    original = site.matrix(original)
    w = dense(original)
    missed, size = (float(jnp.linalg.norm(x)) for x in (w - dense(leaf), w))
    if missed > size:
        raise SpecError(
            f"{path}: the weight is farther from the original than zeros are (error "
            f"{missed:.3g}, norm {size:.3g}); pass the model that it was quantized "
            "from. Recipes that rotate, or scale what comes in, leave none"
        )
    return original

"""Quantizing plain trees of parameters, and what a model weighs.

Works on any pytree of arrays: Flax Linen and NNX states, Haiku dictionaries, lists. A
leaf's path is its keys joined by dots, and a recipe decides by path. Kernels are `[...,
in, out]`; a leaf named `embedding` or `embeddings` is a table `[vocab, dim]` and
becomes `Transposed`, quantized along `dim`. Vectors, integers and leaves that no rule
names stay as they are.

What a bare tree cannot say is which axes of a kernel of higher rank are contracted: all
but the last two count as leading. `qjax.nn.quantize_module` and
`qjax.nn.linen.quantize_params` know the layers and get this right.
"""

import dataclasses
import math
import sys
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.methods import Method, quantize
from qjax.recipes import Recipe, load_recipe
from qjax.tensor import QuantizedTensor, format_bytes

TABLES = ("embedding", "embeddings")
"""Names of leaves that are look-up tables `[vocab, dim]`."""


def quantize_tree(
    params: PyTree,
    recipe: Recipe | Format | str,
    method: Method | None = None,
    *,
    key: Array | None = None,
    nonfinite: str = "raise",
    arrange: "Arrange | None" = None,
) -> PyTree:
    """Quantizes the leaves of a tree that a recipe names, one at a time.

    Args:
      params: any pytree of arrays.
      recipe: a recipe, a preset name, or one format (for every leaf named `kernel`,
        outside embeddings and the head). Rules match dotted paths, such as
        `params.Dense_0.kernel`.
      method: overrides the method of every rule.
      key: random key of stochastic methods; each leaf folds in its path.
      nonfinite: what to do about NaN and infinity; see `qjax.quantize`.
      arrange: how a leaf becomes a matrix: `(path, leaf)` to `(w, axis)`, with `w`
        `[..., in, out]` for axis -2 and `[..., out, in]` for -1.

    Returns:
      A tree of the same structure with `QuantizedTensor` leaves.

    Raises:
      SpecError: no rule names any leaf, or a format does not fit a leaf.
      NonFiniteError: a leaf holds NaN or infinity; the message names it.

    Example:
      >>> variables = model.init(key, x)
      >>> packed = quantize_tree(variables, qjax.Int(4, 128))
      >>> print(model_size(packed))
    """
    recipe = load_recipe(recipe)
    arrange = arrange or _by_name
    seen: list[str] = []
    matched: list[str] = []

    def one(path: Any, leaf: Any) -> Any:
        name = dotted_path(path)
        seen.append(name)
        rule = recipe.match(name, leaf.shape) if is_weight(leaf) else None
        if rule is None or rule.format is None:
            return leaf
        matched.append(name)
        w, axis = arrange(name, leaf)
        options: dict[str, Any] = {"nonfinite": nonfinite, "name": name}
        if key is not None:
            options["key"] = jax.random.fold_in(
                key, np.uint32(zlib.crc32(name.encode()))
            )
        try:
            return quantize(w, rule.format, method or rule.method, axis=axis, **options)
        except SpecError as error:
            text = str(error).removeprefix(f"{name}: ")
            raise SpecError(
                f"{name}: {text}; or put a rule that keeps it before {rule.pattern!r}"
            ) from None

    done = jax.tree.map_with_path(one, params, is_leaf=is_quantized)
    check_matched(recipe, matched, seen)
    return done


Arrange = Callable[[str, Any], tuple[Any, int]]
"""Says how a leaf becomes a matrix; see `quantize_tree`."""


def _by_name(name: str, leaf: Any) -> tuple[Any, int]:
    return leaf, -1 if name.rpartition(".")[2] in TABLES else -2


def check_matched(recipe: Recipe, matched: list[str], seen: list[str]) -> None:
    """Raises SpecError when a recipe that names formats matched nothing."""
    patterns = [rule.pattern for rule in recipe.rules if rule.format is not None]
    if patterns and not matched:
        raise SpecError(
            f"recipe {recipe.name!r} names no parameter: patterns {patterns}, paths "
            f"{seen[:6]}{' ...' if len(seen) > 6 else ''}; write a rule for them, such "
            "as Rule('*.kernel', format)"
        )


def dequantize_tree(params: PyTree, dtype: Any = None) -> PyTree:
    """Replaces every quantized leaf by its dense weight.

    Args:
      params: a tree from `quantize_tree`.
      dtype: dtype of the dense weights; default each one's logical dtype.

    Returns:
      A tree of arrays.
    """
    return jax.tree.map(
        lambda leaf: leaf.dequantize(dtype) if is_quantized(leaf) else leaf,
        params,
        is_leaf=is_quantized,
    )


def is_quantized(leaf: Any) -> bool:
    """Whether a node of a tree is a `QuantizedTensor`."""
    return isinstance(leaf, QuantizedTensor)


def is_weight(leaf: Any) -> bool:
    """Whether a leaf is a float array of rank 2 or more."""
    return (
        not is_quantized(leaf)
        and hasattr(leaf, "dtype")
        and len(leaf.shape) >= 2
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def dotted_path(path: Any) -> str:
    """A `jax.tree_util` key path as recipes write it: `layers.3.attn.q.kernel`."""
    keys = (k for k in path if not _is_value(k))
    return ".".join(jax.tree_util.keystr((k,), simple=True) for k in keys)


def _is_value(key: Any) -> bool:
    """Whether a key is the step from an NNX variable to its value."""
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What a model weighs.

    Attributes:
      nbytes: bytes of all parameters as held, codes, scales and vectors included.
      parameters: logical number of parameters.
      quantized_bytes: bytes of quantized weights.
      quantized_parameters: logical number of quantized weights.
    """

    nbytes: int
    parameters: int
    quantized_bytes: int
    quantized_parameters: int

    @property
    def bits_per_weight(self) -> float:
        """All bytes, in bits over all parameters (0 when there are none)."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        share = 100 * self.quantized_parameters / max(self.parameters, 1)
        return (
            f"{format_bytes(self.nbytes)}, {self.parameters:,} parameters, "
            f"{self.bits_per_weight:.3f} bits/weight, {share:.1f} % quantized"
        )


def model_size(model: Any) -> ModelSize:
    """Measures a module or a tree of parameters in true bytes.

    Args:
      model: an NNX module (its parameters, shared ones once; random state is left
        out), or any pytree of arrays, abstract ones included.

    Returns:
      Bytes and counts.

    Example:
      >>> print(model_size(model))
      22.5 MB, 6,821,376 parameters, 26.388 bits/weight, 0.0 % quantized
    """
    total = count = packed = packed_count = 0
    for leaf in jax.tree.leaves(_parameters(model), is_leaf=is_quantized):
        if not hasattr(leaf, "dtype"):
            continue
        size = math.prod(leaf.shape)
        if is_quantized(leaf):
            nbytes = leaf.nbytes
            packed, packed_count = packed + nbytes, packed_count + size
        else:
            nbytes = size * jnp.dtype(leaf.dtype).itemsize
        total, count = total + nbytes, count + size
    return ModelSize(total, count, packed, packed_count)


def param_count(model: Any) -> int:
    """Logical number of parameters; see `model_size`."""
    return model_size(model).parameters


def _parameters(model: Any) -> Any:
    """The parameters of an NNX module; a tree is its own."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(model, nnx.Module):
        return model
    return nnx.state(model, nnx.Not(nnx.RngState))

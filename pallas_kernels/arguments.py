"""Checks that the products share: every argument against the weight's spec.

Backends see only what fits together. Messages name operation, argument, what it is and
what was expected.
"""

import importlib
from types import ModuleType
from typing import Any, NoReturn

import jax.numpy as jnp

from .weights import KernelError, Weight, WeightSpec, check

BACKENDS = ("tpu", "gpu", "cpu", "reference")
FLOATS = ("float32", "bfloat16", "float16")


def refuse(name: str, argument: str, got: Any, expected: Any) -> NoReturn:
    """Raises `KernelError`, for example `refuse("matmul", "m is", 3, "even")`."""
    raise KernelError(f"{name}: {argument} {got}, expected {expected}")


def one_of(name: str, argument: str, got: Any, allowed: tuple[str, ...]) -> None:
    """Refuses a name that is not allowed."""
    if got not in allowed:
        refuse(name, f"{argument} is", repr(got), f"one of {allowed}")


def check_activations(name: str, x: Any, dtypes: tuple[str, ...]) -> None:
    """Refuses activations that are no matrix of one of the dtypes."""
    if getattr(x, "ndim", None) != 2:
        refuse(name, "x has shape", list(getattr(x, "shape", ())), "two axes")
    if jnp.dtype(x.dtype).name not in dtypes:
        refuse(name, "x has dtype", x.dtype, f"one of {dtypes}")


def check_product(
    name: str,
    x: Any,
    weight: Weight,
    spec: WeightSpec,
    *,
    bias: Any,
    layer: Any,
    dtypes: tuple[str, ...] = FLOATS,
    transpose: bool = False,
) -> None:
    """Checks the arguments of a product `x W + bias`.

    Args:
      name: the operation, for messages.
      x: `[m, k]`; `[m, n]` when `transpose`.
      weight: the arrays.
      spec: what they should be.
      bias: `[n]` (`[k]` when `transpose`) or None.
      layer: int32 scalar where arrays have a leading axis, else None.
      dtypes: what `x` may be.
      transpose: the product is `x W^T`.

    Raises:
      KernelError: an argument does not fit.
    """
    check_activations(name, x, dtypes)
    if spec.group < 1:
        expected = "at least 1 (k for one scale per column)"
        refuse(name, "spec.group is", spec.group, expected)
    inner, columns = (spec.n, spec.k) if transpose else (spec.k, spec.n)
    if x.shape[1] != inner:
        side = "columns of W (transpose)" if transpose else "rows of W"
        expected = f"[m, {inner}], its columns the {side}"
        refuse(name, "x has shape", list(x.shape), expected)
    if spec.layout == "canonical":
        check(weight, spec, (x.shape[0], spec.k), name=name)
    if bias is not None and tuple(bias.shape) != (columns,):
        refuse(name, "bias has shape", list(bias.shape), [columns])
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        refuse(name, "bias has dtype", bias.dtype, "a float")
    stacked = weight.scale.ndim == 3
    if stacked and layer is None:
        expected = "an int32 scalar, because the weight has a layer axis"
        refuse(name, "layer is", None, expected)
    if layer is not None:
        if not stacked:
            expected = "None, because the weight has no layer axis"
            refuse(name, "layer is", "given", expected)
        if jnp.ndim(layer) or not jnp.issubdtype(jnp.result_type(layer), jnp.integer):
            refuse(name, "layer is", repr(layer), "an int32 scalar")


def load_backend(
    name: str,
    package: str | None,
    backend: str,
    spec: WeightSpec,
    x: Any,
    kind: Any,
    *,
    transpose: bool = False,
    **options: Any,
) -> ModuleType:
    """A backend's module, imported when it is asked for and if it can do a product.

    A machine without a GPU so never loads its compiler.

    Args:
      name: the operation, for messages.
      package: the operation's folder, `__package__` of the caller.
      backend: the module's name.
      spec: the weight.
      x: the activations.
      kind: what they are multiplied as, for messages.
      transpose: the product is `x W^T`.
      **options: more for the module's `obstacle`.

    Returns:
      The module.

    Raises:
      KernelError: the backend refuses, with its reason.
    """
    module = importlib.import_module(f"{package}.{backend}")
    reason = module.obstacle(spec, x.shape[0], x.dtype, transpose=transpose, **options)
    if reason is not None:
        turned = ", transposed" if transpose else ""
        raise KernelError(
            f"{name}: backend {backend!r} cannot multiply {kind} {list(x.shape)} "
            f"by {spec}{turned}: {reason}"
        )
    return module

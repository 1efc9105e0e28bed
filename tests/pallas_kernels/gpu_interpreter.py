"""The interpreter of GPU kernels, which came with jax 0.12."""

from typing import Any

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

_PARAMETERS: Any = getattr(plgpu, "InterpretGPUParams", None)

needs_interpreter = pytest.mark.skipif(
    _PARAMETERS is None,
    reason=f"GPU kernels are interpreted since jax 0.12; this is {jax.__version__}",
)


def interpreter(**options: bool) -> Any:
    """Parameters of the interpreter."""
    return _PARAMETERS(**options)

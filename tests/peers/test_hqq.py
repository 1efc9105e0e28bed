"""HQQ's weight error is at most the hqq package's on every linear of the bundled model.

Same bits, same groups of 64, both axes. hqq's axis 0 makes strided groups along the
outputs; permuting the outputs makes them contiguous, so both libraries fit the very
same groups. The measure is the mean absolute error, which hqq's stopping rule watches.
Its objective, the 0.7-norm, and the mean squared error must be lower over the model.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qjax.formats import Int
from qjax.methods import HQQ, quantize

torch = pytest.importorskip("torch")
hqq = pytest.importorskip("hqq.core.quantize")

GROUP = 64
ROWS = 256


@pytest.fixture(scope="module")
def linears(model_path):
    """`{name: W[out, in]}` of the 42 linears, float32."""
    tensors = safetensors.numpy.load_file(model_path / "model.safetensors")
    linears = {
        name: np.asarray(w, np.float32)
        for name, w in tensors.items()
        if name.endswith("_proj.weight")
    }
    assert len(linears) == 42
    return linears


def theirs(w: np.ndarray, bits: int, axis: int) -> np.ndarray:
    codes, meta = hqq.Quantizer.quantize(
        torch.tensor(w),
        nbits=bits,
        group_size=GROUP,
        axis=axis,
        device="cpu",
        compute_dtype=torch.float32,
        bitpack=False,
    )
    values = (codes - meta["zero"]) * meta["scale"]
    return values.reshape(w.shape).numpy()


def order(out: int, axis: int) -> np.ndarray:
    """The order of outputs in which hqq's groups are contiguous."""
    ranks = np.arange(out)
    return ranks if axis == 1 else ranks.reshape(GROUP, out // GROUP).T.reshape(-1)


def side_by_side(linears, axis: int) -> np.ndarray:
    """All kernels as one matrix of 256 rows: groups never cross its columns."""
    columns = []
    for w in linears.values():
        kernel = w.T[:, order(w.shape[0], axis)]
        columns += np.split(kernel, kernel.shape[0] // ROWS)
    return np.concatenate(columns, axis=1)


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_error_is_not_above_hqqs(linears, bits, axis):
    fmt = Int(bits, GROUP, symmetric=False, axis="in" if axis == 1 else "out")
    w = side_by_side(linears, axis)
    q = quantize(w, fmt, HQQ())
    mine = np.abs(np.asarray(q.dequantize(jnp.float32)) - w)
    other = {name: theirs(w, bits, axis) - w for name, w in linears.items()}
    other = np.abs(side_by_side(other, axis))
    worse, start = [], 0
    for name, kernel in linears.items():
        stop = start + kernel.size // ROWS
        a, b = mine[:, start:stop].mean(), other[:, start:stop].mean()
        worse += [f"{name}: {a:.4e} > {b:.4e}"] if a > b else []
        start = stop
    assert start == w.shape[1]
    assert not worse, "\n".join(worse)
    for power in (0.7, 2.0):
        assert np.mean(mine**power) < np.mean(other**power), power

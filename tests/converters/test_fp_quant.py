"""FP-Quant layers: small floats behind a Hadamard transform."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.converters.fp_quant import FPQuant
from qjax.errors import FormatError, UnsupportedError
from qjax.trellis import Incoherent
from qjax.wrappers import InputScaled

from .small_floats import E2M1, nibbles, power, spread

OUT, WIDE = 24, 128


def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix over the square root of its size."""
    made = np.ones((1, 1))
    while len(made) < size:
        made = np.block([[made, made], [made, -made]])
    return made / np.sqrt(size)


def layer(kind: str, rng, matrix: np.ndarray, divisor: float):
    """The tensors of a layer and its dense weight `[in, out]`."""
    codes = rng.integers(0, 16, (OUT, WIDE)).astype(np.uint8)
    if kind == "nvfp4":
        raw = rng.uniform(1, 400, (OUT, WIDE // 16)).astype(np.float32)
        raw = raw.astype(jnp.float8_e4m3fn)
        scales, real = raw.view(np.uint8), spread(raw.astype(np.float32), 16)
    else:
        scales = rng.integers(110, 130, (OUT, WIDE // 32)).astype(np.uint8)
        real = spread(power(scales), 32)
    parts = {
        "qweight": nibbles(codes),
        "scales": scales,
        "weight_global_scale": np.array([divisor], np.float32),
        "act_global_scale": np.array([1.0], np.float32),
        "forward_hadamard_matrix": matrix.astype(jnp.bfloat16),
        "backward_hadamard_matrix": matrix.astype(jnp.bfloat16),
    }
    rotated = (E2M1[codes] * real).T.astype(np.float64) / divisor
    blocks = rotated.reshape(-1, len(matrix), OUT)
    return parts, np.einsum("ij,bjo->bio", matrix, blocks).reshape(WIDE, OUT)


@pytest.mark.parametrize(
    ("kind", "divisor", "size", "stated"),
    [
        ("nvfp4", 321.5, 16, True),
        ("nvfp4", 321.5, 128, False),
        ("mxfp4", 1.0, 32, False),
        ("mxfp4", 3.0, 128, True),
    ],
)
def test_layers(kind, divisor, size, stated, rng, caplog):
    parts, want = layer(kind, rng, hadamard(size), divisor)
    reader = FPQuant({"forward_dtype": kind} if stated else {}, "here")
    assert reader.shape(parts) == (OUT, WIDE)
    q = reader.read(parts, "here: a")
    assert isinstance(q, Incoherent) and q.block == size
    assert q.format.name == kind
    got = np.asarray(q.dequantize("float32"))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
    assert f"activations ({kind.upper()}) are not rounded" in caplog.text


def test_products_transform_activations(rng):
    parts, want = layer("mxfp4", rng, hadamard(32), 3.0)
    q = FPQuant({}, "here").read(parts, "here: a")
    x = rng.normal(size=(3, WIDE)).astype(np.float32)
    got = np.asarray(qjax.matmul(x, q))
    np.testing.assert_allclose(got, x @ want, rtol=1e-4, atol=1e-4 * np.ptp(want))


@pytest.mark.parametrize("divisor", [1.0, 3.0])
def test_the_identity_is_no_transform(divisor, rng):
    parts, want = layer("mxfp4", rng, np.eye(32), divisor)
    q = FPQuant({}, "here").read(parts, "here: a")
    assert not isinstance(q, Incoherent)
    assert isinstance(q, InputScaled) == (divisor == 3.0)
    np.testing.assert_allclose(np.asarray(q.dequantize("float32")), want, rtol=2e-7)


def changed(size: int) -> np.ndarray:
    matrix = hadamard(size)
    matrix[0, 0] *= -1
    return matrix.astype(np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward_hadamard_matrix": changed(32)}, "is neither Sylvester's"),
        ({"forward_hadamard_matrix": hadamard(32)[::-1]}, "is neither Sylvester's"),
        ({"forward_hadamard_matrix": np.ones((3, 3))}, "with h a divisor of 128"),
        ({"forward_hadamard_matrix": np.ones((32, 16))}, "expected .h, h. with h"),
        ({"weight_global_scale": np.zeros(1)}, "weight_global_scale: is .*positive"),
        ({"scales": np.ones((OUT, 3), np.uint8)}, r"expected uint8 \[24, 4\]"),
    ],
)
def test_parts_that_do_not_fit(change, message, rng):
    parts, _ = layer("mxfp4", rng, hadamard(32), 1.0)
    with pytest.raises((FormatError, UnsupportedError), match=f"^here: a.*{message}"):
        FPQuant({}, "here").read(parts | change, "here: a")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"forward_dtype": "int4"}, "forward_dtype 'int4' is not read"),
        ({"pseudoquantization": True}, "pseudoquantization holds rounded dense"),
    ],
)
def test_settings_that_are_not_read(config, message):
    with pytest.raises(UnsupportedError, match=f"^here: .*{message}"):
        FPQuant(config, "here")

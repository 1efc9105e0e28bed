"""Sparse layers as compressed-tensors 0.12 stored them; later versions do not."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.converters.compressed_tensors import CompressedTensors
from qjax.errors import FormatError

GOLDEN = Path(__file__).parents[1] / "golden/converters/compressed_tensors.npz"
MARLIN = {
    "marlin-4-group": 4,
    "marlin-4-two-groups": 4,
    "marlin-4-channel": 4,
    "marlin-8-group": 8,
    "marlin-8-channel": 8,
}


def stored(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as golden:
        own = (key for key in golden if key.startswith(f"{name}/"))
        return {key.partition("/")[2]: golden[key] for key in own}


def reader(name: str) -> CompressedTensors:
    group = None if name.endswith("channel") else 128
    weights = {"num_bits": MARLIN[name], "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return CompressedTensors({"format": "marlin-24", "config_groups": groups}, "here")


@pytest.mark.parametrize("name", MARLIN)
def test_marlin_24(name):
    parts = stored(name)
    codes, scale = parts.pop("codes"), parts.pop("scale").astype(np.float32)
    assert reader(name).shape(parts) == codes.shape
    q = reader(name).read(parts, "here: a")
    want = codes * np.repeat(scale, codes.shape[1] // scale.shape[1], 1)
    np.testing.assert_array_equal(np.asarray(q.dequantize("float32")).T, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": np.zeros((16, 64), np.int32)}, "do not fit 4 bits"),
        ({"scale_packed": np.zeros((4, 72), np.float16)}, "do not fit 4 bits"),
        ({"meta": np.zeros((16, 64), np.int16)}, "do not fit 4 bits"),
        ({"meta": np.zeros((16, 128), np.int32)}, "do not fit 4 bits"),
        ({"scale_packed": np.zeros((5, 64), np.float16)}, "5 scales per column"),
        ({"weight_packed": np.zeros((16, 128), np.int64)}, "int64 words of 4 bits"),
    ],
)
def test_marlin_24_that_does_not_fit(change, message):
    parts = stored("marlin-4-group") | change
    with pytest.raises(FormatError, match=f"^here: a: .*{message}"):
        reader("marlin-4-group").read(parts, "here: a")


@pytest.mark.parametrize("name", ["sparse-24-bitmask", "sparse-bitmask"])
def test_bitmasks(name):
    parts = stored(name)
    codes = parts.pop("codes")
    parts["compressed"] = parts["compressed"].view(jnp.bfloat16)
    sparse = CompressedTensors({"sparsity_config": {"format": name}}, "here")
    assert sparse.shape(parts) == codes.shape
    q = sparse.read(parts, "here: a")
    np.testing.assert_array_equal(np.asarray(q.dequantize("float32")).T, codes)

"""Layers that MLX saved, read, and ours, loaded by MLX: on its own CPU backend.

Integers have a bias there and a zero-point here. Values are therefore the same bit for
bit where `bias / scale` is exact, and elsewhere up to the last bits of float32; codes,
scales and biases always come back as they were.
"""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import qjax
from qjax.converters.huggingface import open_checkpoint
from qjax.converters.mlx import FLOATS, GROUPS, WIDTHS, MLXWriter
from qjax.converters.packed import PackedCheckpoint
from qjax.formats import Int

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

DTYPES = ("float16", "bfloat16", "float32")
OUT, WIDE = 6, 256


def array(leaf) -> np.ndarray:
    """An array of MLX in NumPy, in its own dtype."""
    if leaf.dtype == mx.bfloat16:
        return np.array(leaf.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(leaf)


def packed(weight, options) -> dict:
    """Parts of a weight `[out, in]` as MLX quantizes it."""
    names = ("weight", "scales", "biases")
    parts = mx.quantize(weight, **options)
    return dict(zip(names, parts, strict=False))


def dense(parts, options) -> np.ndarray:
    """float32 `[in, out]` as MLX dequantizes it."""
    wide = dict(parts)
    if "biases" in parts:  # in the arithmetic of float32, not of 16 bits
        wide |= {name: parts[name].astype(mx.float32) for name in ("scales", "biases")}
    return array(mx.dequantize(*wide.values(), dtype=mx.float32, **options)).T


def read(folder, parts, options):
    """The layer that `mx.save_safetensors` and config.json describe."""
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"), {f"a.{k}": v for k, v in parts.items()}
    )
    config = {"model_type": "llama", "quantization": options}
    (folder / "config.json").write_text(json.dumps(config))
    with open_checkpoint(folder) as source:
        opened = PackedCheckpoint(source)
        assert opened.names() == ["a.weight"] and opened.kind == "mlx"
        assert opened.shape("a.weight") == (OUT, WIDE)
        return opened.read("a.weight")


def written(folder, q):
    """Parts of a weight as MLX loads them from our file, and their options."""
    writer, file = MLXWriter(), str(folder / "ours.safetensors")
    save_file(dict(writer.write(q, "there: a")), file)
    loaded = mx.load(file)
    order = [name for name in ("weight", "scales", "biases") if name in loaded]
    return {name: loaded[name] for name in order}, writer.settings([])


def same(ours, theirs) -> None:
    assert list(ours) == list(theirs)
    for name, leaf in theirs.items():
        assert ours[name].dtype == leaf.dtype
        assert array(ours[name]).tobytes() == array(leaf).tobytes(), name


def grid(bits, group, dtype):
    """A weight that codes hold exactly, with scales that are powers of two."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (OUT, WIDE // group, group))
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1  # both ends, so MLX finds the scale
    steps = 2.0 ** rng.integers(-6, 0, (OUT, WIDE // group, 1))
    made = (codes - 2 ** (bits - 1)) * steps
    return mx.array(made.reshape(OUT, WIDE).astype("f4")).astype(getattr(mx, dtype))


def normal(dtype):
    made = np.random.default_rng(0).normal(size=(OUT, WIDE)).astype("f4")
    made[1, :128], made[2, :128] = 0, 0.75
    return mx.array(made).astype(getattr(mx, dtype))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_integers_on_a_grid(bits, group, tmp_path):
    options = {"group_size": group, "bits": bits, "mode": "affine"}
    for dtype in DTYPES:
        weight = grid(bits, group, dtype)
        parts = packed(weight, options)
        q = read(tmp_path, parts, options)
        want = dense(parts, options)
        np.testing.assert_array_equal(want, array(weight).astype("f4").T)
        np.testing.assert_array_equal(q.dequantize("float32"), want)
        ours, said = written(tmp_path, q)
        assert said == options
        same(ours, parts)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_integers(bits, group, tmp_path):
    options = {"group_size": group, "bits": bits, "mode": "affine"}
    for dtype in DTYPES:
        parts = packed(normal(dtype), options)
        q = read(tmp_path, parts, options)
        assert q.dtype == dtype
        want = dense(parts, options)
        near = 4 * np.finfo("f4").eps * np.abs(want).max()
        got = np.asarray(q.dequantize("float32"))
        np.testing.assert_allclose(got, want, rtol=0, atol=near)
        ours, said = written(tmp_path, q)
        assert said == options
        if dtype == "float32":  # a zero-point has several biases there
            bias = ours.pop("biases")
            np.testing.assert_allclose(array(bias), array(parts.pop("biases")), 2e-7)
            again = dense(ours | {"biases": bias}, options)
            np.testing.assert_allclose(again, want, rtol=0, atol=near)
        same(ours, parts)


@pytest.mark.parametrize("mode", FLOATS)
def test_small_floats(mode, tmp_path):
    fmt = FLOATS[mode]
    options = {"group_size": fmt.group_size, "bits": fmt.code_bits, "mode": mode}
    for dtype in DTYPES:
        parts = packed(normal(dtype), options)
        q = read(tmp_path, parts, options)
        want = dense(parts, options)
        np.testing.assert_array_equal(q.dequantize("float32"), want)
        ours, said = written(tmp_path, q)
        assert said == options
        same(ours, parts)


OURS = [
    *(Int(bits, 64, scale_dtype="bfloat16") for bits in (2, 3, 4, 5, 6, 8)),
    Int(4, 32, symmetric=False, scale_dtype="float16", zero_dtype="uint8"),
    FLOATS["mxfp4"],
    FLOATS["mxfp8"],
]


@pytest.mark.parametrize("fmt", OURS, ids=repr)
def test_layers_of_mlx_take_ours(fmt, tmp_path, rng):
    """Quantized here, computed there."""
    w = rng.normal(size=(WIDE, 32)).astype("f4")
    q = qjax.quantize(w, fmt)
    parts, options = written(tmp_path, q)
    got = np.asarray(q.dequantize("float32"))
    want = dense(parts, options)
    near = 4 * np.finfo("f4").eps * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=near if "biases" in parts else 0)
    layer = nn.QuantizedLinear(WIDE, 32, bias=False, **options)
    layer.load_weights(list(parts.items()))
    x = rng.normal(size=(3, WIDE)).astype("f4")
    np.testing.assert_allclose(array(layer(mx.array(x))), x @ got, rtol=0, atol=1e-3)

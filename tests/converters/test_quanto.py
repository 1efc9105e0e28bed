"""Layers of optimum-quanto against a packer restated from the layout, and refusals."""

import logging

import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax.converters.biases import bias_of_zero
from qjax.converters.packed import check_parts
from qjax.converters.quanto import Quanto, QuantoWriter, group_size
from qjax.errors import FormatError, QjaxError, UnsupportedError
from qjax.formats import FP8, NF4, Int
from qjax.wrappers import Permuted, RoundedInputs

OUT, WIDE, GROUP = 6, 160, 32


def layer(bits, out=OUT, wide=WIDE, shift_dtype="float16"):
    """Parts of a layer, and its dense weight `[in, out]`."""
    rng = np.random.default_rng(bits)
    group = group_size(wide)
    codes = rng.integers(0, 2**bits, (out * wide // group, group))
    runs = np.pad(codes, [(0, -len(codes) % (8 // bits)), (0, 0)])
    data = np.zeros((len(runs) * bits // 8, group), np.uint8)
    for place, run in enumerate(np.split(runs, 8 // bits)):
        data |= (run << (place * bits)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.1, (len(codes), 1)).astype(np.float16)
    shift = rng.integers(0, 2**bits, scale.shape).astype(shift_dtype)
    wide_scale = scale.astype(np.float32)
    if shift.dtype == np.float16:
        shift = (shift + np.float16(0.25)) * scale
        dense = codes * wide_scale - shift
    else:
        dense = (codes - shift.astype(np.float32)) * wide_scale
    parts = {
        "weight._data._data": data,
        "weight._scale": scale,
        "weight._shift": shift,
        "input_scale": np.ones((), np.float16),
        "output_scale": np.ones((), np.float16),
        "expected_shape": np.array([out, wide]),
    }
    return parts, dense.reshape(out, wide).T.astype(np.float32)


def test_sizes_of_groups():
    found = {rows: group_size(rows) for rows in (64, 128, 160, 192, 256, 320, 288, 130)}
    sizes = {64: 64, 128: 128, 160: 32, 192: 96, 256: 128, 320: 64, 288: 96, 130: 130}
    assert found == sizes


@pytest.mark.parametrize("dtype", ["float16", "uint8", "int8", "int32"])
@pytest.mark.parametrize("shape", [(6, 160), (5, 33), (3, 192), (8, 64)])
@pytest.mark.parametrize("bits", [2, 4])
def test_packed(bits, shape, dtype):
    parts, want = layer(bits, *shape, dtype)
    reader = Quanto({}, "here")
    check_parts(reader, parts, "here: a")
    assert reader.shape(parts) == shape
    q = reader.read(parts, "here: a")
    np.testing.assert_allclose(q.dequantize("float32"), want, atol=1e-6, rtol=1e-6)
    writer = QuantoWriter()
    made = writer.write(q, "there: a.b")
    for name, leaf in made.items():
        np.testing.assert_array_equal(leaf, parts[name], err_msg=name)
    assert writer.map() == {"a.b": {"weights": f"qint{bits}", "activations": "none"}}
    again = reader.read(made | {"expected_shape": np.array(shape)}, "there: a.b")
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())


def test_shape_that_nothing_says():
    parts, _ = layer(4)
    del parts["expected_shape"]
    assert Quanto({}, "here").shape(parts) == (30, 32)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_eight_bits(dtype, rng):
    kind = getattr(ml_dtypes, dtype, dtype)
    data = rng.normal(size=(5, 33)).astype(np.float32) * 30
    scale = rng.uniform(0.01, 0.1, (5, 1)).astype(np.float16)
    parts = {"weight._data": data.astype(kind), "weight._scale": scale}
    reader = Quanto({}, "here")
    check_parts(reader, parts, "here: a")
    assert reader.shape(parts) == (5, 33)
    q = reader.read(parts, "here: a")
    want = parts["weight._data"].astype(np.float32) * scale.astype(np.float32)
    np.testing.assert_array_equal(q.dequantize("float32"), want.T)
    made = QuantoWriter().write(q, "there: a")
    for name, leaf in parts.items():
        assert made[name].tobytes() == leaf.tobytes(), name
    single = parts | {"weight._scale": np.float32([0.5])}
    q = reader.read(single, "here: a")
    want = parts["weight._data"].astype(np.float32) * np.float32(0.5)
    np.testing.assert_array_equal(q.dequantize("float32"), want.T)
    made = QuantoWriter().write(q, "there: a")
    assert made["weight._scale"].tolist() == [[0.5]] * 5


def test_groups_of_one_value():
    """A scale of 0 and a shift: quanto writes that for groups of equal weights."""
    parts, want = layer(4)
    want = want.T.reshape(-1, GROUP).copy()
    parts["weight._scale"][3:5] = 0
    parts["weight._shift"][3] = 0
    parts["weight._shift"][4] = -1.5
    want[3], want[4] = 0, 1.5
    q = Quanto({}, "here").read(parts, "here: a")
    got = np.asarray(q.dequantize("float32")).T.reshape(-1, GROUP)
    np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-6)
    made = QuantoWriter().write(q, "there: a")
    again = Quanto({}, "there").read(
        made | {"expected_shape": parts["expected_shape"]}, "there: a"
    )
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())


def test_activations(caplog):
    parts, _ = layer(4)
    parts["input_scale"] = np.float16(0.25)
    parts["output_scale"] = np.float16(0.5)
    settings = {"a": {"weights": "qint4", "activations": "qfloat8_e4m3fn"}}
    with caplog.at_level(logging.WARNING):
        reader = Quanto(settings, "here")
        q = reader.read(parts, "here: a")
        other = reader.read(parts, "here: b")
    assert isinstance(q, RoundedInputs) and q.activation == "float8_e4m3fn"
    assert float(q.scale) == 0.25
    assert isinstance(other, RoundedInputs) and other.activation == "int8"
    assert caplog.text.count("rounds its outputs") == 1
    settings["a"]["activations"] = "qfloat8_e5m2"
    with pytest.raises(UnsupportedError, match="here: a: activations of 'qfloat8_e5m2"):
        Quanto(settings, "here").read(parts, "here: a")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight._scale": np.ones((7, 1), "f2")}, FormatError, "7 scales and 30 shif"),
        ({"weight._shift": np.ones((29, 1), "f2")}, FormatError, "30 scales and 29"),
        ({"weight._shift": np.ones((30, 1), bool)}, FormatError, "_shift: is bool"),
        ({"expected_shape": np.array([60, 16])}, FormatError, "no groups of a weight"),
        ({"expected_shape": np.array([-6, -160])}, FormatError, "no groups of a weig"),
        (
            {"weight._data._data": np.zeros((9, 32), "u1")},
            FormatError,
            "9 rows of bytes for 30 groups .*, expected 15 for qint4, 8 for qint2",
        ),
        ({"input_scale": np.float16(-1)}, FormatError, "input_scale: expected one"),
        ({"output_scale": np.ones(2)}, FormatError, "output_scale: expected one"),
        ({"weight._data": np.zeros((6, 160), "i2")}, UnsupportedError, "of int16 are"),
        ({"weight._data": np.zeros((6, 160), "i1")}, FormatError, "30 scales for 6 ou"),
    ],
)
def test_layers_that_do_not_fit(changes, error, message):
    parts, _ = layer(4)
    with pytest.raises(error, match=rf"^here: a.*{message}"):
        Quanto({}, "here").read(parts | changes, "here: a")


def test_widths_that_only_the_settings_tell_apart():
    parts = {
        "weight._data._data": np.zeros((1, 40), np.uint8),
        "weight._scale": np.ones((2, 1), np.float16),
        "weight._shift": np.zeros((2, 1), np.uint8),
    }
    with pytest.raises(FormatError, match="expected 1 for qint4, 1 for qint2"):
        Quanto({}, "here").read(parts, "here: a")
    q = Quanto({"a": {"weights": "qint2"}}, "here").read(parts, "here: a")
    assert q.format.bits == 2


def test_shapes_that_lie(rng):
    """Every wrong shape ends in an error of qjax, or in a tensor."""
    parts, _ = layer(4)
    for _ in range(100):
        name = rng.choice(sorted(set(parts) - {"expected_shape"}))
        shape = rng.integers(1, 40, rng.integers(0, 3))
        wrong = parts | {name: np.zeros(shape, parts[name].dtype)}
        try:
            check_parts(Quanto({}, "here"), wrong, "here: a")
            Quanto({}, "here").read(wrong, "here: a")
        except QjaxError:
            pass


HALF = {"scale_dtype": "float16"}


def permuted(q):
    return Permuted(q, np.arange(q.shape[0], dtype=np.int32)[::-1].copy())


@pytest.mark.parametrize(
    ("fmt", "change", "message"),
    [
        (Int(3, 32, **HALF), None, "has 3 bits in groups of 32; quanto holds 8 bits"),
        (Int(4, 64, **HALF), None, "2 or 4 bits in groups of 32 for 160 inputs"),
        (Int(8, 32, **HALF), None, "has 8 bits in groups of 32"),
        (Int(8, "channel", symmetric=False), None, "has 8 bits in groups of 160"),
        (Int(4, 32, **HALF), permuted, "for 160 inputs, in order"),
        (Int(4, 32, symmetric=False, **HALF), None, "no quotients of float16 shifts"),
        (FP8("e4m3", "block"), None, "holds FP8 with a scale per output"),
        (NF4(32), None, "holds integers with groups along `in`"),
        (Int(8, "channel"), RoundedInputs, "holds integers"),
    ],
)
def test_what_is_not_written(fmt, change, message, rng):
    q = qjax.quantize(rng.normal(size=(160, 12)).astype(np.float32), fmt)
    q = q if change is None else change(q)
    with pytest.raises(UnsupportedError, match=f"there: a: .*{message}"):
        QuantoWriter().write(q, "there: a")


def test_what_is_written(rng):
    w = rng.normal(size=(160, 12)).astype(np.float32)
    writer = QuantoWriter()
    formats = [QuantoWriter.fallback, FP8("e4m3", "tensor"), Int(4, 32), Int(2, 32)]
    for i, fmt in enumerate(formats):
        q = qjax.quantize(w, fmt)
        made = dict(writer.write(q, f"there: {i}"))
        made["expected_shape"] = np.array([12, 160])
        again = Quanto({}, "there").read(made, "there: a")
        np.testing.assert_array_equal(again.dequantize("float32"), q.dequantize("f4"))
    kinds = [entry["weights"] for entry in writer.map().values()]
    assert kinds == ["qint8", "qfloat8_e4m3fn", "qint4", "qint2"]
    settings = writer.settings(["lm_head"])
    assert settings["quant_method"] == "quanto"
    assert settings["modules_to_not_convert"] == ["lm_head"]


def test_biases_of_zero_points():
    scale = np.float32([[0.1, 0.3, 0]])
    zero = np.float32([[7 / 3, 1e-3, 5]])
    half = scale.astype(np.float16)
    assert bias_of_zero(half, zero) is None
    rng = np.random.default_rng(0)
    scale, bias = rng.normal(size=(2, 1, 1000)).astype(np.float32)
    zero = -bias / scale  # several biases may give it; one of them is found
    np.testing.assert_array_equal(-bias_of_zero(scale, zero) / scale, zero)
    exact = np.float32([[-4, 0.5, 5]])
    exact[0, :2] /= half[0, :2].astype(np.float32)
    np.testing.assert_array_equal(bias_of_zero(half, exact), np.float16([[4, -0.5, 0]]))

"""HQQ layers against a packer restated from the layout, and what is refused."""

import numpy as np
import pytest

import qjax
import qjax.converters.runs as runs
from qjax.converters.hqq import HQQ, HQQWriter
from qjax.converters.hqq_parts import flat_state
from qjax.converters.packed import check_parts
from qjax.errors import FormatError, QjaxError, UnsupportedError
from qjax.formats import NF4, Int
from qjax.wrappers import Permuted, Transposed

FIELDS = {"8bit_u8": 1, "4bit_u8": 2, "3bit_32": 10, "2bit_u8": 4, "1bit_u8": 8}
NAMES = {1: "1bit_u8", 2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8"}


def text(value: str) -> np.ndarray:
    return np.frombuffer(value.encode(), np.uint8)


def packed(matrix: np.ndarray, packing: str) -> np.ndarray:
    """Runs of rows, the first in the highest bits."""
    fields, width = FIELDS[packing], int(packing[0])
    matrix = np.pad(matrix, [(0, -len(matrix) % fields), (0, 0)])
    words = np.zeros((len(matrix) // fields, matrix.shape[1]), np.int64)
    for run in np.split(matrix, fields):
        words = (words << width) | run
    return words.astype(np.int32 if packing == "3bit_32" else np.uint8)


def layer(out, wide, bits, group, axis, dtype="float32"):
    """Parts of a layer and its dense weight `[in, out]`."""
    rng = np.random.default_rng(bits)
    shape = (-1, group) if axis == 1 else (group, -1)
    matrix = rng.integers(0, 2**bits, (out, wide)).reshape(shape)
    single = (len(matrix), 1) if axis == 1 else (1, matrix.shape[1])
    scale = rng.uniform(0.01, 0.1, single).astype(dtype)
    zero = rng.uniform(0, 2**bits, single).astype(dtype)
    dense = (matrix.astype(np.float32) - zero) * scale.astype(np.float32)
    packing = NAMES.get(bits, "8bit_u8")
    numbers = {"nbits": bits, "axis": axis, "group_size": group}
    parts = {
        "W_q": packed(matrix, packing),
        "scale": scale,
        "zero": zero,
        "shape": np.array([out, wide]),
        "packing": text(packing),
        "compute_dtype": text(f"torch.{dtype}"),
        **{name: np.array(value, np.int32) for name, value in numbers.items()},
    }
    return parts, dense.reshape(out, wide).T


# (out, in, bits, group, axis): rows that do not fill a word of three bits or do, one
# group, groups of whole blocks of eight or not
CASES = [
    (12, 48, 1, 8, 1),
    (24, 20, 1, 20, 1),
    (12, 24, 2, 24, 1),
    (7, 21, 3, 7, 1),
    (10, 48, 3, 16, 1),
    (7, 48, 3, 24, 1),
    (6, 33, 3, 3, 0),
    (6, 20, 4, 20, 1),
    (6, 5, 4, 6, 0),
    (12, 7, 4, 4, 0),
    (5, 14, 5, 7, 1),
    (5, 14, 6, 14, 1),
    (5, 14, 8, 2, 1),
    (9, 4, 8, 3, 0),
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(runs, "_MATRICES", 2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_read_and_written_again(case, dtype):
    parts, want = layer(*case, dtype)
    reader = HQQ({}, "here")
    check_parts(reader, parts, "here: a")
    assert reader.shape(parts) == case[:2]
    q = reader.read(parts, "here: a.0.b")
    np.testing.assert_array_equal(q.dequantize("float32"), want)
    assert isinstance(q, Transposed) == (case[-1] == 0)
    writer = HQQWriter()
    made = writer.write(q, "there: model.layers.0.b")
    for name, leaf in parts.items():
        assert made[name].dtype == leaf.dtype or name == "nbits"
        np.testing.assert_array_equal(made[name], leaf, err_msg=name)
    again = HQQ({}, "there").read(made, "there: a")
    assert str(again) == str(q)
    np.testing.assert_array_equal(again.dequantize("float32"), want)
    x = np.ones((2, case[1]), np.float32)
    np.testing.assert_allclose(qjax.ops.matmul(x, q), x @ want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
def test_words_as_floats(bits):
    parts, want = layer(8, 32, bits, 16, 1)
    parts["W_q"] = parts["W_q"].view(np.float16)
    parts["view_as_float"] = np.array(1, np.uint8)
    q = HQQ({}, "here").read(parts, "here: a")
    np.testing.assert_array_equal(q.dequantize("float32"), want)


def test_one_scale_for_the_weight():
    parts, _ = layer(4, 8, 4, 8, 1)
    parts |= {"scale": np.float32(0.5), "zero": np.float32(3.5)}
    codes = np.concatenate([parts["W_q"] >> 4, parts["W_q"] & 15])
    q = HQQ({}, "here").read(parts, "here: a")
    want = (codes.astype(np.float32) - 3.5) * 0.5
    np.testing.assert_array_equal(q.dequantize("float32"), want.T)


def test_statistics_that_are_codes():
    """Older files: scales and zero-points in 8 bits, rounded to half when decoded."""
    parts, _ = layer(6, 8, 4, 4, 1, "float16")
    codes = np.concatenate([parts["W_q"] >> 4, parts["W_q"] & 15])
    decoded = {}
    for name in ("scale", "zero"):
        inner, dense = layer(12, 1, 8, 3, 0, "float16")
        words, zero = inner.pop("W_q"), inner["zero"]
        half = (words.astype(np.float16) - zero) * inner["scale"]
        assert not np.array_equal(half.reshape(-1).astype(np.float32), dense[0])
        decoded[name] = half.reshape(12, 1)
        parts |= {f"meta_{name}.{key}": leaf for key, leaf in inner.items()}
        parts[f"{name}_q"] = words
        del parts[name]
    want = (codes - decoded["zero"].astype(np.float32)) * decoded["scale"].astype("f4")
    reader = HQQ({}, "here")
    check_parts(reader, parts, "here: a")
    got = reader.read(parts, "here: a").dequantize("float32")
    np.testing.assert_array_equal(got, want.reshape(6, 8).T)
    both = np.stack([parts.pop("zero_q"), parts.pop("scale_q")])
    got = reader.read(parts | {"zero_scale": both}, "here: a").dequantize("float32")
    np.testing.assert_array_equal(got, want.reshape(6, 8).T)
    floats = np.stack([decoded["zero"], decoded["scale"]])
    got = reader.read(parts | {"zero_scale": floats}, "here: a").dequantize("float32")
    np.testing.assert_array_equal(got, want.reshape(6, 8).T)


def test_flat_state():
    leaf = np.ones(2)
    inner = {"nbits": 8, "axis": 0, "shape": (4, 1), "scale": leaf}
    meta = {"scale": leaf, "nbits": 1.58, "packing": "4bit_u8", "meta_zero": inner}
    state = {"a.b": {"W_q": leaf, "meta": meta | {"quant_zero": True}, "bias": None}}
    made = flat_state(state, "here")
    assert made.pop("a.b.W_q") is leaf and made["a.b.meta_zero.shape"].shape == (2,)
    assert made["a.b.nbits"] == np.float32(1.58) and made["a.b.quant_zero"] == 1
    assert made["a.b.packing"].tobytes() == b"4bit_u8" and "a.b.bias" not in made
    for state, message in (
        ({"a": {"b": {1, 2}}}, "a.b: is a set, expected a tensor"),
        ({"a": {3: leaf}}, "a has a key 3"),
        ({"a": {"b": leaf}, "a.b": leaf}, "two entries are called a.b"),
        ({"a": {"b": {"c": {"d": {"e": leaf}}}}}, "is a dict, expected a tensor"),
        ({"a": {"b": 2**40}}, "is a int, expected a tensor"),
    ):
        with pytest.raises(FormatError, match=message):
            flat_state(state, "here")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"nbits": np.int32(7)}, FormatError, "nbits is 7 with packing '4bit_u8'"),
        ({"nbits": np.int32(8)}, FormatError, "nbits is 8 with packing '4bit_u8'"),
        ({"nbits": np.int32([4, 4])}, FormatError, "nbits: expected one number"),
        ({"packing": text("4bit_32")}, FormatError, "packing '4bit_32', expected one"),
        ({"packing": np.uint8([255])}, FormatError, "packing: is not text"),
        ({"shape": np.array([6, 9])}, FormatError, r"not 4bit_u8 .* shape \[6, 9\]"),
        ({"shape": np.array([-6, -8])}, FormatError, "is not 4bit_u8 of a weight"),
        ({"shape": np.array([48])}, FormatError, "is not 4bit_u8 of a weight"),
        ({"shape": np.array([2**62, 8])}, FormatError, "is not 4bit_u8 of a weight"),
        ({"W_q": np.zeros((6, 4), np.int8)}, FormatError, "W_q is int8"),
        ({"W_q": np.zeros((6, 1), np.float16)}, FormatError, "W_q is uint8"),
        ({"scale": np.ones(3, "f4")}, FormatError, "3 scales and 12 zero-points"),
        ({"axis": np.int32(2)}, FormatError, "along axis 2"),
        ({"shape": np.array([8, 6])}, UnsupportedError, "of 4 do not divide in=6"),
        ({"zero": np.float32([np.nan])}, FormatError, "zero-point is not finite"),
        ({"compute_dtype": text("torch.int8")}, UnsupportedError, "is 'int8'"),
        ({"zero_scale": np.ones((3, 2, 2)), "scale": None}, FormatError, "two matric"),
    ],
)
def test_layers_that_do_not_fit(changes, error, message):
    parts, _ = layer(6, 8, 4, 4, 1)
    parts = {k: v for k, v in (parts | changes).items() if v is not None}
    with pytest.raises(error, match=rf"^here: a.*{message}"):
        HQQ({}, "here").read(parts, "here: a")


def test_codes_beyond_the_width():
    parts, _ = layer(5, 14, 6, 7, 1)
    with pytest.raises(FormatError, match=r"has code .* expected less than 32"):
        HQQ({}, "here").read(parts | {"nbits": np.int32(5)}, "here: a")


def test_inner_statistics_that_do_not_fit():
    parts, _ = layer(6, 8, 4, 4, 1)
    inner, _ = layer(12, 1, 8, 3, 0)
    parts["scale_q"] = inner.pop("W_q")
    inner["scale"] = inner["scale"][:, :2]
    parts |= {f"meta_scale.{key}": leaf for key, leaf in inner.items()}
    del parts["scale"]
    with pytest.raises(FormatError, match=r"here: a.scale: statistics of shape \[1, 2"):
        HQQ({}, "here").read(parts, "here: a")


def test_shapes_that_lie(rng):
    """Every wrong shape ends in an error of qjax, or in a tensor."""
    parts, _ = layer(6, 8, 4, 4, 1)
    for _ in range(200):
        name = rng.choice(["W_q", "scale", "zero", "shape", "nbits", "axis"])
        shape = rng.integers(1, 5, rng.integers(1, 3))
        lie = rng.integers(-3, 9, shape).astype(parts[name].dtype)
        wrong = parts | {name: lie}
        try:
            check_parts(HQQ({}, "here"), wrong, "here: a")
            HQQ({}, "here").read(wrong, "here: a").dequantize()
        except QjaxError:
            pass


ASYMMETRIC = {"symmetric": False, "scale_dtype": "float16"}


def ordered(q):
    return Permuted(q, np.arange(q.shape[0], dtype=np.int32)[::-1].copy())


@pytest.mark.parametrize(
    ("fmt", "change", "message"),
    [
        (Int(7, 32, **ASYMMETRIC), None, "has 7 bits in groups of 32 over 64"),
        (Int(4, 48, **ASYMMETRIC), None, "in groups of 48 over 64"),
        (Int(4, 32, **ASYMMETRIC), None, "zero-points do not fit float16"),
        (Int(4, 32), ordered, "groups in an order that HQQ does not hold"),
        (Int(4, 32), lambda q: Transposed(ordered(q)), "groups in an order"),
        (Int(1, 64), None, "33 rows of codes; 1bit_u8 of HQQ holds multiples of 8"),
        (NF4(32), None, "holds integers with groups along `in`"),
        (Int(4, 11, axis="out"), None, "holds integers with groups along `in`"),
    ],
)
def test_what_is_not_written(fmt, change, message, rng):
    q = qjax.quantize(rng.normal(size=(64, 33)).astype(np.float32), fmt)
    q = q if change is None else change(q)
    with pytest.raises(UnsupportedError, match=f"there: a: .*{message}"):
        HQQWriter().write(q, "there: a")


def test_any_integers_are_written(rng):
    w = rng.normal(size=(64, 32)).astype(np.float32)
    for fmt in (Int(4, "tensor"), Int(8, 32), Int(4, 32, scale_dtype="uint8")):
        q = qjax.quantize(w, fmt)
        made = HQQWriter().write(q, "there: a")
        again = HQQ({}, "there").read(made, "there: a")
        np.testing.assert_array_equal(again.dequantize(), q.dequantize())


def test_settings(rng):
    w = rng.normal(size=(64, 32)).astype(np.float32)
    writer = HQQWriter()
    writer.write(qjax.quantize(w, Int(4, 32)), "there: model.layers.0.attn.q")
    writer.write(qjax.quantize(w, Int(4, 32)), "there: model.layers.1.attn.q")
    made = writer.settings(["lm_head"])
    assert made["quant_method"] == "hqq" and made["skip_modules"] == ["lm_head"]
    inner = made["quant_config"]["weight_quant_params"]
    assert (inner["nbits"], inner["group_size"], inner["axis"]) == (4, 32, 1)
    writer.write(qjax.quantize(w, Int(8, "channel")), "there: model.layers.0.mlp.up")
    made = writer.settings([])["quant_config"]
    assert made["mlp.up"]["weight_quant_params"]["nbits"] == 8
    assert made["attn.q"] == {**made["attn.q"], "weight_quant_params": inner}
    with pytest.raises(UnsupportedError, match=r"attn\.q: some layers of this name"):
        writer.settings(["model.layers.2.attn.q"])

"""Layers of MLX against files that it wrote, and what is refused."""

import dataclasses
import pathlib

import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax.converters.mlx import MLX, MLXWriter
from qjax.converters.packed import check_parts
from qjax.errors import FormatError, QjaxError, UnsupportedError
from qjax.formats import FP8, MXFP4, NF4, NVFP4, Int
from qjax.wrappers import Permuted

from .packers import words

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "converters" / "mlx.npz"


@pytest.fixture(scope="module")
def golden():
    """Parts by case, `MODE-BITS-GROUP-DTYPE`."""
    cases = {}
    with np.load(GOLDEN) as file:
        for name in file.files:
            case, part = name.split("/")
            leaf = file[name]
            if leaf.dtype == np.uint16:
                leaf = leaf.view(ml_dtypes.bfloat16)
            cases.setdefault(case, {})[part] = leaf
    return cases


def test_files_of_mlx(golden):
    assert len(golden) == 12
    for case, found in golden.items():
        mode, bits, group, dtype = case.split("-")
        parts = dict(found)
        dense = parts.pop("dense").T
        settings = {"bits": int(bits), "group_size": int(group), "mode": mode}
        reader = MLX(settings, "here")
        check_parts(reader, parts, "here: a")
        assert reader.shape(parts) == (6, 256), case
        q = reader.read(parts, "here: a")
        assert q.dtype == dtype
        got = np.asarray(q.dequantize("float32"))
        if mode == "affine":  # the sum is rounded there, the difference here
            np.testing.assert_allclose(got, dense, rtol=1e-6, atol=1e-6, err_msg=case)
        else:
            np.testing.assert_array_equal(got, dense, err_msg=case)
        writer = MLXWriter()
        made = writer.write(q, "there: a")
        assert sorted(made) == sorted(parts)
        for name, leaf in parts.items():
            assert made[name].shape == leaf.shape and made[name].dtype == leaf.dtype
            if (name, dtype) == ("biases", "float32"):
                np.testing.assert_allclose(made[name], leaf, rtol=2e-7)
            else:
                assert made[name].tobytes() == leaf.tobytes(), (case, name)
        assert writer.settings([]) == settings
        again = MLX(writer.settings([]), "there").read(made, "there: a")
        np.testing.assert_array_equal(again.dequantize(), q.dequantize())


def test_small_floats_without_settings(golden):
    for case, found in golden.items():
        if not case.startswith("affine"):
            parts = {name: leaf for name, leaf in found.items() if name != "dense"}
            assert MLX({}, "here").shape(parts) == (6, 256)
            q = MLX({}, "here").read(parts, "here: a")
            np.testing.assert_array_equal(q.dequantize("float32"), found["dense"].T)


def layer(bits, group, out=5, wide=128, dtype="float16"):
    """Parts of a layer, and its dense weight `[in, out]`."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (wide, out))
    scales = rng.uniform(0.01, 0.1, (out, wide // group)).astype(dtype)
    biases = rng.normal(size=scales.shape).astype(dtype)
    parts = {
        "weight": np.ascontiguousarray(words(codes, bits, 0).T).view(np.uint32),
        "scales": scales,
        "biases": biases,
    }
    spread = [
        np.repeat(leaf, group, axis=1).astype("f4").T for leaf in (scales, biases)
    ]
    return parts, codes * spread[0] + spread[1]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_integers(bits, group):
    parts, want = layer(bits, group)
    reader = MLX({"bits": bits, "group_size": group}, "here")
    assert reader.shape(parts) == (5, 128)
    q = reader.read(parts, "here: a")
    np.testing.assert_allclose(q.dequantize("float32"), want, rtol=1e-5, atol=1e-6)
    for name, leaf in MLXWriter().write(q, "there: a").items():
        assert leaf.tobytes() == parts[name].tobytes(), name


def test_groups_of_one_value():
    """A scale of 0 with a bias, which is the weight."""
    parts, want = layer(4, 32)
    parts["scales"][2, 1] = 0
    parts["scales"][3, 0] = parts["biases"][3, 0] = 0
    want[32:64, 2] = parts["biases"][2, 1]
    want[:32, 3] = 0
    q = MLX({"bits": 4, "group_size": 32}, "here").read(parts, "here: a")
    np.testing.assert_allclose(q.dequantize("float32"), want, rtol=1e-5, atol=1e-6)
    assert np.asarray(q.dequantize("f4"))[40, 2] == parts["biases"][2, 1]
    made = MLXWriter().write(q, "there: a")
    again = MLX({"bits": 4, "group_size": 32}, "there").read(made, "there: a")
    np.testing.assert_array_equal(again.dequantize("f4"), q.dequantize("f4"))


def test_layers_that_differ():
    own = {"bits": 6, "group_size": 64}
    floats = {"mode": "mxfp4", "group_size": 32, "bits": 4}
    settings = {"bits": 4, "group_size": 32, "m.a": own, "m.b": False, "m.f": floats}
    reader = MLX(settings, "here")
    for name, kind in (("m.a", (6, 64)), ("m.c", (4, 32))):
        parts, want = layer(*kind)
        assert reader.shape(parts) == (5, 128)
        q = reader.read(parts, f"here: {name}")
        np.testing.assert_allclose(q.dequantize("f4"), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        FormatError, match=r"here: m\.a: weight .* no affine layer of 6"
    ):
        reader.read(layer(4, 32)[0], "here: m.a")


def test_shape_that_two_settings_fit():
    """4 bits by 64 and 8 bits by 32 look alike: as most layers are, or as told."""
    settings = {"bits": 4, "group_size": 64, "a": {"bits": 8, "group_size": 32}}
    parts, want = layer(8, 32)
    reader = MLX(settings, "here")
    assert reader.shape(parts) == (5, 256)
    told = parts | {"expected_shape": np.array([5, 128])}
    assert reader.shape(told) == (5, 128)
    q = reader.read(told, "here: a")
    np.testing.assert_allclose(q.dequantize("f4"), want, rtol=1e-5, atol=1e-6)


def test_settings_of_one_layer_stand_alone():
    """What a layer's own settings leave out is MLX's default, not the checkpoint's."""
    settings = {
        "bits": 8,
        "group_size": 128,
        "m.a": {"bits": 6, "group_size": None},  # as mlx-lm's mixed recipes write it
        "m.b": {"group_size": 32},
        "m.c": True,
    }
    reader = MLX(settings, "here")
    for name, kind in (("m.a", (6, 64)), ("m.b", (4, 32)), ("m.c", (8, 128))):
        parts, want = layer(*kind)
        assert reader.shape(parts) == (5, 128)
        q = reader.read(parts, f"here: {name}")
        np.testing.assert_allclose(q.dequantize("f4"), want, rtol=1e-5, atol=1e-6)
    parts, want = layer(4, 64)
    reader = MLX({"bits": None, "group_size": None}, "here")
    assert reader.shape(parts) == (5, 128)
    np.testing.assert_allclose(
        reader.read(parts, "here: a").dequantize("f4"), want, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("settings", [{}, {"bits": 4, "group_size": 64}])
def test_layers_that_the_settings_leave_out(settings):
    """As mlx-lm does, from the model's shape, unless the settings fit."""
    parts, want = layer(6, 32)
    parts["expected_shape"] = np.array([5, 128])
    reader = MLX(settings, "here")
    assert reader.shape(parts) == (5, 128)
    got = reader.read(parts, "here: a").dequantize("f4")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for told in ([5, 120], [5, 100], [5, 0], [5]):
        with pytest.raises(FormatError, match="fit no bits and group_size"):
            reader.shape(parts | {"expected_shape": np.array(told)})
    parts, _ = layer(4, 64, wide=256)
    parts["expected_shape"] = np.array([5, 128])  # 8 bits by 32 would fit as well
    assert MLX({"bits": 4, "group_size": 64}, "here").shape(parts) == (5, 256)


def test_settings_that_are_missing():
    parts, _ = layer(4, 32)
    with pytest.raises(FormatError, match="fit no bits and group_size that config"):
        MLX({}, "here").shape(parts)
    with pytest.raises(FormatError, match=r"here: a: config\.json does not say bits"):
        MLX({}, "here").read(parts, "here: a")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 7, "group_size": 32}, "mode 'affine' with 7 bits is not read"),
        ({"mode": "nf4"}, "mode 'nf4' with None bits"),
        ({"bits": 4, "group_size": 32, "a": {"bits": 9}}, "with 9 bits is not read"),
        ({"mode": ["mxfp4"]}, "is not read"),
    ],
)
def test_settings_that_are_not_read(settings, message):
    with pytest.raises(UnsupportedError, match=f"^here: .*{message}"):
        MLX(settings, "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"biases": np.ones((5, 3), "f2")}, r"biases \[5, 3\], expected floats of one"),
        ({"scales": np.ones((5, 4), "u1")}, "scales uint8"),
        ({"scales": np.ones((4, 4), "f2")}, r"scales \[4, 4\], which are no affine"),
        ({"weight": np.ones((5, 15), "u4")}, "which are no affine layer of 4 bits"),
    ],
)
def test_layers_that_do_not_fit(changes, message):
    parts, _ = layer(4, 32)
    with pytest.raises(FormatError, match=rf"^here: a: .*{message}"):
        MLX({"bits": 4, "group_size": 32}, "here").read(parts | changes, "here: a")


def test_shapes_that_lie(rng):
    """Every wrong shape ends in an error of qjax, or in a tensor."""
    for parts in (
        layer(4, 32)[0],
        {**layer(4, 32)[0], "scales": np.ones((5, 4), "u1")},
    ):
        for _ in range(100):
            name = rng.choice(sorted(parts))
            shape = rng.integers(1, 20, 2)
            wrong = parts | {name: np.zeros(shape, parts[name].dtype)}
            if rng.random() < 0.3:
                del wrong["biases"]
            reader = MLX({"bits": 4, "group_size": 32}, "here")
            try:
                check_parts(reader, wrong, "here: a")
                reader.shape(wrong)
                reader.read(wrong, "here: a")
            except (QjaxError, KeyError) as error:
                assert not isinstance(error, KeyError) or error.args == ("biases",)


def permuted(q):
    return Permuted(q, np.arange(q.shape[0], dtype=np.int32)[::-1].copy())


def scrambled(q):
    zero = np.random.default_rng(0).uniform(0, 15, q.zero.shape).astype(np.float32)
    return dataclasses.replace(q, zero=zero)


@pytest.mark.parametrize(
    ("fmt", "change", "message"),
    [
        (Int(7, 32), None, "has 7 bits in groups of 32 over 96"),
        (Int(4, 16), None, "in groups of 16 over 96"),
        (Int(4, 64), None, "in groups of 64 over 96"),
        (Int(4, "channel"), None, "in groups of 96 over 96"),
        (Int(4, 32), permuted, "that divide, in order"),
        (Int(4, 32, symmetric=False), scrambled, "no quotients of float32"),
        (NVFP4(), None, "without a scale of the whole weight"),
        (FP8("e4m3"), None, "holds MXFP4, MXFP8 of E4M3"),
        (NF4(32), None, "holds integers with groups along `in`"),
    ],
)
def test_what_is_not_written(fmt, change, message, rng):
    q = qjax.quantize(rng.normal(size=(96, 64)).astype(np.float32), fmt)
    q = q if change is None else change(q)
    with pytest.raises(UnsupportedError, match=f"there: a: .*{message}"):
        MLXWriter().write(q, "there: a")


def test_what_is_written(rng):
    w = rng.normal(size=(128, 8)).astype(np.float32)
    whole = {"symmetric": False, "scale_dtype": "float16", "zero_dtype": "uint8"}
    writer, dtypes = MLXWriter(), []
    formats = [MLXWriter.fallback, Int(4, 64), Int(4, 64, **whole), MXFP4()]
    for i, fmt in enumerate(formats):
        q = qjax.quantize(w, fmt)
        made = writer.write(q, f"there: {i}")
        again = MLX(writer.settings([]), "there").read(made, f"there: {i}")
        np.testing.assert_array_equal(again.dequantize("f4"), q.dequantize("f4"))
        dtypes.append(made["scales"].dtype.name)
    # zero-points that are whole numbers need more than half for their biases
    assert dtypes == ["bfloat16", "float32", "float32", "uint8"]
    assert writer.settings(["lm_head"]) == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "3": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "lm_head": False,
    }

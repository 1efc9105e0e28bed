"""compressed-tensors layers in every layout, read and written."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.converters.compressed_tensors import CompressedTensors
from qjax.converters.compressed_write import CompressedTensorsWriter
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import FP8, MXFP4, MXFP8, NVFP4, Cast
from qjax.wrappers import RoundedInputs

from .packers import words
from .small_floats import E2M1, nibbles, power, spread, tiled

OUT, WIDE = 40, 96
FLOAT8 = jnp.float8_e4m3fn
LAYOUTS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")


def settings(layout: str, weights: dict | None = None, **more) -> dict:
    scheme = {"targets": ["Linear"], "weights": weights or {"num_bits": 4}, **more}
    return {"format": layout, "config_groups": {"group_0": scheme}}


def layer(
    layout: str, rng, out: int = OUT, wide: int = WIDE
) -> tuple[dict, np.ndarray]:
    """The tensors of a layer and its dense weight `[out, in]`."""
    codes = rng.integers(0, 16, (out, wide)).astype(np.uint8)
    floats = rng.normal(size=(out, wide)).astype(np.float32).astype(FLOAT8)
    exponents = rng.integers(110, 130, (out, wide // 32)).astype(np.uint8)
    if layout == "nvfp4-pack-quantized":
        scale = rng.uniform(1, 400, (out, wide // 16)).astype(np.float32).astype(FLOAT8)
        divisor = np.array([1234.5], np.float32)
        parts = {"weight_packed": nibbles(codes), "weight_global_scale": divisor}
        real = spread(scale.astype(np.float32) / divisor, 16)
        return parts | {"weight_scale": scale}, E2M1[codes] * real
    real = spread(power(exponents), 32)
    if layout == "mxfp4-pack-quantized":
        parts = {"weight_packed": nibbles(codes), "weight_scale": exponents}
        return parts, E2M1[codes] * real
    if layout == "mxfp8-quantized":
        parts = {"weight": floats, "weight_scale": exponents}
        return parts, floats.astype(np.float32) * real
    tiles = (-(-out // 128), -(-wide // 128))
    shape = {"tensor": (1,), "channel": (out, 1), "block": tiles}[layout]
    scale = rng.uniform(0.01, 0.1, shape).astype(jnp.bfloat16)
    real = tiled(scale, floats.shape) if layout == "block" else scale
    parts = {"weight": floats, "weight_scale": scale}
    return parts, floats.astype(np.float32) * real.astype(np.float32)


def same(made, parts) -> None:
    assert sorted(made) == sorted(parts)
    for name, leaf in parts.items():
        assert made[name].dtype == leaf.dtype and made[name].shape == leaf.shape, name
        np.testing.assert_array_equal(made[name], leaf)


def equal(q, want) -> None:
    np.testing.assert_array_equal(np.asarray(q.dequantize("float32")), want.T)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_of_floats(layout, rng):
    parts, want = layer(layout, rng)
    reader = CompressedTensors(settings(layout), "here")
    assert reader.shape(parts) == (OUT, WIDE)
    q = reader.read(parts, "here: a.b")
    equal(q, want)
    kinds = dict(zip(LAYOUTS, (NVFP4, MXFP4, MXFP8), strict=True))
    assert type(q.format) is kinds[layout]
    writer = CompressedTensorsWriter()
    same(writer.write(q, "there: a.b"), parts)
    assert writer.settings([])["format"] == layout


@pytest.mark.parametrize("shape", [(136, 264), (40, 96), (1, 256), (128, 1)])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_fp8(strategy, shape, rng):
    parts, want = layer(strategy, rng, *shape)
    weights = {"num_bits": 8, "type": "float", "strategy": strategy}
    reader = CompressedTensors(settings("naive-quantized", weights), "here")
    q = reader.read(parts, "here: a.b")
    equal(q, want)
    assert isinstance(q.format, FP8) and q.format.scale_dtype == "bfloat16"
    if shape[0] > 1:  # one output is also one tensor
        assert q.format.granularity == strategy
        same(CompressedTensorsWriter().write(q, "there: a.b"), parts)


def test_formats_of_groups_decide(rng):
    mixed = settings("mixed-precision")
    first = {"targets": ["re:.*up"], "format": LAYOUTS[0], "weights": {"num_bits": 4}}
    mixed["config_groups"] = {
        "first": first,
        "second": {**first, "targets": ["Linear"], "format": LAYOUTS[2]},
    }
    reader = CompressedTensors(mixed, "here")
    for name, layout in (("a.up", LAYOUTS[0]), ("a.down", LAYOUTS[2])):
        parts, want = layer(layout, rng)
        equal(reader.read(parts, f"here: {name}"), want)


def test_classes_of_layers_are_guessed(rng):
    def scheme(bits, *targets):
        weights = {"num_bits": bits, "group_size": 32}
        return {"targets": list(targets), "weights": weights}

    groups = {"a": scheme(2, "Linear"), "b": scheme(3, "Embedding")}
    groups["c"] = {"targets": ["LlamaAttention"], "input_activations": {"num_bits": 8}}
    config = {"format": "pack-quantized", "config_groups": groups}
    for name, bits in (("model.embed_tokens", 3), ("model.q_proj", 2), ("lm_head", 2)):
        codes = rng.integers(0, 2**bits, (WIDE, OUT))
        parts = {
            "weight_packed": words(codes, bits, 0).T,
            "weight_scale": np.ones((OUT, 3), np.float16),
            "weight_shape": np.array([OUT, WIDE]),
        }
        q = CompressedTensors(config, "here").read(parts, f"here: {name}")
        assert q.format.bits == bits
    groups["a"]["targets"] = ["ColumnParallelLinear"]
    q = CompressedTensors(config, "here").read(parts, "here: lm_head")
    assert q.format.bits == 2


def test_packed_layers_that_should_not_be_are_named(rng, caplog):
    parts, _ = layer(LAYOUTS[1], rng)
    config = settings(LAYOUTS[1]) | {"ignore": ["lm_head", "re:.*gate$", "Conv1d"]}
    reader = CompressedTensors(config, "here")
    reader.read(parts, "here: model.up")
    assert not caplog.records
    for name in ("model.gate", "lm_head"):
        reader.read(parts, f"here: {name}")
    (record,) = caplog.records
    said = "here: the settings say that model.gate is not quantized"
    assert record.getMessage().startswith(said)


def test_scales_of_outputs_are_named(rng, caplog):
    parts, _ = layer(LAYOUTS[1], rng)
    parts["output_scale"] = np.ones(1, np.float16)
    reader = CompressedTensors(settings(LAYOUTS[1]), "here")
    for name in ("x.k_proj", "x.v_proj"):
        reader.read(parts, f"here: {name}")
    (record,) = caplog.records
    said = "here: static scales of outputs are not used, for example x.k_proj.output_sc"
    assert record.getMessage().startswith(said)


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ({"num_bits": 4, "type": "float", "strategy": "tensor_group"}, "4 bits"),
        ({"num_bits": 8, "type": "float", "strategy": "group"}, "strategy group"),
        ({"num_bits": 8, "type": "int", "symmetric": False}, "symmetric False"),
    ],
)
def test_activations_that_are_not_rounded(scheme, said, rng, caplog):
    parts, want = layer(LAYOUTS[0], rng)
    parts["input_global_scale"] = np.array([5.0], np.float32)
    config = settings(LAYOUTS[0], input_activations={"dynamic": True, **scheme})
    reader = CompressedTensors(config, "here")
    for name in ("a", "b"):
        q = reader.read(parts, f"here: {name}")
        equal(q, want)
        assert not isinstance(q, RoundedInputs)
    assert len(caplog.records) == 1 and said in caplog.text


@pytest.mark.parametrize("dynamic", [True, False])
def test_rounded_float_activations(dynamic, rng):
    parts, want = layer("channel", rng)
    scheme = {"num_bits": 8, "type": "float", "dynamic": dynamic}
    scheme["strategy"] = "token" if dynamic else "tensor"
    config = settings("float-quantized", {"num_bits": 8}, input_activations=scheme)
    if not dynamic:
        parts["input_scale"] = np.array([0.5], jnp.bfloat16)
    q = CompressedTensors(config, "here").read(parts, "here: a")
    equal(q, want)
    assert isinstance(q, RoundedInputs) and q.activation == "float8_e4m3fn"
    assert q.scale is None if dynamic else float(q.scale) == 0.5
    writer = CompressedTensorsWriter()
    same(writer.write(q, "there: a"), parts)
    group = writer.settings([])["config_groups"]["group_0"]
    assert group["format"] == "float-quantized"
    assert {k: group["input_activations"][k] for k in scheme} == scheme


def sparse(weight: np.ndarray, two_of_four: bool) -> tuple[dict, np.ndarray]:
    """The tensors of a sparse weight, and its mask."""
    size = np.abs(weight.astype(np.float32)).reshape(-1, 4)
    mask = np.argsort(np.argsort(size, -1), -1) > (1 if two_of_four else 2)
    mask = mask.reshape(weight.shape)
    values = weight[mask]
    parts = {
        "compressed": values.reshape(len(weight), -1) if two_of_four else values,
        "bitmask": np.packbits(mask, axis=1, bitorder="little"),
        "shape": np.array(weight.shape, np.int64),
    }
    if two_of_four:
        parts["shape"] = parts["shape"].reshape(-1, 1)
    else:
        counts = mask.sum(1)
        parts["row_offsets"] = np.cumsum(counts) - counts
    return parts, mask


@pytest.mark.parametrize("layout", ["sparse-bitmask", "sparse-24-bitmask"])
@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "int8"])
def test_sparse_weights(kind, layout, rng):
    config = settings("naive-quantized", {"num_bits": 8})
    config["sparsity_config"] = {"format": layout}
    weight = (rng.normal(size=(OUT, 100)) * 20).astype(np.dtype(kind))
    parts, mask = sparse(weight, layout == "sparse-24-bitmask")
    want = np.where(mask, weight.astype(np.float32), 0)
    if kind == "bfloat16":
        del config["config_groups"]
    else:
        scale = rng.uniform(0.01, 0.1, (OUT, 1)).astype(np.float32)
        parts["weight_scale"], want = scale, want * scale
    reader = CompressedTensors(config, "here")
    assert reader.shape(parts) == (OUT, 100)
    q = reader.read(parts, "here: a")
    equal(q, want)
    assert isinstance(q.format, Cast) == (kind == "bfloat16")
    parts["bitmask"] = parts["bitmask"][:, :-1]
    with pytest.raises(FormatError, match=r"here: a: bitmask has shape \[40, 12\]"):
        reader.read(parts, "here: a")


def test_sparse_weights_that_do_not_fit(rng):
    reader = CompressedTensors({"sparsity_config": {"format": "dense"}}, "here")
    parts, _ = sparse(rng.normal(size=(OUT, WIDE)).astype(np.float32), True)
    with pytest.raises(UnsupportedError, match="is sparse and float32"):
        reader.read(parts, "here: a")
    parts["compressed"] = parts["compressed"][:-1]
    with pytest.raises(FormatError, match="bitmask keeps 1920 weights, but compressed"):
        reader.read(parts, "here: a")


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (LAYOUTS[0], {"weight_scale": np.ones((40, 6), np.float32)}, "scales float32"),
        (LAYOUTS[0], {"weight_scale": np.ones((40, 5), FLOAT8)}, r"expected .*40, 6"),
        (LAYOUTS[0], {"weight_global_scale": np.zeros(1)}, "expected one positive"),
        (LAYOUTS[0], {"weight_global_scale": np.ones(2)}, "expected one positive"),
        (LAYOUTS[1], {"weight_scale": np.ones((40, 6), np.uint8)}, r"uint8 \[40, 3\]"),
        (LAYOUTS[2], {"weight_scale": np.ones((3, 40), np.uint8)}, r"uint8 \[40, 3\]"),
        (LAYOUTS[2], {"weight": np.ones((40, 96), np.float16)}, "codes are float16"),
        ("block", {"weight_scale": np.ones((2, 2), np.float32)}, r"scales \[2, 2\]"),
        ("channel", {"weight_scale": np.ones((40, 1), FLOAT8)}, "expected floats"),
    ],
)
def test_parts_that_do_not_fit(layout, change, message, rng):
    parts, _ = layer(layout, rng)
    reader = CompressedTensors(settings("naive-quantized", {"num_bits": 8}), "here")
    with pytest.raises((FormatError, UnsupportedError), match=f"^here: a: .*{message}"):
        reader.read(parts | change, "here: a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config_groups": {}}, "has no config_groups"),
        ({"config_groups": {"a": ["Linear"]}}, r"config_groups.a: weights is \['Lin"),
        ({"format": "mxfp6-pack-quantized"}, "format mxfp6-pack-quantized is not"),
        ({"sparsity_config": {"format": "odd"}}, "in the format 'odd' is not read"),
        ({"sparsity_config": [1]}, r"sparsity_config is \[1\], expected an object"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transforms of"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head', expected names"),
        ({"ignore": ["re:(a+)+"]}, "is not a simple pattern"),
    ],
)
def test_settings_that_are_not_read(change, message):
    with pytest.raises((FormatError, UnsupportedError), match=f"^here: .*{message}"):
        CompressedTensors(settings("pack-quantized") | change, "here")


def test_empty_transforms_and_sparsity_are_nothing():
    more = {"transform_config": {"config_groups": {}}, "sparsity_config": {}}
    CompressedTensors(settings("pack-quantized") | more, "here")

"""Rarer layouts of GPTQ and AWQ, packed here code by code."""

import logging

import numpy as np
import pytest

from qjax.converters.auto_round import AutoRound
from qjax.converters.awq import AWQ
from qjax.converters.gptq import GPTQ
from qjax.errors import FormatError, UnsupportedError

from .packers import awq_words, dense, words

ROWS, COLS, GROUP = 128, 64, 32
INDEX = np.arange(ROWS) // GROUP


def draw(bits: int, rows: int = ROWS, group: int = GROUP):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (rows, COLS))
    scales = rng.uniform(0.01, 0.1, (-(-rows // group), COLS)).astype(np.float16)
    return codes, scales, rng.integers(0, 2**bits, scales.shape)


def equal(q, want) -> None:
    np.testing.assert_array_equal(np.asarray(q.dequantize("float32")), want)


def planar(codes: np.ndarray, bits: int) -> np.ndarray:
    """GPTQ's planes along the first axis, word by word."""
    widths = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}.get(bits, (bits,))
    made = []
    for start in range(0, len(codes), 32):
        low = 0
        for width in widths:
            per = 32 // width
            for word in range(width):
                value = np.zeros(codes.shape[1], np.uint64)
                for j in range(per):
                    field = codes[start + word * per + j] >> low & (2**width - 1)
                    value |= field.astype(np.uint64) << np.uint64(width * j)
                made.append(value)
            low += width
    return np.array(made).astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
def test_planar_gptq(bits):
    codes, scales, zeros = draw(bits)
    parts = {
        "qweight": planar(codes, bits),
        "qzeros": planar(zeros.T, bits).T,
        "scales": scales,
        "g_idx": INDEX.astype(np.int32),
    }
    config = {"bits": bits, "group_size": GROUP, "checkpoint_format": "gptq_p"}
    reader = GPTQ(config, "here")
    assert reader.shape(parts) == (COLS, ROWS)
    equal(reader.read(parts, "here: layer"), dense(codes, scales, zeros, INDEX))


def test_planar_gptq_that_does_not_fit():
    codes, scales, zeros = draw(3)
    parts = {"qweight": planar(codes, 3), "qzeros": planar(zeros.T, 3).T}
    reader = GPTQ({"bits": 3, "checkpoint_format": "gptq_p"}, "here")
    for change in (
        {"qweight": parts["qweight"][:11]},
        {"qweight": parts["qweight"][:, :40], "qzeros": parts["qzeros"][:, :4]},
    ):
        with pytest.raises(FormatError, match=r"here: layer.qweight: .*whole blocks"):
            reader.read(parts | {"scales": scales} | change, "here: layer")


def marlin(codes: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """Marlin's words, place by place."""
    rows, cols = codes.shape
    tiles = codes.reshape(rows // 16, 16, cols // 16, 16).transpose(0, 2, 1, 3)
    flat = tiles.reshape(-1, 1024)
    order = []
    for lane in range(32):
        for tile in range(4):
            for half in (0, 1):
                for row in (0, 1, 8, 9):
                    place = 16 * (2 * (lane % 4) + row) + lane // 4 + 8 * half
                    order.append(place + 256 * tile)
    mixed = [order[8 * i + j] for i in range(128) for j in (0, 2, 4, 6, 1, 3, 5, 7)]
    packed = words(flat[:, mixed].reshape(1, -1), 4, 1).reshape(rows // 16, -1)
    if len(scales) > 1:
        run = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        run = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    permuted = scales.reshape(-1, len(run))[:, run].reshape(scales.shape)
    return {"B": packed, "s": permuted, "workspace": np.zeros(8, np.int32)}


@pytest.mark.parametrize("group", [GROUP, ROWS])
def test_marlin(group):
    codes, scales, _ = draw(4, group=group)
    parts = marlin(codes, scales)
    settings = {"bits": 4, "group_size": -1 if group == ROWS else group}
    reader = GPTQ(settings | {"is_marlin_format": True}, "here")
    assert reader.shape(parts) == (COLS, ROWS)
    zeros = np.full(scales.shape, 8)
    index = np.arange(ROWS) // group
    equal(reader.read(parts, "here: layer"), dense(codes, scales, zeros, index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": np.zeros((8, 96), np.int32)}, "expected .in / 16, 2 out."),
        ({"s": np.zeros((4, 40), np.float16)}, "multiple of 64"),
    ],
)
def test_marlin_that_does_not_fit(change, message):
    parts = marlin(*draw(4)[:2]) | change
    reader = GPTQ({"bits": 4, "checkpoint_format": "marlin"}, "here")
    with pytest.raises(FormatError, match=rf"here: layer.*{message}"):
        reader.read(parts, "here: layer")


def test_awq_gemv():
    codes, scales, zeros = draw(4)
    spare = 8 - len(scales)
    parts = {
        "qweight": words(codes, 4, 0).T,
        "qzeros": words(np.pad(zeros, [(0, spare), (0, 0)]), 4, 0).T,
        "scales": np.pad(scales, [(0, spare), (0, 0)]).T,
    }
    reader = AWQ({"bits": 4, "group_size": GROUP, "version": "gemv"}, "here")
    assert reader.shape(parts) == (COLS, ROWS)
    equal(reader.read(parts, "here: layer"), dense(codes, scales, zeros, INDEX))


def fast(codes: np.ndarray) -> np.ndarray:
    """The int16 words of GEMV-FAST `[out / 4, in]`, code by code."""
    order = [a * 8 + b * 2 + c for b in range(4) for a in range(4) for c in range(2)]
    order = [order[i + j] for i in range(0, 32, 8) for j in (0, 2, 4, 6, 1, 3, 5, 7)]
    turned = codes.T.reshape(COLS, -1, 32)[..., order].reshape(COLS, ROWS)
    made = np.zeros((COLS // 4, ROWS), np.uint16)
    for slab in range(COLS // 4):
        for block in range(ROWS // 64):
            part = turned[4 * slab : 4 * slab + 4, 64 * block : 64 * block + 64]
            fields = part.reshape(64, 4).astype(np.uint16)
            made[slab, 64 * block : 64 * block + 64] = sum(
                fields[:, i] << (4 * i) for i in range(4)
            )
    return made.view(np.int16)


@pytest.mark.parametrize("name", ["qzeros", "scaled_zeros"])
def test_awq_gemv_fast(name):
    codes, scales, zeros = draw(4)
    shift = (-zeros * scales.astype(np.float32)).astype(np.float16)
    spare = [(0, 8 - len(scales)), (0, 0)]
    parts = {"qweight": fast(codes), "scales": np.pad(scales, spare)}
    parts[name] = np.pad(shift, spare)
    reader = AWQ({"bits": 4, "group_size": GROUP, "version": "gemv_fast"}, "here")
    assert reader.shape(parts) == (COLS, ROWS)
    q = reader.read(parts, "here: layer")
    equal(q, dense(codes, scales, zeros, INDEX))
    assert q.zero.dtype == np.uint8  # pyright: ignore[reportAttributeAccessIssue]
    shift[0, 0] = 0.123  # no multiple of the scale: a real zero-point
    parts[name] = np.pad(shift, spare)
    got = np.asarray(reader.read(parts, "here: layer").dequantize("float32"))
    want = codes[:GROUP, 0] * scales[0, 0].astype(np.float32) + np.float32(shift[0, 0])
    np.testing.assert_allclose(got[:GROUP, 0], want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": np.zeros((16, 100), np.int16)}, "in a multiple of 64"),
        ({"qweight": np.zeros((16, 128), np.int32)}, "expected int16"),
        ({"qzeros": np.zeros((4, 64), np.int32)}, "expected floats .4, 64."),
    ],
)
def test_gemv_fast_that_does_not_fit(change, message):
    codes, scales, _ = draw(4)
    parts = {"qweight": fast(codes), "scales": scales, "qzeros": scales} | change
    reader = AWQ({"bits": 4, "group_size": GROUP, "version": "llm-awq"}, "here")
    with pytest.raises(FormatError, match=rf"here: layer.*{message}"):
        reader.read(parts, "here: layer")


@pytest.mark.parametrize(
    ("packing", "shift"),
    [("auto_round", 0), ("auto_round:auto_gptq:exllamav2", 1)],
)
def test_auto_round_in_the_layout_of_gptq(packing, shift):
    own = {"layers.0.up": {"bits": 5, "group_size": 64, "sym": False}}
    config = {"bits": 3, "group_size": GROUP, "extra_config": own}
    reader = AutoRound(config | {"packing_format": packing}, "here")
    for layer, bits, group in (("model.layers.0.up", 3, 32), ("layers.0.up", 5, 64)):
        codes, scales, zeros = draw(bits, group=group)
        zeros = np.maximum(zeros, shift)
        parts = {"qweight": words(codes, bits, 0), "scales": scales}
        parts["qzeros"] = words(zeros - shift, bits, 1)
        assert reader.shape(parts) == (COLS, ROWS)
        q = reader.read(parts, f"here: {layer}")
        equal(q, dense(codes, scales, zeros, np.arange(ROWS) // group))


def test_auto_round_in_the_layout_of_awq():
    codes, scales, zeros = draw(4)
    parts = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales}
    config = {"bits": 4, "group_size": GROUP, "packing_format": "auto_round:auto_awq"}
    reader = AutoRound(config, "here")
    assert reader.shape(parts) == (COLS, ROWS)
    equal(reader.read(parts, "here: layer"), dense(codes, scales, zeros, INDEX))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing_format": "triton"}, "'triton' is not read"),
        ({"data_type": "mx_fp"}, "data_type 'mx_fp' is not read"),
        ({"extra_config": {"(a+)+b": {}}}, "not a simple pattern"),
        ({"extra_config": {"a": 3}}, "extra_config.a is not an object"),
        ({"extra_config": [1]}, "expected an object"),
        ({"bits": 9}, "bits is 9"),
    ],
)
def test_auto_round_settings_that_are_not_read(change, message):
    with pytest.raises((FormatError, UnsupportedError), match=message):
        AutoRound({"bits": 4, "group_size": GROUP} | change, "here")


def test_layers_of_gptqmodel_that_differ():
    settings = {"bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"}
    own = {"+:.*down": {"bits": 8, "group_size": 64}, "-:.*head": {}}
    reader = GPTQ(settings | {"dynamic": own}, "here")
    for layer, bits, group in (("layers.0.up", 4, GROUP), ("layers.0.down", 8, 64)):
        codes, scales, zeros = draw(bits, group=group)
        parts = {"qweight": words(codes, bits, 0), "scales": scales}
        parts["qzeros"] = words(zeros, bits, 1)
        assert reader.shape(parts) == (COLS, ROWS)
        q = reader.read(parts, f"here: {layer}")
        equal(q, dense(codes, scales, zeros, np.arange(ROWS) // group))


def test_suspicious_gptq_files_are_named(caplog):
    codes, scales, zeros = draw(4)
    zeros = np.maximum(zeros, 1)
    parts = {"qweight": words(codes, 4, 0), "qzeros": words(zeros - 1, 4, 1)}
    parts["scales"] = scales
    settings = {"bits": 4, "group_size": GROUP, "sym": False}
    with caplog.at_level(logging.WARNING):
        reader = GPTQ(settings, "here")
        assert "here: asymmetric weights in GPTQ's first layout" in caplog.text
        caplog.clear()
        GPTQ(settings | {"meta": {"quantizer": ["gptqmodel:2.0"]}}, "here")
        reader.read(parts, "here: layer")
        assert not caplog.text
        parts["qzeros"] = parts["qzeros"].copy()
        parts["qzeros"][0, 0] = -1
        reader.read(parts, "here: layer")
    assert "here: layer.qzeros: holds words of -1" in caplog.text


@pytest.mark.parametrize(
    ("zero", "stored", "warns"), [(8, 7, False), (8, 8, False), (5, 4, True)]
)
def test_inferred_gptq_layouts(zero, stored, warns, caplog):
    codes, scales, _ = draw(4)
    parts = {"qweight": words(codes, 4, 0), "scales": scales}
    parts["qzeros"] = words(np.full(scales.shape, stored), 4, 1)
    reader = GPTQ({"bits": 4, "inferred": True}, "here")
    q = reader.read(parts, "here: layer")
    equal(q, dense(codes, scales, np.full(scales.shape, zero), INDEX))
    assert ("assuming GPTQ's first layout" in caplog.text) == warns

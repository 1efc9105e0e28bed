"""llama.cpp's blocks: against gguf-py's values, and statements of single weights."""

import hashlib

import jax
import numpy as np
import pytest

from qjax.errors import FormatError, SpecError, UnsupportedError
from qjax.formats import Ggml, Grouping, format_from_dict
from qjax.formats.ggml import REMOVED, TYPES, type_of_id
from qjax.formats.ggml_grids import GRIDS, points
from qjax.formats.ggml_parts import TableParts

WEIGHTS = [name for name, kind in TYPES.items() if kind.parts is not None]
FLOATS = ["f32", "f16", "bf16"]
HASHES = {  # of the grids as int16, computed from gguf-py's
    "iq2_xxs": "db2a06db91388837",
    "iq2_xs": "e2ac1035662d7dae",
    "iq2_s": "1892dfb5cdcadaee",
    "iq3_xxs": "2846d651a9695c11",
    "iq3_s": "5f5cdb5f20f2e9a2",
    "iq1": "6f6e36796f55eb8e",
}


def half(block, at):
    return np.float32(block[at : at + 2].view(np.float16)[0])


def q1_0(block, e):
    return half(block, 0) * np.float32(1 if block[2 + e // 8] >> e % 8 & 1 else -1)


def q2_0(block, e):
    return half(block, 0) * np.float32(int(block[2 + e // 4] >> 2 * (e % 4) & 3) - 1)


def q3_k(block, e):
    low = block[32 + 32 * (e // 128) + e % 32] >> 2 * (e % 128 // 32) & 3
    value = int(low) - (0 if block[e % 32] >> e // 32 & 1 else 4)
    j = e // 16
    scale = block[96 + j] & 15 if j < 8 else block[96 + j - 8] >> 4
    scale = int(scale) | (int(block[104 + j % 4]) >> 2 * (j // 4) & 3) << 4
    return half(block, 108) * np.float32(scale - 32) * np.float32(value)


def q5_k(block, e):
    j, s = e // 32, block[4:16].astype(int)
    if j < 4:
        scale, minimum = s[j] & 63, s[j + 4] & 63
    else:
        scale = s[j + 4] & 15 | s[j - 4] >> 6 << 4
        minimum = s[j + 4] >> 4 | s[j] >> 6 << 4
    q = int(block[48 + 32 * (e // 64) + e % 32]) >> 4 * (e % 64 // 32) & 15
    q |= (int(block[16 + e % 32]) >> j & 1) << 4
    w = half(block, 0) * np.float32(scale) * np.float32(q)
    return w - half(block, 2) * np.float32(minimum)


def iq2_xs(block, e):
    word = int(block[2 + e // 8 * 2]) | int(block[3 + e // 8 * 2]) << 8
    signs = word >> 9
    signs |= signs.bit_count() % 2 << 7
    scale = int(block[66 + e // 32]) >> 4 * (e // 16 % 2) & 15
    value = int(points("iq2_xs")[word & 511, e % 8]) * (-1) ** (signs >> e % 8 & 1)
    return half(block, 0) * np.float32(0.5 + scale) * np.float32(0.25 * value)


def same(got, want):
    """Equal bits: zeros have their signs, and subnormals are kept."""
    np.testing.assert_array_equal(
        np.asarray(got).view(np.uint32), np.asarray(want, np.float32).view(np.uint32)
    )


@pytest.fixture(scope="module")
def golden(root):
    with np.load(root / "tests" / "golden" / "formats" / "gguf.npz") as file:
        return dict(file)


def blocks_of(name, golden, rng):
    """Blocks `[bytes, out]` with finite scales."""
    if f"{name}/blocks" in golden:
        return golden[f"{name}/blocks"].T
    blocks = rng.integers(0, 256, (TYPES[name].bytes, 3), dtype=np.uint8)
    blocks[1] &= 0x3B
    return blocks


@pytest.mark.parametrize(
    "name", [name for name in FLOATS + WEIGHTS if name not in ("q1_0", "q2_0")]
)
def test_values_are_gguf_pys(name, golden):
    got = jax.jit(TYPES[name].decode)(golden[f"{name}/blocks"].T)
    same(got, golden[f"{name}/values"].T)


@pytest.mark.parametrize("weight", [q1_0, q2_0, q3_k, q5_k, iq2_xs])
def test_weights_one_by_one(weight, golden, rng):
    kind = TYPES[weight.__name__]
    blocks = blocks_of(kind.name, golden, rng)
    want = [
        [weight(column, e) for column in np.ascontiguousarray(blocks.T)]
        for e in range(kind.elements)
    ]
    same(jax.jit(kind.decode)(blocks), want)


@pytest.mark.parametrize("name", WEIGHTS)
def test_parts(name, golden, rng):
    kind = TYPES[name]
    blocks = blocks_of(name, golden, rng)
    parts, values = jax.jit(lambda b: (kind.parts(b), kind.decode(b)))(blocks)
    codes, scale = np.asarray(parts.codes), np.asarray(parts.scale)
    out = blocks.shape[1]
    assert codes.shape == (kind.elements, out)
    assert scale.shape == (kind.elements // parts.group, out)
    spread = lambda x: np.repeat(np.asarray(x), parts.group, 0)  # noqa: E731
    if isinstance(parts, TableParts):
        assert codes.dtype == np.uint8 and len(parts.table) == 16
        with np.errstate(over="ignore"):
            w = np.array(parts.table, np.float32)[codes] * spread(scale)
    else:
        assert codes.dtype == np.int8 or codes.max() < 2**parts.bits
        w = (codes.astype(np.float32) - np.float32(parts.offset)) * spread(scale)
        w = w if parts.minimum is None else w - spread(parts.minimum)
    same(values, w)


@pytest.mark.parametrize("name", ["q4_k", "iq3_xxs", "mxfp4"])
def test_leading_axes(name, rng):
    kind = TYPES[name]
    blocks = rng.integers(0, 96, (2, 3, kind.bytes, 5), dtype=np.uint8)
    whole = jax.jit(kind.decode)(blocks)
    assert whole.shape == (2, 3, kind.elements, 5)
    same(jax.jit(jax.vmap(jax.vmap(kind.decode)))(blocks), whole)
    same(jax.jit(kind.decode)(blocks[1, 2, :, 3:4]), whole[1, 2, :, 3:4])


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00])
def test_broken_scales_show(which, bits):
    blocks = np.full((144, 2), 0x55, np.uint8)
    blocks[:4] = np.array([0, 0x3C, 0, 0x3C], np.uint8)[:, None]
    blocks[which : which + 2, 1] = bits & 0xFF, bits >> 8
    w = np.asarray(TYPES["q4_k"].decode(blocks))
    assert np.isfinite(w[:, 0]).all() and not np.isfinite(w[:, 1]).any()


@pytest.mark.parametrize("name", GRIDS)
def test_grids(name):
    data = points(name).astype("<i2").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == HASHES[name]


def test_types():
    ids = [kind.id for kind in TYPES.values()]
    assert ids == sorted(set(ids)) and not set(ids) & set(REMOVED)
    assert sorted([*ids, *REMOVED]) == list(range(43))
    assert type_of_id(12, "x") is TYPES["q4_k"]
    assert {name: TYPES[name].bits_per_weight for name in ("q6_k", "q2_0")} == {
        "q6_k": 6.5625,
        "q2_0": 2.25,
    }


def test_format():
    fmt = Ggml("q6_k")
    assert fmt.name == "ggml-q6_k" and fmt.block is TYPES["q6_k"]
    assert (fmt.peak, fmt.code_bits) == (1.0, 8)
    assert format_from_dict(fmt.to_dict()) == fmt
    assert fmt.grouping((512, 3)) == Grouping("in", (512, 3), 256)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: Ggml("Q4_K"), SpecError, "'Q4_K', expected one of 'q4_0', 'q4_1'"),
        (lambda: Ggml(["q4_k"]), SpecError, "expected one of 'q4_0'"),  # type: ignore
        (lambda: Ggml("q8_1"), SpecError, "activations"),
        (lambda: Ggml("q8_k"), SpecError, "activations"),
        (lambda: Ggml("bf16"), SpecError, "plain bfloat16 numbers.*keep the array"),
        (lambda: Ggml("q4_k").grouping((300, 8)), SpecError, "256 .*in=300"),
        (lambda: Ggml("q4_k").encode(np.ones(3)), SpecError, r"method=GGML\(\)"),
        (lambda: Ggml("q4_k").decode(np.ones(3)), SpecError, "q4_k: .* 256 weights"),
        (
            lambda: Ggml("q4_k").neighbour(np.ones(3), np.ones(3)),
            SpecError,
            r"method=GGML\(\)",
        ),
        (
            lambda: TYPES["q4_0"].decode(np.zeros((17, 2), np.uint8)),
            SpecError,
            r"q4_0: got uint8 of shape \(17, 2\), expected .*18, out",
        ),
        (
            lambda: TYPES["q4_0"].decode(np.zeros((18, 2), np.int8)),
            SpecError,
            "got int8",
        ),
        (
            lambda: TYPES["q8_k"].decode(np.zeros((292, 2), np.uint8)),
            SpecError,
            "q8_k: .*activations",
        ),
        (
            lambda: TYPES["i16"].decode(np.zeros((2, 2), np.uint8)),
            SpecError,
            "i16: plain int16",
        ),
        (
            lambda: type_of_id(31, "a.gguf: w"),
            UnsupportedError,
            "a.gguf: w: type 31 .q4_0_4_4. was removed",
        ),
        (lambda: type_of_id(99, "a.gguf: w"), FormatError, "unknown type 99.*12 q4_k"),
    ],
)
def test_refusals(act, error, message):
    with pytest.raises(error, match=message):
        act()

"""EXL2 layers, packed and decoded by loops as the format describes them."""

import numpy as np
import pytest

from qjax.converters.exl2 import EXL2
from qjax.converters.packed import check_parts
from qjax.errors import FormatError, UnsupportedError
from qjax.ops import matmul
from qjax.tensor import AffineTensor
from qjax.wrappers import Permuted, RowParts

from .packers import words

COLS = 32
READER = EXL2({}, "here")
MIXED = [(8, 32), (6, 32), (5, 32), (4, 32), (4, 32), (3, 64), (3, 32), (2, 32)]


def draw(groups, order=True, name="q_invperm"):
    """A layer of `(bits, inputs)` groups, and its weight `[in, out]`."""
    rng = np.random.default_rng(len(groups))
    most = rng.uniform(0.5, 2, len(groups)).astype(np.float16)
    codes = rng.integers(0, 16, (len(groups), COLS))
    stored, pairs, lines = [], [], []
    for g, (bits, size) in enumerate(groups):
        q = rng.integers(0, 2**bits, (size, COLS))
        pairs += [bits, sum(map(len, stored))]
        stored.append(words(q, bits, 0))
        w = np.zeros((size, COLS), np.float32)
        for o in range(COLS):
            scale = np.float16((codes[g, o] + 1) ** 2 * float(most[g]) / 256)
            for k in range(size):
                w[k, o] = (q[k, o] - 2 ** (bits - 1)) * np.float32(scale)
        lines.append(w)
    rows = sum(size for _, size in groups)
    inverse = rng.permutation(rows) if order else np.arange(rows)
    parts = {
        "q_weight": np.concatenate(stored),
        "q_scale": words(codes, 4, 1),
        "q_scale_max": most,
        "q_groups": np.array(pairs, np.int16),
        name: (inverse if name == "q_invperm" else np.argsort(inverse)).astype(
            np.int32
        ),
    }
    return parts, np.concatenate(lines)[inverse]


@pytest.mark.parametrize(
    ("groups", "runs"),
    [
        (MIXED, 7),
        ([(4, 64), (4, 64), (4, 40)], 1),
        ([(8, 32), (3, 32), (3, 20)], 2),
        ([(6, 48)], 1),
    ],
)
@pytest.mark.parametrize("order", [False, True])
def test_values(groups, runs, order):
    parts, w = draw(groups, order)
    check_parts(READER, parts, "here: layer")
    assert READER.shape(parts) == w.shape[::-1]
    q = READER.read(parts, "here: layer")
    np.testing.assert_array_equal(q.dequantize("float32"), w)
    x = np.random.default_rng(1).normal(size=(3, len(w))).astype(np.float32)
    want = x @ w
    np.testing.assert_allclose(matmul(x, q), want, atol=1e-3 * np.abs(want).max())
    assert isinstance(q, Permuted) == order
    base = q.base if isinstance(q, Permuted) else q
    assert isinstance(base, RowParts if runs > 1 else AffineTensor)
    if isinstance(base, RowParts):
        assert len(base.parts) == runs
        assert all(part.format.symmetric for part in base.parts)
    assert q.dtype == "float16"


def test_other_orders():
    parts, w = draw(MIXED, name="q_perm")
    q = READER.read(parts, "here: layer")
    np.testing.assert_array_equal(q.dequantize("float32"), w)
    parts, w = draw(MIXED)
    parts["q_invperm"] = parts["q_invperm"].astype(np.int16)
    q = READER.read(parts, "here: layer")
    np.testing.assert_array_equal(q.dequantize("float32"), w)
    del parts["q_invperm"]
    with pytest.raises(KeyError, match="q_invperm"):
        READER.shape(parts)


def test_unfit_layers():
    good, _ = draw(MIXED)
    groups = good["q_groups"]

    def changed(at, value):
        made = groups.copy()
        made[at] = value
        return {"q_groups": made}

    inverse = good["q_invperm"]
    for change, message in (
        (
            {"q_scale": good["q_scale"][1:]},
            r"q_scale \[7, 4\] and q_scale_max \[8\] do",
        ),
        (
            {"q_scale_max": good["q_scale_max"][1:]},
            "do not fit 8 groups and 32 outputs",
        ),
        ({"q_groups": groups[:-1]}, "expected pairs of bits and first words"),
        (changed(1, 1), "expected pairs of bits and first words, from word 0"),
        (changed(0, 7), "group 0 has 8 words for 288 inputs or some of them with 7"),
        (changed(0, 0), "with 0 bits; expected whole codes"),
        (changed(3, 9), "group 1 has 5 words"),
        (changed(3, -1), "group 0 has 65535 words"),
        ({"q_weight": good["q_weight"][:-1]}, "group 7 has 1 words for 32 inputs"),
        ({"q_groups": groups[:-2]}, "group 6 has 5 words for 64 inputs"),
        ({"q_invperm": inverse[20:]}, "group 7 has 2 words for 12"),
        ({"q_invperm": np.minimum(inverse, 9)}, "q_invperm: is not a permutation of 0"),
    ):
        with pytest.raises(FormatError, match=message):
            READER.read({**good, **change}, "here: layer")
    many, _ = draw([(2 + i % 2, 32) for i in range(65)])
    with pytest.raises(UnsupportedError, match="65 runs of equal groups"):
        READER.read(many, "here: layer")

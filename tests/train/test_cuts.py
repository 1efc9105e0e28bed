"""Parts of packed weights are the packed parts of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import FP8, MXFP4, NF4, NVFP4, Int
from qjax.methods import quantize
from qjax.train.cuts import cut_of, local_weight


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(
    "fmt",
    [
        NF4(64, double=True),
        NF4(64),
        Int(4, 32, symmetric=False),
        Int(8, "channel"),
        FP8(),
        NVFP4(),
        MXFP4(),
    ],
    ids=lambda f: f.name,
)
def test_parts_decode_to_parts(fmt, side, rng):
    w = rng.standard_normal((2, 256, 512)).astype(np.float32)
    q = quantize(w, fmt)
    whole = np.asarray(q.dequantize())
    cuts = cut_of(q, side, 2)
    assert cuts is not None
    axis = 1 if side == "in" else 2
    for index in range(2):

        def part(path, leaf, index=index):
            axes = cuts.get(tuple(map(str, path)), {})
            for at in axes:
                leaf = jnp.split(leaf, 2, at)[index]
            return leaf

        mine = jax.tree.map_with_path(part, q)
        made = local_weight(mine, side, 2, jnp.int32(index))
        expected = np.split(whole, 2, axis)[index]
        np.testing.assert_array_equal(made.dequantize(), expected)


def test_scales_of_scales_are_cut_where_blocks_end():
    q = quantize(np.ones((256, 512), np.float32), NF4(64, double=True))
    assert (".scale", ".codes") in cut_of(q, "out", 2)  # 4 * 256 scales: 4 blocks
    assert (".scale", ".codes") not in cut_of(q, "out", 16)  # half a block each
    assert (".scale", ".codes") not in cut_of(q, "in", 2)  # they run along outputs


def test_groups_are_not_cut():
    q = quantize(np.ones((128, 64), np.float32), Int(4, 128))
    assert cut_of(q, "in", 2) is None
    assert cut_of(q, "out", 2) == {
        (".codes",): {-1: "tensor"},
        (".scale",): {-1: "tensor"},
    }

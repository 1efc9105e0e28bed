"""The definition itself, the list of visits, and what bad arguments say."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.pallas_kernels.grouped_matmul import specs
from qjax.pallas_kernels.grouped_matmul.api import grouped_gate_up, grouped_matmul
from qjax.pallas_kernels.weights import KernelError, WeightSpec

from ..matmul.suite import random_weight, rows
from .suite import SIZES, GroupedSuite, int32


class TestReference(GroupedSuite):
    backend = "reference"
    shape = (256, 40)


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=7),
    behind=st.integers(0, 40),
    tile=st.sampled_from((16, 32)),
)
def test_visits_cover_every_row_once(sizes, behind, tile):
    m = sum(sizes) + behind
    if m == 0:
        return
    plan = specs.visits(int32(sizes), m, tile)
    count, seen = int(plan.count), np.zeros(-(-m // tile) * tile, int)
    tiles = np.asarray(plan.tile)[:count]
    assert count <= plan.group.shape[0]
    assert np.all(np.diff(tiles) >= 0) and set(tiles) == set(range(-(-m // tile)))
    ends = np.cumsum(sizes)
    for i in range(count):
        group, expert = int(plan.group[i]), int(plan.expert[i])
        low, high = int(plan.start[group]), int(plan.end[group])
        inside = range(max(low, tiles[i] * tile), min(high, (tiles[i] + 1) * tile))
        assert len(inside) > 0
        seen[inside] += 1
        if group < len(sizes):
            assert group == expert and (low, high) == (
                ends[group] - sizes[group],
                ends[group],
            )
        else:
            assert sum(sizes) == 0 or sizes[expert] > 0
    assert np.all(seen == 1)


def test_tiles_fit():
    for k, n, experts, m in ((4096, 14336, 8, 16), (14336, 4096, 8, 4096)):
        for group in (128, 64, 32, k):
            spec = WeightSpec(k, n, "int", 4, group, 8.0)
            for transpose in (False, True):
                config = specs.default(
                    spec, m, experts, jnp.bfloat16, transpose=transpose
                )
                assert config.rows % 16 == 0 and config.columns % 128 == 0
                assert not transpose or k % config.columns == 0


def test_bad_arguments():
    weight, spec = random_weight("int4-g128", 256, 128, 0, 4)
    x, sizes = rows(40, 256, "float32"), int32(SIZES)

    def refuses(match, *arguments, function=grouped_matmul, **options):
        with pytest.raises(KernelError, match=match):
            function(*arguments, **({"backend": "reference"} | options))

    refuses("backend is 'best'", x, sizes, weight, spec, backend="best")
    refuses("x has shape", x[:, 1:], sizes, weight, spec)
    refuses("x has shape.*transpose", x, sizes, weight, spec, transpose=True)
    refuses("x has dtype int32", x.astype(jnp.int32), sizes, weight, spec)
    refuses("one per expert", x, sizes[1:], weight, spec)
    refuses("int32", x, sizes.astype(jnp.float32), weight, spec)
    refuses("bias has shape", x, sizes, weight, spec, bias=jnp.zeros((4, 3)))
    refuses("out_dtype", x, sizes, weight, spec, out_dtype=jnp.int8)
    refuses("first is", x, sizes[1:], weight, spec, first=int32([1]))
    refuses(
        "scale has shape", x, sizes, weight._replace(scale=weight.scale[:, :1]), spec
    )
    flat = weight._replace(codes=weight.codes[0], scale=weight.scale[0])
    refuses("experts first", x, sizes, flat, spec)
    gate_up = {"function": grouped_gate_up}
    refuses(
        "activation is", x, sizes, weight, weight, spec, activation="sine", **gate_up
    )
    other = weight._replace(scale=weight.scale.astype(jnp.float32))
    refuses("equal dtypes", x, sizes, weight, other, spec, **gate_up)

"""Perplexity of data-free integers against optimum-quanto and torchao, at equal bits.

`benchmarks/references.py data-free` has more of them, on both texts.
"""

import pytest

import qjax

from .weight_only_reference import PEERS, replaced

pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("optimum.quanto", "quanto-int4"),
        ("optimum.quanto", "quanto-int2"),
        ("torchao", "torchao-int4"),
    ],
)
def test_data_free_integers_are_at_least_as_good(model, perplexity, package, name):
    pytest.importorskip(package)
    peer, recipe = PEERS[name]
    theirs = perplexity(replaced(model, peer))
    assert perplexity(qjax.quantize_model(model, recipe)) <= 1.001 * theirs

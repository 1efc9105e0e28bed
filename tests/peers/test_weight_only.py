"""Perplexity of data-free integers against optimum-quanto and torchao, at equal bits.

Their weights are decoded by their own code and put into our decoder, so that nothing
but the choice of codes and scales differs.
"""

import numpy as np
import pytest

import qjax

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")


def replaced(model, convert):
    """The decoder with every kernel of a layer as a peer decodes its codes."""
    params = model.params()
    for path, w in params.items():
        if path.startswith("layers.") and path.endswith("kernel"):
            out, wide = w.shape[1], w.shape[0]
            linear = torch.nn.Linear(wide, out, bias=False)
            with torch.no_grad():
                linear.weight.copy_(torch.tensor(np.asarray(w, np.float32).T))
            dense = convert(torch.nn.Sequential(linear))
            params[path] = dense.detach().numpy().T.astype(np.float32)
    return qjax.Decoder(model.config, params, dtype="float32")


def quanto(bits):
    quanto = pytest.importorskip("optimum.quanto")

    def convert(module):
        quanto.quantize(module, weights=getattr(quanto, f"qint{bits}"))
        quanto.freeze(module)
        assert module[0].weight_group_size == 128
        return module[0].weight.dequantize()

    return convert


def torchao(bits):
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    def convert(module):
        kind = getattr(torch, f"int{bits}")
        config = IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerGroup(128))
        quantize_(module, config)
        return module[0].weight.dequantize()

    return convert


@pytest.mark.parametrize(
    ("peer", "bits", "recipe"),
    [
        (quanto, 4, "int4-g128"),
        (quanto, 2, "int2-g128"),
        (torchao, 4, "int4-g128-sym"),
    ],
    ids=["quanto-int4", "quanto-int2", "torchao-int4"],
)
def test_data_free_integers_are_at_least_as_good(model, perplexity, peer, bits, recipe):
    if peer is torchao:
        pytest.importorskip("torchao")
    theirs = perplexity(replaced(model, peer(bits)))
    assert perplexity(qjax.quantize_model(model, recipe)) <= 1.001 * theirs

"""The bundled model as data-free packages quantize it, inside our decoder.

Their weights are decoded by their own code, so that nothing but the choice of codes and
scales differs from what our recipes give.
"""

import functools

import numpy as np

import qjax


def replaced(model, convert):
    """The decoder with every kernel of a layer as a package decodes its codes.

    Args:
      model: the original decoder.
      convert: takes a `torch.nn.Sequential` of one linear layer to its dense weight.
    """
    import torch

    params = model.params()
    for path, w in params.items():
        if path.startswith("layers.") and path.endswith("kernel"):
            linear = torch.nn.Linear(*w.shape, bias=False)
            with torch.no_grad():
                linear.weight.copy_(torch.tensor(np.asarray(w, np.float32).T))
            dense = convert(torch.nn.Sequential(linear))
            params[path] = dense.detach().numpy().T.astype(np.float32)
    return qjax.Decoder(model.config, params, dtype="float32")


def quanto(module, bits):
    """optimum-quanto's integers with zero-points, groups of 128."""
    from optimum import quanto

    quanto.quantize(module, weights=getattr(quanto, f"qint{bits}"))
    quanto.freeze(module)
    assert module[0].weight_group_size == 128
    return module[0].weight.dequantize()


def torchao(module, bits):
    """torchao's symmetric integers, groups of 128."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    kind = getattr(torch, f"int{bits}")
    quantize_(module, IntxWeightOnlyConfig(kind, granularity=PerGroup(128)))
    return module[0].weight.dequantize()


def hqq(module, bits):
    """hqq's integers with real zero-points, groups of 64 inputs."""
    import torch
    from hqq.core.quantize import Quantizer

    weight = module[0].weight.detach()
    codes, meta = Quantizer.quantize(
        weight,
        nbits=bits,
        group_size=64,
        axis=1,
        device="cpu",
        compute_dtype=torch.float32,
        bitpack=False,
    )
    return ((codes - meta["zero"]) * meta["scale"]).reshape(weight.shape)


def bitsandbytes(module):
    """NF4 with double quantization, blocks of 64."""
    from bitsandbytes import functional

    weight = module[0].weight.detach()
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return functional.dequantize_4bit(packed, state)


PEERS = {
    "quanto-int4": (functools.partial(quanto, bits=4), "int4-g128"),
    "quanto-int2": (functools.partial(quanto, bits=2), "int2-g128"),
    "torchao-int4": (functools.partial(torchao, bits=4), "int4-g128-sym"),
    "hqq-int4": (functools.partial(hqq, bits=4), "hqq-int4-g64"),
    "hqq-int3": (functools.partial(hqq, bits=3), "hqq-int3-g64"),
    "hqq-int2": (functools.partial(hqq, bits=2), "hqq-int2-g64"),
    "bitsandbytes-nf4": (bitsandbytes, "nf4"),
}
"""Peer and recipe of ours that stores as many bits."""

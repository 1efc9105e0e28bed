"""Writes compressed_tensors.npz: sparse layers as compressed-tensors 0.12 stored them.

    pip install --no-deps --target OLD compressed-tensors==0.12.2
    PYTHONPATH=OLD python tests/golden/converters/make_compressed_tensors.py

Later versions read and write no sparse formats. The versions that made the file are
stored inside it. Weights are int8 multiples of their scales; bfloat16 is uint16.
"""

from pathlib import Path

import compressed_tensors
import numpy as np
import torch
from compressed_tensors.compressors import (
    BitmaskCompressor,
    Marlin24Compressor,
    Sparse24BitMaskCompressor,
)
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

MARLIN = {
    "marlin-4-group": (4, 128, (64, 512)),
    "marlin-4-two-groups": (4, 128, (64, 256)),
    "marlin-4-channel": (4, None, (128, 128)),
    "marlin-8-group": (8, 128, (64, 384)),
    "marlin-8-channel": (8, None, (64, 64)),
}
BITMASK = {
    "sparse-24-bitmask": (Sparse24BitMaskCompressor, Sparse24BitMaskConfig),
    "sparse-bitmask": (BitmaskCompressor, BitmaskConfig),
}


def sparse(rng, low: int, high: int, shape) -> np.ndarray:
    """Integers of which at most two of four neighbours are not 0."""
    codes = rng.integers(low, high, shape).reshape(-1, 4)
    for row in codes:
        row[rng.permutation(4)[:2]] = 0
    return codes.reshape(shape).astype(np.int8)


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "versions": np.array([compressed_tensors.__version__, torch.__version__]),
    }
    for name, (bits, group, shape) in MARLIN.items():
        strategy = "channel" if group is None else "group"
        weights = QuantizationArgs(num_bits=bits, strategy=strategy, group_size=group)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        codes = sparse(rng, -(2 ** (bits - 1)), 2 ** (bits - 1), shape)
        groups = 1 if group is None else shape[1] // group
        scale = 2.0 ** -rng.integers(4, 9, (shape[0], groups))
        wide = np.repeat(scale, shape[1] // groups, 1)
        state = {
            "a.weight": torch.tensor(codes * wide, dtype=torch.float16),
            "a.weight_scale": torch.tensor(scale, dtype=torch.float16),
            "a.weight_zero_point": torch.zeros(scale.shape, dtype=torch.int8),
        }
        made = Marlin24Compressor().compress(state, {"a": scheme})
        arrays |= {f"{name}/{k[2:]}": v.numpy() for k, v in made.items()}
        arrays[f"{name}/codes"] = codes
        arrays[f"{name}/scale"] = scale.astype(np.float16)
    for name, (compressor, config) in BITMASK.items():
        codes = sparse(rng, -9, 10, (12, 44))
        weight = torch.tensor(codes, dtype=torch.bfloat16)
        made = compressor(config(sparsity_structure="2:4")).compress(
            {"a.weight": weight}
        )
        for key, value in made.items():
            raw = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
            arrays[f"{name}/{key[2:]}"] = raw.numpy()
        arrays[f"{name}/codes"] = codes
    np.savez_compressed(Path(__file__).parent / "compressed_tensors.npz", **arrays)


if __name__ == "__main__":
    main()

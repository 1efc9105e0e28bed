"""Writes bitsandbytes.npz: what bitsandbytes stores for a few tensors.

    python tests/golden/formats/make_golden.py

Needs the [peers] extra. The versions that made the file are stored inside it.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

CASES = {
    "nf4": ("nf4", 64, False, "float32", (6, 128)),
    "nf4-double": ("nf4", 64, True, "bfloat16", (36, 512)),
    "nf4-flat": ("nf4", 64, True, "float16", (13, 21)),
    "fp4": ("fp4", 128, False, "float32", (5, 101)),
    "fp4-double": ("fp4", 64, True, "float32", (9, 192)),
}


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (kind, block, double, dtype, shape) in CASES.items():
        w = torch.tensor(rng.standard_t(2.0, size=shape)).to(getattr(torch, dtype))
        with torch.compiler.set_stance("force_eager"):
            packed, state = bnb.quantize_4bit(
                w, blocksize=block, quant_type=kind, compress_statistics=double
            )
            values = bnb.dequantize_4bit(packed, state)
        if shape[1] % block and shape[1] % 16 == 0:
            raise ValueError(f"{name}: the AVX-512 decoder is wrong for this shape")
        arrays[f"{name}/spec"] = np.array([kind, str(block), str(double), dtype])
        arrays[f"{name}/w"] = bits(w)
        arrays[f"{name}/packed"] = packed.reshape(-1).numpy()
        arrays[f"{name}/absmax"] = state.absmax.numpy()
        if double:
            arrays[f"{name}/offset"] = state.offset.reshape(1).numpy()
            arrays[f"{name}/nested_absmax"] = state.state2.absmax.numpy()
        arrays[f"{name}/values"] = bits(values)
    import bitsandbytes

    versions = [
        f"bitsandbytes {bitsandbytes.__version__}",
        f"torch {torch.__version__}",
    ]
    arrays["versions"] = np.array(versions)
    np.savez_compressed(Path(__file__).with_name("bitsandbytes.npz"), **arrays)


def bits(x: torch.Tensor) -> np.ndarray:
    """Half-precision tensors as their bits."""
    return x.numpy() if x.dtype == torch.float32 else x.view(torch.uint16).numpy()


if __name__ == "__main__":
    main()

"""Writes gguf.npz: random blocks of every type that gguf-py decodes, and their values.

    python tests/golden/formats/make_gguf.py

Needs the [peers] extra. The versions that made the file are stored inside it.
"""

from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from gguf import quants

TYPES = (
    "BF16 F16 F32 "
    "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 TQ1_0 TQ2_0 MXFP4 NVFP4 Q2_K Q3_K Q4_K Q5_K Q6_K "
    "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS"
).split()
BLOCKS = 2
EXPONENTS = (0, 1, 2, 254)
"""Scales of MXFP4 whose products are subnormal or overflow."""


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        blocks, values = finite(rng, kind)
        if name == "MXFP4":
            blocks = np.concatenate([blocks] * 2)
            blocks[:, 0] = EXPONENTS
            with np.errstate(over="ignore"):
                values = quants.dequantize(blocks, kind)
        arrays[f"{name.lower()}/blocks"] = blocks
        arrays[f"{name.lower()}/values"] = values
    packages = [f"{package} {version(package)}" for package in ("gguf", "numpy")]
    arrays["versions"] = np.array(packages)
    np.savez_compressed(Path(__file__).with_name("gguf.npz"), **arrays)


def finite(rng, kind) -> tuple[np.ndarray, np.ndarray]:
    """Random blocks whose scales are numbers."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    while True:
        blocks = rng.integers(0, 256, (BLOCKS, size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            values = quants.dequantize(blocks, kind)
        if np.isfinite(values).all():
            return blocks, values


if __name__ == "__main__":
    main()

"""Writes mlx.npz: small weights as MLX packs and unpacks them.

Run with `mlx[cpu]`; the file was made with mlx 0.32.4. Keys are
`MODE-BITS-GROUP-DTYPE/PART`; bfloat16 is stored as its bits.
"""

import pathlib

import mlx.core as mx
import numpy as np

CASES = [
    ("affine", 1, 32, "float16"),
    ("affine", 2, 64, "bfloat16"),
    ("affine", 3, 32, "float16"),
    ("affine", 4, 64, "float16"),
    ("affine", 4, 32, "bfloat16"),
    ("affine", 4, 128, "float32"),
    ("affine", 5, 64, "bfloat16"),
    ("affine", 6, 128, "float16"),
    ("affine", 8, 32, "float32"),
    ("mxfp4", 4, 32, "bfloat16"),
    ("mxfp8", 8, 32, "bfloat16"),
    ("nvfp4", 4, 16, "bfloat16"),
]


def plain(array):
    """An array in NumPy; bfloat16 as its bits."""
    bits = array.dtype == mx.bfloat16
    return np.array(array.view(mx.uint16) if bits else array)


def main():
    """Packs a normal weight, one group zero and one constant."""
    mx.random.seed(0)
    made = {}
    for mode, bits, group, dtype in CASES:
        w = mx.random.normal((6, 256))
        w[1, :128] = 0
        w[2, :128] = 0.75
        w = w.astype(getattr(mx, dtype))
        options = {"group_size": group, "bits": bits, "mode": mode}
        parts = mx.quantize(w, **options)
        wide = [p.astype(mx.float32) if mode == "affine" else p for p in parts[1:]]
        dense = mx.dequantize(parts[0], *wide, dtype=mx.float32, **options)
        key = f"{mode}-{bits}-{group}-{dtype}"
        names = ("weight", "scales", "biases")[: len(parts)]
        made |= {f"{key}/{n}": plain(p) for n, p in zip(names, parts, strict=True)}
        made[f"{key}/dense"] = np.array(dense)
    np.savez_compressed(pathlib.Path(__file__).with_name("mlx.npz"), **made)


if __name__ == "__main__":
    main()

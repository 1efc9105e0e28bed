"""Writes ggml.npz: a few rows as llama.cpp quantizes them, every type.

    npm pack @node-llama-cpp/linux-x64 && tar xzf node-llama-cpp-linux-x64-*.tgz
    python tests/golden/methods/make_ggml.py package/bins/linux-x64/libggml-base.so

The npm package (MIT) holds ggml built for any x86-64, without fused multiply-add. The
file was made with version 3.22.1 of it, ggml 0.25.1 (0ad4a86); it says so itself. Keys
are `x`, `imatrix`, `TYPE/plain` and `TYPE/imatrix`; types that need an imatrix have no
plain rows.
"""

import ctypes
import pathlib
import sys

import numpy as np
from safetensors.flax import load_file

ROOT = pathlib.Path(__file__).resolve().parents[3]
TYPES = {
    **{"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8},
    **{"q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14},
    **{"iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18, "iq1_s": 19, "iq4_nl": 20},
    **{"iq3_s": 21, "iq2_s": 22, "iq4_xs": 23, "iq1_m": 29},
    **{"tq1_0": 34, "tq2_0": 35, "mxfp4": 39, "nvfp4": 40, "q1_0": 41, "q2_0": 42},
}
NEEDY = ("iq2_xxs", "iq2_xs", "iq1_s")


def rows(rng) -> np.ndarray:
    """Rows of two K-blocks: random, degenerate, and of a trained model."""
    x = 0.02 * rng.standard_t(3, size=(7, 512))
    x[0] = 0.02 * rng.standard_normal(512)
    x[2] *= 1e-4
    x[3] = np.abs(x[3])
    x[4, :256] = 0.0
    x[4, 256:] = -0.03
    x[5, 32:64] = 0.0  # groups of zeros and of constants among others
    x[5, 64:96] = 0.01
    x[6] = np.round(x[6] * 100) / 128  # many ties
    model = load_file(ROOT / "examples" / "model" / "model.safetensors")
    name = "model.layers.2.mlp.gate_proj.weight"
    trained = np.asarray(model[name][:4], np.float32).reshape(2, 512)
    return np.concatenate([x.astype(np.float32), trained])


def main(path: str) -> None:
    """Quantizes the rows with every type, with and without an imatrix."""
    ggml = ctypes.CDLL(path)
    ggml.ggml_row_size.restype = ctypes.c_size_t
    ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    ggml.ggml_version.restype = ggml.ggml_commit.restype = ctypes.c_char_p
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, pointer, pointer, number, number, number, pointer)
    ]
    rng = np.random.default_rng(0)
    x, imatrix = rows(rng), rng.gamma(0.5, size=512).astype(np.float32)
    version = f"{ggml.ggml_version().decode()} {ggml.ggml_commit().decode()}"
    made = {"x": x, "imatrix": imatrix, "version": np.array(version)}
    for name, kind in TYPES.items():
        ggml.ggml_quantize_init(kind)
        for case, weights in {"plain": None, "imatrix": imatrix.ctypes.data}.items():
            if weights is None and name in NEEDY:
                continue
            size = ggml.ggml_row_size(kind, x.shape[1])
            out = np.zeros((len(x), size), np.uint8)
            source, target = x.ctypes.data, out.ctypes.data
            ggml.ggml_quantize_chunk(kind, source, target, 0, *x.shape, weights)
            made[f"{name}/{case}"] = out
    np.savez_compressed(pathlib.Path(__file__).with_name("ggml.npz"), **made)


if __name__ == "__main__":
    main(sys.argv[1])

"""GPT-2, whose dense matrices lie `[in, out]`, packed as linear layers are."""

import numpy as np
import pytest

from qjax.checkpoint import checkpoint_parts
from qjax.converters.huggingface import open_checkpoint, write_checkpoint
from qjax.converters.packed_write import WRITERS
from qjax.errors import FormatError
from qjax.formats import Int
from qjax.models import Decoder, ModelConfig
from qjax.quantize import quantize
from qjax.tensor import QuantizedTensor

DIM, WIDE, GROUP = 64, 96, 32
CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 40,
    "n_embd": DIM,
    "n_inner": WIDE,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 16,
}
MATRICES = {
    "attn.c_attn": (DIM, 3 * DIM),
    "attn.c_proj": (DIM, DIM),
    "mlp.c_fc": (DIM, WIDE),
    "mlp.c_proj": (WIDE, DIM),
}


def checkpoints(kind: str, base: str = "transformer."):
    """Settings and tensors of a packed model, and the tensors of the dense one."""
    rng = np.random.default_rng(0)
    writer, fmt = WRITERS[kind](), Int(4, GROUP, scale_dtype="float16")
    dense = {"wte.weight": (40, DIM), "wpe.weight": (16, DIM)}
    dense |= {"ln_f.weight": (DIM,), "ln_f.bias": (DIM,)}
    dense |= {f"h.0.ln_{k}.{p}": (DIM,) for k in (1, 2) for p in ("weight", "bias")}
    dense |= {f"h.0.{name}.bias": shape[1:] for name, shape in MATRICES.items()}
    plain = {base + n: rng.normal(size=s).astype("f4") / 8 for n, s in dense.items()}
    packed = dict(plain)
    for name, shape in MATRICES.items():
        start = f"{base}h.0.{name}"
        w = rng.normal(size=shape).astype("f4") / 8
        q = quantize(w, writer.fallback if kind == "bnb" else fmt)
        plain[f"{start}.weight"] = np.asarray(q.dequantize("float32"))
        parts = writer.write(q, f"there: {start}")
        packed |= {f"{start}.{part}": np.array(leaf) for part, leaf in parts.items()}
    return writer.settings([]), packed, plain


def read(folder):
    params = {}
    with open_checkpoint(folder) as source:
        for _, part in checkpoint_parts(source):
            params |= part
        Decoder(ModelConfig.from_hf(source.config), params)  # which looks at shapes
    return params


@pytest.mark.parametrize("base", ["transformer.", ""])
@pytest.mark.parametrize("kind", ["gptq", "bnb"])
def test_values(kind, base, tmp_path):
    settings, packed, plain = checkpoints(kind, base)
    config = CONFIG | {"quantization_config": settings}
    write_checkpoint(tmp_path / "packed", config, packed, {})
    write_checkpoint(tmp_path / "dense", CONFIG, plain, {})
    params = read(tmp_path / "packed")
    want = read(tmp_path / "dense")
    assert params.keys() == want.keys()
    kernels = [path for path in params if path.endswith(".kernel")]
    assert len(kernels) == 6  # three of `c_attn`
    for path in kernels:
        assert isinstance(params[path], QuantizedTensor)
        np.testing.assert_array_equal(params[path].dequantize("float32"), want[path])


def test_a_matrix_that_lies_the_other_way(tmp_path):
    settings, packed, _ = checkpoints("gptq")
    up, down = (f"transformer.h.0.mlp.{n}." for n in ("c_fc", "c_proj"))
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        packed[up + part], packed[down + part] = packed[down + part], packed[up + part]
    write_checkpoint(tmp_path, CONFIG | {"quantization_config": settings}, packed, {})
    with pytest.raises(
        FormatError, match=r"c_fc\.weight: got \(96, 64\), expected \(64, 96\)"
    ):
        read(tmp_path)

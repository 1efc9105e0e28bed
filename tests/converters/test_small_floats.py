"""Tensors of any shape and dtype give a weight or a clear error."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import settings as settings_of_tests
from hypothesis import strategies as st

from qjax.converters.compressed_tensors import FORMATS, CompressedTensors
from qjax.converters.fp8 import BlockFP8, FbgemmFP8
from qjax.converters.fp_quant import FPQuant
from qjax.converters.modelopt import ModelOpt
from qjax.converters.mxfp4 import GptOss
from qjax.converters.packed import check_parts
from qjax.converters.quark import Quark
from qjax.errors import QjaxError

READERS = (CompressedTensors, BlockFP8, FbgemmFP8, FPQuant, ModelOpt, GptOss, Quark)
SIZES = st.sampled_from([1, 2, 3, 16, 32, 64])
DTYPES: dict[str, tuple[str, ...]] = {
    "integer": ("uint8", "int8", "int32"),
    "floating": ("float32", "bfloat16", "float8_e4m3fn"),
}
DTYPES["any"] = (*DTYPES["integer"], *DTYPES["floating"], "float8_e5m2")
INPUTS = {"num_bits": 8, "type": "float", "strategy": "tensor", "is_dynamic": False}


def settings(reader, data) -> dict:
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "block"}}
    scheme["input_activations"] = data.draw(st.sampled_from([None, INPUTS]))
    scheme["format"] = data.draw(st.sampled_from(FORMATS))
    kinds = st.sampled_from(["static", "dynamic", None])
    quark = {"weight": {"dtype": "int8"}, "input_tensors": {"dtype": "fp8_e4m3"}}
    return {
        "config_groups": {"a": scheme},
        "activation_scheme": data.draw(kinds),
        "global_quant_config": data.draw(st.sampled_from([None, quark])),
    }


@settings_of_tests(max_examples=150, derandomize=True, deadline=None)
@given(reader=st.sampled_from(READERS), data=st.data())
def test_any_parts(reader, data):
    rng, parts = np.random.default_rng(0), {}
    rows, cols = data.draw(SIZES), data.draw(SIZES)
    for name, (kind, rank) in reader.parts.items():
        if not data.draw(st.integers(0, 9), name):
            continue
        rank = rank or data.draw(st.integers(0, 4))
        shape = [rows, cols, data.draw(SIZES), 16][:rank]
        if data.draw(st.booleans()):
            shape = [data.draw(SIZES) for _ in shape]
        dtype = data.draw(st.sampled_from(DTYPES.get(kind, (kind,))))
        parts[name] = np.asarray(rng.integers(0, 100, shape)).astype(np.dtype(dtype))
    try:
        check_parts(reader, parts, "here: layer")
        made = reader(settings(reader, data), "here")
        shape = made.shape(parts)
    except (QjaxError, KeyError, ValueError, IndexError):
        return  # `PackedCheckpoint` makes errors of a shape clear
    try:
        q = made.read(parts, "here: layer")
    except (QjaxError, KeyError) as error:
        assert str(error)
    else:
        assert q.shape == (*shape[:-2], shape[-1], shape[-2])
        assert q.dequantize(jnp.float32).shape == q.shape

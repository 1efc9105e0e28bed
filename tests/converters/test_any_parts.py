"""Whatever parts a layer has: every reader gives a tensor or a clear error."""

import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_tests
from hypothesis import strategies as st

from qjax.converters.packed import READERS, check_parts
from qjax.errors import QjaxError

SIZES = [1, 2, 3, 4, 8, 16, 32, 48, 64, 96, 128]
KINDS = {
    "integer": ["int32", "uint8", "int64", "int8", "int16"],
    "floating": ["float16", "float32", "bfloat16", "float8_e4m3fn"],
    "any": ["uint8", "int8", "int32", "uint32", "float16", "float8_e4m3fn"],
}
SETTINGS = {
    "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
    "format": "pack-quantized",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}},
    "linear_class": "autobitlinear",
    "quantization_mode": "offline",
    "forward_dtype": "mxfp4",
}


def array(data, dtype: str, shape: list[int], where: str) -> np.ndarray:
    rng = np.random.default_rng(data.draw(st.integers(0, 3), where))
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    with np.errstate(all="ignore"):
        return rng.integers(0, 100, shape).astype(np.float32).astype(kind)


@pytest.mark.parametrize("kind", READERS)
@settings_of_tests(max_examples=25, derandomize=True, deadline=None)
@given(data=st.data())
def test_parts(kind, data):
    cls = READERS[kind]
    sizes = st.sampled_from(SIZES)
    settings = {
        **SETTINGS,
        "bits": data.draw(st.sampled_from([2, 3, 4, 8])),
        "group_size": data.draw(st.sampled_from([32, 64, -1])),
    }
    parts = {}
    for name, (dtype, rank) in cls.parts.items():
        if data.draw(st.integers(0, 7), name):
            rank = data.draw(st.integers(1, 3)) if rank is None else rank
            wide = [data.draw(sizes) for _ in range(rank)]
            choice = st.sampled_from(KINDS.get(dtype, [dtype]))
            parts[name] = array(data, data.draw(choice), wide, name)
    if not set(cls.marks) & set(parts):  # not a layer of this kind
        return
    shape: tuple[int, ...] | None = None
    try:
        reader = cls(settings, "here")
        check_parts(reader, parts, "here: layer")
        shape = reader.shape(parts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of arbitrary scales
            q = reader.read(parts, "here: layer")
    except (QjaxError, KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        if not isinstance(error, QjaxError):  # `PackedCheckpoint` words these
            assert isinstance(error, KeyError) or shape is None
        assert str(error)
    else:
        assert q.shape[-2:] == tuple(shape[::-1][:2]) or len(shape) > 2

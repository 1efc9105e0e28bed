"""Layers that other libraries saved, kept as files, decode to what these decode."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qjax.converters.packed import READERS
from qjax.converters.packed_write import WRITERS

FOLDER = Path(__file__).parent.parent / "golden" / "converters"


def cases() -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for path in ("peers.npz", "quark.npz"):
        with np.load(FOLDER / path) as file:
            for name in file.files:
                case, _, part = name.partition("/")
                leaf, (part, _, dtype) = file[name], part.partition("@")
                leaf = leaf.view(getattr(ml_dtypes, dtype)) if dtype else leaf
                found.setdefault(case, {})[part] = leaf
    return found


CASES = cases()


@pytest.mark.parametrize("case", CASES)
def test_values(case):
    parts = dict(CASES[case])
    want, settings = parts.pop("want"), json.loads(parts.pop("settings").tobytes())
    reader = READERS[case.partition("-")[0]](settings, "here")
    parts = {name: leaf for name, leaf in parts.items() if name in reader.parts}
    if "expected_shape" in reader.parts:
        parts["expected_shape"] = np.array(want.shape)
    assert reader.shape(parts) == want.shape
    got = np.asarray(reader.read(parts, "here: layer").dequantize("float32"))
    if case == "bitsandbytes-int8":  # it multiplies by 1 / 127
        np.testing.assert_allclose(got.T, want, rtol=3e-7)
    elif case in ("quanto-int4", "quanto-int2"):  # `code * scale - shift` in float32
        np.testing.assert_allclose(got.T, want, rtol=1e-6, atol=1e-7)
    else:
        np.testing.assert_array_equal(got.T, want)


@pytest.mark.parametrize("case", ["gptq-4", "awq-4"])
def test_written_as_they_were(case):
    """Layers of auto-round, bit for bit, and settings that read them again."""
    kind, parts = case.partition("-")[0], dict(CASES[case])
    want, settings = parts.pop("want"), json.loads(parts.pop("settings").tobytes())
    q = READERS[kind](settings, "here").read(parts, "here: a")
    writer = WRITERS[kind]()
    made = writer.write(q, "there: a")
    assert made.keys() == parts.keys()
    for name, leaf in parts.items():
        assert made[name].dtype == leaf.dtype and made[name].shape == leaf.shape
        assert made[name].tobytes() == leaf.tobytes(), name
    said = writer.settings([])
    for name in ("quant_method", "bits", "group_size"):
        assert said[name] == settings[name]
    again = READERS[kind](said, "there").read(made, "there: a")
    np.testing.assert_array_equal(again.dequantize("float32").T, want)

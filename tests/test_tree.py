"""Quantized trees and model sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.errors import NonFiniteError, SpecError
from qjax.formats import Int
from qjax.methods import RTN
from qjax.nn import quantize_module
from qjax.recipes import Recipe, Rule
from qjax.tree import (
    dequantize_tree,
    is_quantized,
    model_size,
    param_count,
    quantize_tree,
)
from qjax.wrappers import Transposed

FMT = Int(4, 8)


@pytest.fixture
def params(rng):
    def w(*shape):
        return rng.normal(size=shape).astype("f4")

    return {
        "layers": [{"q": {"kernel": w(16, 8), "bias": w(8)}} for _ in range(2)],
        "stack": {"kernel": w(3, 16, 8), "scale": w(3, 16)},
        "embed": {"embedding": w(12, 16)},
        "steps": np.arange(6, dtype=np.int32).reshape(2, 3),
    }


def test_leaves_a_recipe_names_are_packed(params):
    recipe = Recipe((Rule("layers.1.*", None), Rule("*kernel", FMT)))
    packed = quantize_tree(params, recipe)
    assert is_quantized(packed["layers"][0]["q"]["kernel"])
    assert packed["layers"][0]["q"]["bias"] is params["layers"][0]["q"]["bias"]
    assert packed["layers"][1] == params["layers"][1]
    assert packed["stack"]["kernel"].shape == (3, 16, 8)
    assert packed["stack"]["scale"] is params["stack"]["scale"]
    assert packed["embed"]["embedding"] is params["embed"]["embedding"]
    dense = dequantize_tree(packed)
    assert jax.tree.structure(dense) == jax.tree.structure(params)
    again = quantize_tree(packed, Recipe((Rule("*kernel", Int(8, "channel")),)))
    assert again["stack"]["kernel"].format == FMT
    assert again["layers"][1]["q"]["kernel"].format.bits == 8


def test_tables_are_transposed(params):
    packed = quantize_tree(params, Recipe((Rule("*embedding", FMT),)))
    table = packed["embed"]["embedding"]
    assert isinstance(table, Transposed) and table.shape == (12, 16)
    assert table.base.scale.shape == (2, 12)


def test_errors_name_the_leaf(params):
    with pytest.raises(SpecError, match=r"layers\.0\.q\.kernel: .*keeps it before"):
        quantize_tree(params, Int(4, 128))
    with pytest.raises(SpecError, match="names no parameter"):
        quantize_tree({"w": params["stack"]["kernel"]}, FMT)
    params["stack"]["kernel"][1, 2, 3] = np.inf
    with pytest.raises(NonFiniteError, match=r"stack\.kernel: 1 of 384"):
        quantize_tree(params, FMT)
    quantize_tree(params, FMT, nonfinite="clip")


def test_stochastic_rounding_folds_in_the_path(params):
    params["layers"][1] = params["layers"][0]
    method = RTN(stochastic=True)
    one = quantize_tree(params, FMT, method, key=jax.random.key(0))
    two = quantize_tree(params, FMT, method, key=jax.random.key(0))
    first, second = (one["layers"][i]["q"]["kernel"].codes for i in (0, 1))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, two["layers"][0]["q"]["kernel"].codes)


def test_sizes_are_true_bytes(params):
    size = model_size(params)
    count = 2 * (128 + 8) + 3 * (128 + 16) + 192 + 6
    assert (size.nbytes, size.parameters) == (4 * count, count)
    packed = model_size(quantize_tree(params, FMT))
    kernels = 5 * 128
    assert packed.parameters == param_count(params) == count
    assert packed.quantized_parameters == kernels
    assert packed.quantized_bytes == kernels // 2 + kernels // 8 * 4
    assert packed.nbytes == packed.quantized_bytes + 4 * (count - kernels)
    assert packed.bits_per_weight == 8 * packed.nbytes / count
    assert str(packed).endswith(f"{100 * kernels / count:.1f} % quantized")
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    assert model_size(shapes) == size
    assert model_size({}).bits_per_weight == 0.0


def test_size_of_a_module_counts_shared_weights_once_and_no_random_state():
    layer = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    model = nnx.Sequential(layer, nnx.Dropout(0.5, rngs=nnx.Rngs(0)), layer)
    assert param_count(model) == 16 * 16 + 16
    packed = quantize_module(model, FMT, freeze=True)
    assert model_size(packed).nbytes == 128 + 2 * 16 * 4 + 64
    assert param_count(packed) == param_count(model)

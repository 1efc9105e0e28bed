"""Adapters merged into weights, measured; weights quantized again as they were."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.additive import AdditiveTensor
from qjax.converters.adapters import attached
from qjax.converters.peft_settings import Adapter, Factors
from qjax.errors import SpecError, UnsupportedError
from qjax.formats import NF4, Additive, Ggml, Int, KMeans, Trellis
from qjax.methods import Lloyd
from qjax.models import ModelConfig, param_shapes
from qjax.tensor import QuantizedTensor
from qjax.train.merge_parts import MODES, MergeReport, merge_parts
from qjax.train.requantize import into_zero, requantize
from qjax.trellis import Incoherent, TrellisTensor
from qjax.wrappers import (
    InputScaled,
    LowRank,
    Permuted,
    Rotated,
    RoundedInputs,
    RowParts,
    SplitInputs,
    Transposed,
    WithOutliers,
)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
LAYER, KERNEL = "model.layers.0.self_attn.q_proj", "layers.0.attn.q.kernel"


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype("float32")


def factors(rows: int = 32, cols: int = 32, pool: int = 1, **more) -> Factors:
    a, b = floats(rows // pool, 4, seed=1), floats(4, cols, seed=2)
    return Factors(0.1 * a, 0.1 * b, 2.0, pool=pool, **more)


def full(own: Factors) -> np.ndarray:
    mean = np.repeat(own.a.astype(np.float64), own.pool, 0) / own.pool
    return own.scaling * (mean @ own.b)


def quantized(x):
    return isinstance(x, QuantizedTensor)


def base_parts(params: dict) -> list:
    layers = [
        {p: x for p, x in params.items() if p.startswith(f"layers.{i}.")}
        for i in range(2)
    ]
    first = {p: x for p, x in params.items() if p.startswith("embed.")}
    last = {p: params[p] for p in ("norm.scale", "head.kernel") if p in params}
    return [(None, first), (0, layers[0]), (1, layers[1]), (None, last)]


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.from_hf(LLAMA)


def originals_and_base(config: ModelConfig, fmt) -> tuple[dict, dict]:
    """Bfloat16 weights, and the same with the layers' kernels and a table packed."""
    shapes = param_shapes(config)
    originals = {
        p: jnp.asarray(0.2 * floats(*s, seed=len(p)), jnp.bfloat16)
        for p, s in shapes.items()
    }
    base = dict(originals)
    for path, leaf in originals.items():
        table = path == "embed.embedding"
        if table or (path.startswith("layers.") and path.endswith("kernel")):
            base[path] = qjax.quantize(leaf, fmt, axis=-1 if table else -2)
    return originals, base


def norm(x) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def value(leaf) -> np.ndarray:
    leaf = leaf.dequantize("float32") if quantized(leaf) else leaf
    return np.asarray(leaf, np.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dora", [False, True])
def test_modes_and_their_measures(config, mode, dora):
    originals, base = originals_and_base(config, Int(4, 16))
    magnitude = np.abs(floats(32, seed=7)) + 0.5 if dora else None
    own = factors(magnitude=magnitude)
    table = factors(40, embedding=True, magnitude=magnitude)
    adapter = Adapter({LAYER: own, "model.embed_tokens": table}, r=4, use_dora=dora)
    report = MergeReport(mode)
    first = iter(base_parts(originals)) if mode == "original" else None
    parts = merge_parts(
        config, base_parts(base), adapter, mode, report, originals=first
    )
    made = {p: x for _, part in parts for p, x in part.items()}
    assert made.keys() == base.keys()

    def adapted(w, one):
        w = w + full(one)
        return w * (magnitude / np.linalg.norm(w, axis=0)) if dora else w

    for path, one in ((KERNEL, own), ("embed.embedding", table)):
        before = value(base[path])
        served = adapted(before, one)
        start = value(originals[path]) if mode == "original" else before
        target, got = adapted(start, one), value(made[path])
        told = report.tensors[path]
        assert told.delta == pytest.approx(norm(served - before), rel=1e-4)
        assert told.error == pytest.approx(norm(got - served), rel=1e-4)
        assert told.rounding == pytest.approx(norm(got - target), rel=1e-4)
        assert told.relative == pytest.approx(told.error / told.delta)
        if mode == "requantized":
            assert jax.tree.structure(made[path]) == jax.tree.structure(base[path])
            assert told.format == "int4-g16"
            # half a step of the greatest group bounds the error
            assert np.abs(got - served).max() <= 0.6 * np.abs(served).max() / 7.5
        else:
            assert made[path].dtype == jnp.bfloat16 and told.format == "bfloat16"
            error = np.abs(got - target)
            assert (error <= 2.0**-8 * np.abs(target) + 1e-5).all()
    other = "layers.1.mlp.up.kernel"
    assert quantized(made[other]) == (mode == "requantized")
    want = originals if mode == "original" else base
    same = value(want[other])
    if mode == "dequantized":
        same = same.astype(jnp.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(value(made[other]), same)
    errors = [t.error for t in report.tensors.values()]
    deltas = [t.delta for t in report.tensors.values()]
    assert report.relative == pytest.approx(norm(errors) / norm(deltas))
    plain = report.to_dict()
    assert plain["mode"] == mode and plain["tensors"][KERNEL]["format"] == told.format


def test_the_original_has_lost_what_quantization_did(config):
    """The error of that mode is the base's own, which others do not have."""
    originals, base = originals_and_base(config, Int(3, 16))
    adapter = Adapter({LAYER: factors()}, r=4)
    told = {}
    for mode in MODES:
        report = MergeReport(mode)
        first = base_parts(originals) if mode == "original" else None
        list(
            merge_parts(
                config, base_parts(base), adapter, mode, report, originals=first
            )
        )
        told[mode] = report.tensors[KERNEL]
    lost = norm(value(originals[KERNEL]) - value(base[KERNEL]))
    assert told["original"].error == pytest.approx(lost, rel=0.02)
    assert told["original"].rounding < 0.05 * lost
    assert told["dequantized"].error == told["dequantized"].rounding < 0.05 * lost
    assert 0.3 * lost < told["requantized"].error < 3 * lost


@pytest.mark.parametrize("zero, exact", [("float32", True), ("uint8", False)])
def test_qa_lora_goes_into_zero_points(config, zero, exact):
    _, base = originals_and_base(config, Int(4, 16, symmetric=False, zero_dtype=zero))
    own = dataclasses.replace(factors(pool=16), scaling=40.0)
    report = MergeReport("requantized")
    adapter = Adapter({LAYER: own}, r=4, pool=16)
    parts = merge_parts(config, base_parts(base), adapter, "requantized", report)
    made = {p: x for _, part in parts for p, x in part.items()}[KERNEL]
    if exact:
        np.testing.assert_array_equal(made.codes, base[KERNEL].codes)
    told = report.tensors[KERNEL]
    assert (told.relative < 1e-5) == exact and told.relative < 0.6
    want = value(base[KERNEL]) + full(own)
    np.testing.assert_allclose(value(made), want, atol=1e-4 if exact else 0.5)


def test_what_does_not_fit_zero_points():
    q = qjax.quantize(floats(32, 8), Int(4, 16, symmetric=False))
    assert into_zero(q, factors(cols=8, pool=32)) is not None
    assert into_zero(q, factors(cols=8, pool=8)) is None  # groups see two averages
    assert into_zero(q, factors(cols=8)) is None
    assert into_zero(Transposed(q), factors(cols=8, pool=16)) is None
    for fmt in (Int(4, 16), Int(4, "channel", symmetric=False), NF4(32)):
        q = qjax.quantize(floats(32, 8), fmt)
        assert into_zero(q, factors(cols=8, pool=16)) is None


def wrapped() -> dict:
    """One weight `[32, 16]` in every wrapper that is quantized again."""
    fmt = Int(8, 16)
    q = qjax.quantize(floats(32, 16), fmt)
    half = qjax.quantize(floats(16, 16), fmt)
    signs = np.where(floats(32, seed=3) > 0, 1, -1).astype(np.int8)
    places = {"rows": np.int32([3, 9, 0]), "cols": np.int32([1, 0, 0])}
    values = jnp.asarray([5.0, -4.0, 0.0])  # the last fills the list up
    scale = jnp.asarray(np.r_[0.0, np.linspace(0.5, 2, 31)], jnp.float32)
    back = np.arange(32, dtype=np.int32)[::-1].copy()
    return {
        "int8": q,
        "asym": qjax.quantize(floats(32, 16), Int(8, 16, symmetric=False)),
        "nf4": qjax.quantize(floats(32, 16), NF4(32, double=True)),
        "kmeans": qjax.quantize(floats(32, 16), KMeans(4), Lloyd()),
        "transposed": Transposed(qjax.quantize(floats(16, 32), fmt)),
        "permuted": Permuted(q, back),
        "scaled": InputScaled(q, scale),
        "rotated": Rotated(q, signs),
        "rounded": RoundedInputs(q),
        "lowrank": LowRank(q, floats(32, 2), floats(2, 16)),
        "outliers": WithOutliers(q, values, **places),
        "split": SplitInputs(
            q, jnp.ones((2, 16), jnp.float16), jnp.asarray([4, 32], jnp.int32)
        ),
        "rows": RowParts((half, half), (0, 16), (32, 16)),
        "residual": RowParts((q, q), (0, 0), (32, 16)),
        "nested": Transposed(
            InputScaled(
                Permuted(qjax.quantize(floats(16, 32), fmt), back[16:]),
                jnp.linspace(0.5, 2, 16),
            )
        ),
    }


@pytest.mark.parametrize("name", wrapped())
def test_weights_are_quantized_as_they_were(name):
    q = wrapped()[name]
    w = floats(32, 16, seed=11)
    made = requantize(q, w)
    assert jax.tree.structure(made) == jax.tree.structure(q)
    kinds = [
        [(x.shape, jnp.dtype(x.dtype)) for x in jax.tree.leaves(t)] for t in (made, q)
    ]
    assert kinds[0] == kinds[1]
    error = np.abs(value(made) - w)
    if name == "scaled":  # an input that is multiplied by zero stays nothing
        np.testing.assert_array_equal(value(made)[0], 0)
        error = error[1:]
    coarse = name in ("nf4", "kmeans")
    assert norm(error) <= (0.15 if coarse else 0.02) * norm(w)


def test_outliers_and_kept_inputs_are_new_ones():
    q = wrapped()["outliers"]
    w = floats(32, 16)
    w[3, 1], w[9, 0] = 50, -60
    made = requantize(q, w)
    assert isinstance(made, WithOutliers)
    assert np.abs(value(made) - w).max() < 0.05  # though the outliers are 50 and -60
    np.testing.assert_array_equal(np.asarray(made.values)[2], 0)
    split = requantize(wrapped()["split"], w)
    np.testing.assert_array_equal(value(split)[4], np.asarray(w[4], np.float16))


def test_codes_that_need_calibration_are_refused():
    fmt = Additive(2, 8, 8)
    codes = np.zeros((32 // 8 * 2, 16), np.uint8)
    tables = np.zeros((2, 256, 8), np.float16)
    q = AdditiveTensor(codes, np.ones((1, 16), np.float16), tables, fmt, (32, 16))
    with pytest.raises(UnsupportedError, match=r"k: cannot be rounded to additive2x8"):
        requantize(q, floats(32, 16), "k")


def test_blocks_of_llama_cpp_have_a_method_of_their_own():
    q = qjax.quantize(floats(32, 32), Ggml("q4_0"))
    w = floats(32, 32, seed=5)
    made = requantize(q, w)
    assert jax.tree.structure(made) == jax.tree.structure(q)
    assert norm(value(made) - w) < 0.15 * norm(w)


def test_a_trellis_is_encoded_with_its_signs(monkeypatch):
    fmt, asked = Trellis(2), []
    inner = TrellisTensor(np.zeros((1, 32), np.uint16), None, fmt, (16, 16))
    q = Incoherent(inner, np.ones(16, np.float32), None)

    def encode(w, fmt, method, name):
        asked.append((w.shape, fmt, method, name))
        return q

    monkeypatch.setattr("qjax.train.requantize.quantize", encode)
    assert isinstance(requantize(q, floats(16, 16), "k"), Incoherent)
    assert asked == [((16, 16), fmt, None, "k")]


def test_modes_that_are_refused(config):
    originals, base = originals_and_base(config, Int(4, 16))
    adapter = Adapter({LAYER: factors()}, r=4)

    def run(mode, first=None, ours=base):
        parts = base_parts(ours)
        return list(
            merge_parts(
                config, parts, adapter, mode, MergeReport(mode), originals=first
            )
        )

    with pytest.raises(SpecError, match="mode is 'best', expected one of original"):
        run("best")
    with pytest.raises(SpecError, match="'original' needs the original model"):
        run("original")
    with pytest.raises(SpecError, match="only it takes the original model"):
        run("dequantized", base_parts(originals))
    with pytest.raises(SpecError, match="of the original model is quantized"):
        run("original", base_parts(base))
    fewer = base_parts(originals)[:1] + base_parts(originals)[2:]
    with pytest.raises(SpecError, match="other weights than the base in layer 1"):
        run("original", fewer)
    changed = dataclasses.replace(adapter, trained_over="other")
    with pytest.raises(UnsupportedError, match="fits no other base"):
        list(attached(config, base_parts(base), changed))


def test_nothing_changed_has_no_relative_error(config):
    _, base = originals_and_base(config, Int(4, 16))
    own = dataclasses.replace(factors(), b=np.zeros((4, 32), np.float32))
    report = MergeReport("dequantized")
    list(
        merge_parts(
            config, base_parts(base), Adapter({LAYER: own}), "dequantized", report
        )
    )
    assert report.tensors[KERNEL].relative is None and report.relative is None

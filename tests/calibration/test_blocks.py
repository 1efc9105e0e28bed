"""Statistics of a decoder's layers, taken block by block while it is quantized."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibration import BlockStream, blocks, calibration_windows, capture
from qjax.errors import NonFiniteError, SpecError
from qjax.methods import GPTQ, RTN, Method, Statistics
from qjax.models import Decoder, ModelConfig, param_shapes
from qjax.parts import PartQuantizer
from qjax.recipes import Recipe, Rule, recipe_from_dict

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 40,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
)
SEEN: list[tuple[str, Statistics]] = []


@dataclasses.dataclass(frozen=True)
class Recorder(Method):
    """Rounds to nearest and keeps the statistics it was given."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "cross"})
    label: str = ""

    @property
    def name(self) -> str:
        return "recorder"

    def __call__(
        self, w, fmt, *, importance=None, key=None, statistics=None, shared=None
    ):
        found = self.check_statistics(statistics)
        jax.debug.callback(lambda s: SEEN.append((self.label, s)), found)
        return RTN()(w, fmt)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(3)
    return {
        path: (rng.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        for path, shape in param_shapes(CONFIG).items()
    }


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(4).integers(0, 40, (5, 12)).astype(np.int32)


def recipe(*paths: str) -> Recipe:
    fmt = qjax.Int(3, 8, symmetric=False)
    return Recipe(tuple(Rule(p, fmt, Recorder(label=p)) for p in paths))


def own_inputs(params: dict, tokens: np.ndarray, path: str) -> np.ndarray:
    """What enters a kernel, by running the whole decoder eagerly."""
    model = Decoder(CONFIG, params)
    where = model.positions(jnp.asarray(tokens))
    x = model.embed(jnp.asarray(tokens), where.queries)
    layer, _, name = path.removeprefix("layers.").partition(".")
    for i, block, numbers in model.blocks():
        (y, _), seen = capture(block, x, where, numbers)
        if i == int(layer):
            (found,) = [one.x for one in seen if one.path == name]
            return np.asarray(found, np.float64).reshape(-1, found.shape[-1])
        x = y
    raise AssertionError(path)


def test_statistics_are_those_of_the_model_quantized_so_far(params, tokens):
    SEEN.clear()
    names = ("attn.q", "attn.k", "attn.o", "mlp.gate", "mlp.down")
    paths = [f"layers.{i}.{n}.kernel" for i in range(2) for n in names]
    rules = recipe(*paths)
    parts = PartQuantizer(rules, CONFIG, tokens=tokens, batch=2)
    done: dict = {}
    for index, (layer, part) in enumerate(Decoder(CONFIG, params).parts()):
        done |= parts.part(layer, index == 0, part)
    jax.effects_barrier()
    found = dict(SEEN)
    assert set(found) == set(paths)
    order = ["attn.q", "attn.o", "mlp.gate", "mlp.down"]
    before: dict = dict(params)
    for layer in range(2):
        for name in order:
            path = f"layers.{layer}.{name}.kernel"
            x = own_inputs(before, tokens, path)
            r = own_inputs(params, tokens, path)
            s = found[path]
            assert float(s.count) == len(x) == 60
            near = {"rtol": 2e-5, "atol": 2e-3}
            np.testing.assert_allclose(s.hessian, x.T @ x, **near)
            np.testing.assert_allclose(s.cross, r.T @ x, **near)
            np.testing.assert_allclose(s.total, x.sum(0), **near)
            np.testing.assert_allclose(s.size, np.abs(x).sum(0), **near)
            np.testing.assert_allclose(s.square, (x**2).sum(0), **near)
            np.testing.assert_allclose(s.peak, np.abs(x).max(0), rtol=1e-4)
            both = {"attn.q": ("attn.q", "attn.k")}.get(name, (name,))
            for one in both:  # later layers see the errors of this one
                before[f"layers.{layer}.{one}.kernel"] = done[
                    f"layers.{layer}.{one}.kernel"
                ]
    same = found["layers.0.attn.k.kernel"], found["layers.0.attn.q.kernel"]
    np.testing.assert_array_equal(same[0].hessian, same[1].hessian)


def run(params, tokens, **options) -> dict[str, Statistics]:
    SEEN.clear()
    rules = recipe("layers.1.mlp.down.kernel")
    parts = PartQuantizer(rules, CONFIG, tokens=tokens, **options)
    for index, (layer, part) in enumerate(Decoder(CONFIG, params).parts()):
        parts.part(layer, index == 0, part)
    jax.effects_barrier()
    return dict(SEEN)["layers.1.mlp.down.kernel"]


def test_batches_devices_and_kept_inputs_do_not_change_the_sums(
    params, tokens, monkeypatch
):
    one = run(params, tokens, batch=5)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    others = [run(params, tokens, batch=3), run(params, tokens, batch=4, mesh=mesh)]
    monkeypatch.setattr(blocks, "KEPT", 0)
    others.append(run(params, tokens, batch=5))
    for other in others:
        assert float(other.count) == float(one.count)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4),
            one,
            other,
        )


def test_quantizing_twice_gives_the_same_bytes(params, tokens):
    def leaves():
        rules = recipe("layers.*.kernel")
        model = Decoder(CONFIG, params)
        return jax.tree.leaves(
            qjax.quantize_model(model, rules, calibration=tokens).params()
        )

    for a, b in zip(leaves(), leaves(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_report_gives_the_error_of_the_output(params, tokens):
    path = "layers.0.attn.q.kernel"
    model = qjax.quantize_model(
        Decoder(CONFIG, params), recipe(path), calibration=tokens
    )
    (entry,) = model.report.tensors
    x = own_inputs(params, tokens, path)
    w = params[path]
    y = x @ (w - np.asarray(model.params()[path].dequantize()))
    expected = np.linalg.norm(y) / np.linalg.norm(x @ w)
    assert entry["output_error"] == pytest.approx(expected, rel=1e-3)


def test_nan_activations_name_the_layer(params, tokens):
    broken = dict(params)
    broken["layers.0.mlp_norm.scale"] = params["layers.0.mlp_norm.scale"] * np.nan
    message = r"layers\.0\.mlp\.up\.kernel: its inputs on the calibration tokens"
    with pytest.raises(NonFiniteError, match=message):
        qjax.quantize_model(
            Decoder(CONFIG, broken),
            recipe("layers.0.mlp.up.kernel"),
            calibration=tokens,
            nonfinite="zero",
        )


def gptq(params, tokens, method, fmt=None) -> dict[str, Any]:
    """Report entries by path of a model all of whose kernels are calibrated."""
    rules = Recipe((Rule("*kernel", fmt or qjax.Int(3, 8), method),))
    model = qjax.quantize_model(Decoder(CONFIG, params), rules, calibration=tokens)
    return {entry["name"]: entry for entry in model.report.tensors}


def test_too_few_tokens_are_reported_and_not_fitted(params, tokens):
    found = gptq(params, tokens[:2, :10], GPTQ())  # 20 tokens, 16 and 24 inputs
    down = [found.pop(f"layers.{i}.mlp.down.kernel") for i in range(2)]
    for entry in down:
        why = "20 calibration tokens for 24 inputs; rtn-mse instead"
        assert (entry["fallback"], entry["method"]) == (why, "rtn-mse")
        assert 0 < entry["output_error"] < 1
    assert {e["method"] for e in found.values()} == {"gptq"}
    assert not any("fallback" in e for e in found.values())


def test_singular_hessians_are_recovered_and_reported(params):
    same = np.full((4, 12), 7, np.int32)  # one token over and over: rank one
    for entry in gptq(params, same, GPTQ(damp=1e-9)).values():
        assert 1 <= entry["damping_raised"] <= 8, entry["name"]
        assert entry["error"] < 0.5


def test_groups_that_do_not_divide_name_the_layer(params, tokens):
    message = r"layers\.0\.attn\..\.kernel: gptq-group-order: .* cross output columns"
    with pytest.raises(SpecError, match=message):
        gptq(params, tokens, GPTQ(act_order="group"), qjax.NF4(32))


def test_a_recipe_that_needs_calibration_says_so(params):
    with pytest.raises(SpecError, match=r"method recorder needs calibration; pass"):
        qjax.quantize_model(Decoder(CONFIG, params), recipe("*kernel"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(511, np.int32), r"511 tokens do not fill one window of 512"),
        (np.zeros((2, 3)), r"got float64 of shape \[2, 3\]; expected integer"),
        (np.array([[1, 40]]), r"token ids lie in 1\.\.40; expected 0\.\.39"),
        (np.zeros((0, 4), np.int32), r"no tokens in \[0, 4\] ids"),
        ("missing.txt", r"missing\.txt is a text; pass its token ids"),
    ],
)
def test_bad_calibration_tokens_are_refused(source, message):
    with pytest.raises(SpecError, match=message):
        calibration_windows(source, vocab_size=40)


def test_a_text_that_is_too_short_is_refused(tmp_path):
    class Letters:
        def encode(self, text, add_special_tokens):
            return [*map(ord, text)]

    (tmp_path / "text.txt").write_text("too short", "utf-8")
    with pytest.raises(SpecError, match="9 tokens do not fill one window of 512; give"):
        calibration_windows(tmp_path / "text.txt", Letters())


def test_windows_beyond_the_context_are_refused(params):
    with pytest.raises(SpecError, match="windows of 33 tokens exceed"):
        qjax.quantize_model(
            Decoder(CONFIG, params),
            recipe("*kernel"),
            calibration=np.zeros((2, 33), np.int32),
        )


def test_methods_inside_methods_survive_json():
    rule = Rule("*kernel", qjax.Int(4, 8), Outer())
    made = Recipe((rule,), "nested")
    assert recipe_from_dict(made.to_dict()) == made
    assert made.to_dict()["rules"][0]["method"]["inner"]["rule"] == "mse"


@dataclasses.dataclass(frozen=True)
class Outer(Recorder):
    inner: Method = dataclasses.field(default_factory=lambda: RTN("mse"))


def test_the_stream_keeps_groups_in_the_order_they_run(params, tokens):
    stream = BlockStream(CONFIG, tokens, jnp.float32)
    stream.embed(params, params)
    leaves = {
        p.removeprefix("layers.0."): w
        for p, w in params.items()
        if p.startswith("layers.0.")
    }
    assert stream.groups(0, leaves) == (
        ("attn.q.kernel", "attn.k.kernel", "attn.v.kernel"),
        ("attn.o.kernel",),
        ("mlp.up.kernel", "mlp.gate.kernel"),
        ("mlp.down.kernel",),
    )

"""Batched kernels of experts: statistics, fallbacks and codes, matrix by matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.calibration import calibrate, capture
from qjax.errors import NonFiniteError, SpecError
from qjax.formats import Int, KMeans, Trellis
from qjax.methods import (
    AWQ,
    GPTQ,
    RTN,
    LLMInt8,
    Lloyd,
    Statistics,
    TrellisLDLQ,
    quantize,
)
from qjax.nn import quantization_report, quantize_module

EXPERTS, DIM, CAPACITY = 4, 8, 24
FMT = Int(3, "channel", symmetric=False)
MANY, FEW, NEVER = 0, 1, 3  # experts by what is routed to them


class MoE(nnx.Module):
    """Tokens go to the expert that the router scores highest, up to a capacity."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.router = nnx.Linear(DIM, EXPERTS, use_bias=False, rngs=rngs)
        # The first two features alone decide.
        rules = np.zeros((DIM, EXPERTS), np.float32)
        rules[0] = 1, -1, 0, 0
        rules[1] = 0, 0, 2, -0.5
        self.router.kernel[...] = jnp.asarray(rules)
        shape = (EXPERTS, DIM, DIM)
        self.up = nnx.Einsum("ecd,edf->ecf", shape, rngs=rngs)
        self.gate = nnx.Einsum("ecd,edf->ecf", shape, rngs=rngs)
        self.down = nnx.Einsum("ecf,efd->ecd", shape, rngs=rngs)

    def dispatch(self, x):
        """One-hot `[token, expert, slot]`."""
        chosen = jax.nn.one_hot(jnp.argmax(self.router(x), -1), EXPERTS)
        place = (jnp.cumsum(chosen, 0) * chosen).sum(-1).astype(jnp.int32) - 1
        return chosen[:, :, None] * jax.nn.one_hot(place, CAPACITY)[:, None]

    def __call__(self, x):
        route = self.dispatch(x)
        packed = jnp.einsum("tec,td->ecd", route, x)
        y = self.down(nnx.silu(self.gate(packed)) * self.up(packed))
        return jnp.einsum("tec,ecd->td", route, y)


@pytest.fixture
def batches(rng):
    """One expert has 40 tokens, one 2, one 10, and one none."""
    x = rng.standard_normal((52, DIM)).astype(np.float32)
    first = np.repeat([2.0, -2.0, 0.5], [40, 2, 10])
    x[:, 0], x[:, 1] = first, np.where(first == 0.5, 2.0, -1.0)
    x = x[rng.permutation(52)]
    return [jnp.asarray(x[:26]), jnp.asarray(x[26:])]


@pytest.fixture
def moe():
    return MoE()


@pytest.fixture
def stats(moe, batches):
    return calibrate(moe, batches)


def recipe(method, fmt=FMT):
    return qjax.Recipe((qjax.Rule("router*", None), qjax.Rule("*kernel", fmt, method)))


def test_statistics_are_those_of_each_experts_tokens(moe, stats, batches):
    found = stats["up.kernel"]
    np.testing.assert_array_equal(found.count, [40, 2, 10, 0])
    assert stats["gate.kernel"] is found
    tokens = np.concatenate([np.asarray(b) for b in batches])
    chosen = np.asarray(jnp.argmax(moe.router(tokens), -1))
    for expert in range(EXPERTS):
        x = tokens[chosen == expert].astype(np.float64)
        np.testing.assert_allclose(found.hessian[expert], x.T @ x, rtol=1e-4, atol=1e-5)
        alone = Statistics.zeros(DIM).add(jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(found.part((expert,)).peak, alone.peak)
    assert stats["down.kernel"].hessian.shape == (EXPERTS, DIM, DIM)


def test_every_expert_has_the_codes_it_has_alone(moe, stats, batches, caplog):
    packed = quantize_module(moe, recipe(GPTQ()), freeze=True, statistics=stats)
    for name in ("up", "gate", "down"):
        kernel = getattr(moe, name).kernel.get_value()
        got = getattr(packed, name).kernel.get_value()
        assert got.shape == kernel.shape
        for expert in range(EXPERTS):
            own = stats[f"{name}.kernel"].part((expert,))
            method, given = GPTQ(), own
            if expert in (FEW, NEVER):
                method, given = RTN("mse"), None
            alone = quantize(kernel[expert], FMT, method, statistics=given)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True):
                np.testing.assert_array_equal(a[expert], b)
    report = {r.path: r for r in quantization_report(packed)}
    note = (
        "[1]: 2 calibration tokens for 8 inputs; rtn-mse instead; "
        "[3]: no calibration token reached it; rtn-mse instead"
    )
    assert report["up.kernel"].note == note
    assert report["up.kernel"].method == "gptq"
    assert "[1]: 2 calibration tokens for 8 inputs" in report["down.kernel"].note
    assert f"up.kernel: {note}" in caplog.text
    twin = nnx.clone(moe)
    for name in ("up", "gate", "down"):
        dense = getattr(packed, name).kernel.get_value().dequantize()
        getattr(twin, name).kernel[...] = dense
    np.testing.assert_allclose(packed(batches[0]), twin(batches[0]), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "fmt", "text"),
    [
        (AWQ(clip=False), FMT, "; awq with equal inputs instead"),
        (GPTQ(act_order=True, static_groups=False), Int(4, 4), " with equal inputs"),
        (Lloyd(feedback=True), KMeans(2), "; lloyd-feedback with equal inputs"),
        (AWQ(hessian=False, clip=False), FMT, "[3]: no calibration token"),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_fallbacks_take_the_layout_of_the_others(
    moe, stats, batches, method, fmt, text
):
    packed = quantize_module(moe, recipe(method, fmt), freeze=True, statistics=stats)
    note = next(r.note for r in quantization_report(packed) if r.path == "up.kernel")
    assert text in note
    assert ("[1]" in note) == ("hessian" in method.needs)  # sums need one token
    w = np.asarray(moe.up.kernel.get_value())
    miss = np.asarray(packed.up.kernel.get_value().dequantize()) - w
    assert np.linalg.norm(miss[NEVER]) < 0.5 * np.linalg.norm(w[NEVER])
    assert np.isfinite(packed(batches[0])).all()


def test_layouts_that_depend_on_values_are_refused(moe, stats):
    rules = recipe(LLMInt8(threshold=1.0), Int(8, "channel"))
    with pytest.raises(SpecError, match=r"\.kernel\[\d\]: llm-int8.* be stacked"):
        quantize_module(moe, rules, freeze=True, statistics=stats)


def test_a_trellis_does_without_tokens(rng):
    layer = nnx.Einsum("ecd,edf->ecf", (2, 16, 16), rngs=nnx.Rngs(0))
    x = np.zeros((2, 40, 16), np.float32)
    x[0] = rng.standard_normal((40, 16))
    stats = {"kernel": calibrate(layer, [jnp.asarray(x)])[".kernel"]}
    rules = qjax.Recipe((qjax.Rule("*", Trellis(3), TrellisLDLQ(around=4)),))
    packed = quantize_module(layer, rules, freeze=True, statistics=stats)
    assert packed.note == (
        "[1]: no calibration token reached it; trellis without them instead"
    )


def test_learned_tables_that_calibration_did_not_see():
    layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    rules = qjax.Recipe((qjax.Rule("*", KMeans(2), Lloyd(feedback=True)),))
    packed = quantize_module(layer, rules, freeze=True, statistics={})
    assert packed.note == (
        "no calibration token reached it; lloyd-feedback with equal inputs instead"
    )
    assert packed.kernel.get_value().format == KMeans(2)


def test_two_batch_axes(rng):
    class Net(nnx.Module):
        def __init__(self):
            self.mix = nnx.Einsum("thed,hedf->thef", (2, 3, 4, 5), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.mix(x)

    x = rng.standard_normal((7, 2, 3, 4)).astype(np.float32)
    x[3:, 1, 2] = 0
    net = Net()
    (one,) = capture(net, jnp.asarray(x))[1]
    assert one.x.shape == (2, 3, 7, 4) and one.batch == 2
    stats = calibrate(net, [jnp.asarray(x)])
    np.testing.assert_array_equal(stats["mix.kernel"].count, [[7, 7, 7], [7, 7, 3]])
    packed = quantize_module(net, recipe(GPTQ()), freeze=True, statistics=stats)
    assert packed.mix.note == (
        "[(1, 2)]: 3 calibration tokens for 4 inputs; rtn-mse instead"
    )
    assert packed.mix.kernel.get_value().shape == (2, 3, 4, 5)


def test_bad_experts_are_named(moe, stats):
    x = np.ones((EXPERTS, 3, DIM), np.float32)
    x[2, 1, 4] = np.inf
    with pytest.raises(NonFiniteError, match=r"kernel\[2\]: its inputs on the cal"):
        calibrate(moe, [jnp.asarray(x)], call=lambda m, x: m.up(x))
    swapped = {**stats, "up.kernel": Statistics.zeros(5)}
    with pytest.raises(SpecError, match=r"up\.kernel: its statistics are sums"):
        quantize_module(moe, recipe(GPTQ()), freeze=True, statistics=swapped)

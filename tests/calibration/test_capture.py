"""Inputs of the layers of any NNX module."""

import dataclasses
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.calibration import calibrate, capture
from qjax.errors import NonFiniteError, SpecError, UnsupportedError
from qjax.methods import GPTQ, RTN, Statistics
from qjax.parameter import quantize_parameter


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.twin = nnx.Linear(6, 8, rngs=rngs)
        self.heads = nnx.LinearGeneral((2, 4), 5, axis=(-2, -1), rngs=rngs)
        self.last = nnx.Einsum("btd,df->btf", (5, 3), rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.first(x)) * self.twin(x)
        return self.last(self.heads(h.reshape(*h.shape[:-1], 2, 4)))


@pytest.fixture
def batches(rng):
    return [
        jnp.asarray(rng.standard_normal((2, 3, 6)).astype(np.float32)) for _ in range(2)
    ]


def test_capture_gives_what_layers_multiply_and_changes_nothing(batches):
    net = Net()
    y, seen = capture(net, batches[0])
    np.testing.assert_array_equal(y, net(batches[0]))
    found = {one.path: one for one in seen}
    assert list(found) == [
        "first.kernel",
        "twin.kernel",
        "heads.kernel",
        "last.kernel",
    ]
    assert found["first.kernel"].source == found["twin.kernel"].source
    h = nnx.relu(net.first(batches[0])) * net.twin(batches[0])
    np.testing.assert_array_equal(found["heads.kernel"].x, h)
    kernel = net.heads.kernel.get_value().reshape(8, 5)
    bias = net.heads.bias.get_value()
    np.testing.assert_allclose(found["last.kernel"].x, h @ kernel + bias, rtol=1e-5)


def test_given_inputs_replace_what_was_computed(batches):
    net = Net()
    other = jnp.ones((2, 3, 5))
    y, _ = capture(net, batches[0], given={"last.kernel": other})
    np.testing.assert_array_equal(y, net.last(other))


def test_calibrate_sums_over_batches(batches):
    net = Net()
    stats = calibrate(net, batches)
    x = np.concatenate([np.asarray(b, np.float64).reshape(-1, 6) for b in batches])
    np.testing.assert_allclose(stats["first.kernel"].hessian, x.T @ x, rtol=1e-5)
    assert stats["twin.kernel"] is stats["first.kernel"]
    assert float(stats["last.kernel"].count) == 12
    light = calibrate(net, batches, needs={"square"})
    assert light["heads.kernel"].hessian is None
    np.testing.assert_allclose(
        light["heads.kernel"].square, jnp.diagonal(stats["heads.kernel"].hessian), 1e-5
    )


def test_bad_calibration_of_modules(batches):
    with pytest.raises(SpecError, match="no statistics were collected"):
        calibrate(Net(), [])
    with pytest.raises(SpecError, match=r"cannot collect \['cross'\]"):
        calibrate(Net(), batches, needs={"cross"})
    with pytest.raises(NonFiniteError, match=r"first\.kernel: its inputs"):
        calibrate(Net(), [batches[0] * jnp.nan])


class Scanned(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jax.lax.scan(lambda c, _: (self.layer(c), None), x, None, length=2)[0]


def test_layers_inside_a_scan_are_refused():
    with pytest.raises(UnsupportedError, match="runs inside a scan"):
        calibrate(Scanned(), [jnp.ones((2, 4))])


def test_statistics_add_up(rng):
    x = rng.standard_normal((10, 4)).astype(np.float32)
    zeros = qjax.methods.Statistics.zeros(4, hessian=True)
    whole = zeros.add(jnp.asarray(x))
    halves = zeros.add(jnp.asarray(x[:3])) + zeros.add(jnp.asarray(x[3:]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, halves
    )
    weight = jnp.asarray([1.0] * 3 + [0.0] * 7)
    masked = zeros.add(jnp.asarray(x), weight=weight)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        masked,
        zeros.add(jnp.asarray(x[:3])),
    )


def test_modules_are_quantized_with_statistics(batches, caplog):
    net = Net()
    stats = calibrate(net, batches)
    del stats["last.kernel"]
    rules = qjax.Recipe((qjax.Rule("*kernel", qjax.Int(3, "channel"), GPTQ()),))
    packed = qjax.nn.quantize_module(net, rules, freeze=True, statistics=stats)
    own = qjax.quantize(
        net.first.kernel.get_value(),
        qjax.Int(3, "channel"),
        GPTQ(),
        statistics=stats["first.kernel"],
    )
    np.testing.assert_array_equal(packed.first.kernel.get_value().codes, own.codes)
    note = "no calibration token reached it; rtn-mse instead"
    assert f"last.kernel: {note}" in caplog.text
    report = {r.path: r for r in qjax.nn.quantization_report(packed)}
    assert report["last.kernel"].note == note
    assert report["last.kernel"].method == "rtn-mse"
    assert report["first.kernel"].note == ""
    with pytest.raises(SpecError, match="statistics= need freeze=True"):
        qjax.nn.quantize_module(net, rules, statistics=stats)
    with pytest.raises(SpecError, match="needs statistics of the weight's inputs"):
        qjax.nn.quantize_module(net, rules, freeze=True)


@dataclasses.dataclass(frozen=True)
class Broken(RTN):
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    @property
    def name(self) -> str:
        return "broken"

    def __call__(self, w, fmt, **arrays):
        q = super().__call__(w, fmt)
        return jax.tree.map(
            lambda a: a if a.dtype == jnp.uint8 else jnp.full_like(a, jnp.nan), q
        )


def freeze(net, method, **changes):
    """Notes on a net frozen with statistics of which some are replaced."""
    rules = qjax.Recipe((qjax.Rule("*kernel", qjax.Int(3, "channel"), method),))
    stats = calibrate(net, [jnp.ones((8, 2, 6))]) | changes
    packed = qjax.nn.quantize_module(net, rules, freeze=True, statistics=stats)
    return {r.path: r.note for r in qjax.nn.quantization_report(packed)}


def test_bad_statistics_of_modules_are_reported(batches):
    few = Statistics.zeros(5, hessian=True).add(batches[0][0, :, :5])
    notes = freeze(Net(), GPTQ(damp=1e-9), **{"last.kernel": few})
    assert notes["last.kernel"] == (
        "3 calibration tokens for 5 inputs; rtn-mse instead"
    )
    assert re.fullmatch("damping of its Hessian raised . times", notes["first.kernel"])
    with pytest.raises(SpecError, match=r"sums \[batch, in\] of shape \[5\], but the"):
        freeze(Net(), GPTQ(), **{"first.kernel": few})
    full = few.add(jnp.full((3, 5), jnp.nan))
    with pytest.raises(NonFiniteError, match=r"kernel: the Hessian of the inputs has"):
        freeze(Net(), GPTQ(), **{"last.kernel": full})


def test_weights_that_a_method_made_nan_are_named():
    message = r"first\.kernel: broken gave weights that are NaN"
    with pytest.raises(NonFiniteError, match=message):
        freeze(Net(), Broken())
    rules = qjax.Recipe((qjax.Rule("*", qjax.Int(3, "channel"), Broken()),))
    full = Statistics.zeros(5, hessian=True).add(jnp.ones((6, 5)))
    with pytest.raises(NonFiniteError, match=message):
        quantize_parameter("first.kernel", jnp.ones((5, 3)), rules, statistics=full)


def test_inputs_that_are_read_another_way_are_not_shared():
    class Both(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.rows = nnx.Einsum("bij,jk->bik", (3, 2), rngs=rngs)
            self.columns = nnx.Einsum("bij,ik->bjk", (3, 2), rngs=rngs)

        def __call__(self, x):
            return self.rows(x) + self.columns(x)

    x = np.arange(18, dtype=np.float32).reshape(2, 3, 3)
    stats = calibrate(Both(), [jnp.asarray(x)])
    for name, rows in (("rows", x), ("columns", x.swapaxes(1, 2))):
        flat = rows.reshape(-1, 3)
        np.testing.assert_allclose(stats[f"{name}.kernel"].hessian, flat.T @ flat)

"""What every backend of products with 8-bit activations must do.

Subclass `A8Suite`, name the backend, and say in `prepared` and `config` what it wants.
Whatever `obstacle` names must be refused with that reason; everything else must be
within `reference.bound`.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.pallas_kernels.matmul_a8 import reference
from qjax.pallas_kernels.matmul_a8.api import matmul_a8
from qjax.pallas_kernels.weights import KernelError, Weight, WeightSpec

INT, FP8 = "int8", "float8_e4m3fn"
FORMATS = {
    "w8": ({"bits": 8, "offset": 128.0}, INT),
    "w8-signed": ({"bits": 8, "signed": True, "scale": "float32"}, INT),
    "w8-g128-asymmetric": ({"bits": 8, "group": 128, "zero": "float32"}, INT),
    "w4": ({"bits": 4, "offset": 8.0}, INT),
    "w4-g128": ({"bits": 4, "group": 128, "offset": 8.0}, INT),
    "w4-g256-f16": ({"bits": 4, "group": 256, "offset": 8.0, "scale": "float16"}, INT),
    "w4-g64": ({"bits": 4, "group": 64, "offset": 8.0}, INT),
    "w4-g32-asymmetric": ({"bits": 4, "group": 32, "zero": "uint8"}, INT),
    "w2-g64": ({"bits": 2, "group": 64, "offset": 2.0}, INT),
    "w4-fp8-g128": ({"bits": 4, "group": 128, "offset": 8.0}, FP8),
    "w4-fp8-asymmetric": ({"bits": 4, "group": 64, "zero": "bfloat16"}, FP8),
    "fp8": ({"kind": "e4m3", "bits": 8}, FP8),
    "fp8-g128": ({"kind": "e4m3", "bits": 8, "group": 128, "scale": "float32"}, FP8),
}
"""Options of `random_weight` and the activation type; no group: one per column."""

REPRESENTATIVE = ("w8", "w4-g128", "w4-fp8-g128", "fp8")


def random_weight(name, k, n, seed=0, layers=None):
    """Random arrays of a format of `FORMATS`."""
    options = FORMATS[name][0]
    rng = np.random.default_rng(seed)
    bits, kind = options["bits"], options.get("kind", "int")
    spec = WeightSpec(
        k, n, kind, bits, options.get("group", k), options.get("offset", 0.0)
    )
    lead = () if layers is None else (layers,)
    codes = rng.integers(0, 256, (*lead, spec.packed_k, n), np.uint8)
    if kind == "e4m3":  # every finite number
        codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)
        codes = codes.view(jnp.dtype(FP8))
    elif options.get("signed"):
        codes = codes.view(np.int8)
    shape = (*lead, spec.groups, n)
    scale = rng.uniform(0.01, 0.1, shape).astype(options.get("scale", "bfloat16"))
    zero = options.get("zero")
    if zero is not None:
        zero = rng.uniform(0, 2**bits - 1, shape).astype(jnp.dtype(zero))
    arrays = (codes, scale, zero, None)
    return Weight(*(None if a is None else jnp.asarray(a) for a in arrays)), spec


def rows(m, k, dtype="float32", seed=1):
    """Random activations, one row of zeros among them."""
    x = np.random.default_rng(seed).normal(size=(m, k)).astype(np.float32)
    x[m // 2] = 0
    return jnp.asarray(x, dtype)


class A8Suite:
    """Cases; subclasses are collected, this class is not (its name has no "Test")."""

    backend: ClassVar[str]
    representative: ClassVar[tuple[str, ...]] = REPRESENTATIVE
    shapes: ClassVar[tuple[tuple[int, int, int], ...]] = (
        (1, 256, 128),
        (17, 384, 200),
        (70, 512, 130),
    )
    unit: ClassVar[float] = 2.0**-24

    def interpret(self):
        """What to pass as `interpret`."""
        return False

    def config(self, m, spec, activation, out, w):
        """What to pass as `config`."""
        del m, spec, activation, out, w

    def prepared(self, weight, spec):
        """The weight in the layout that the backend wants."""
        return weight, spec

    def obstacle(self, spec, m, dtype, activation):
        """The backend's own word on what it cannot do."""
        del spec, m, dtype, activation

    def run(self, x, weight, spec, *, activation, **options):
        """The backend's result."""
        weight, spec = self.prepared(weight, spec)
        out = options.get("out_dtype") or x.dtype
        return matmul_a8(
            x,
            weight,
            spec,
            activation=activation,
            backend=self.backend,
            interpret=self.interpret(),
            config=self.config(x.shape[0], spec, activation, out, weight),
            **options,
        )

    def check(self, name, m, k, n, dtype="float32", **options):
        """One product within the bound, or refused with the reason."""
        layers, seed = options.pop("layers", None), options.pop("seed", 0)
        weight, spec = random_weight(name, k, n, seed, layers)
        activation = FORMATS[name][1]
        x = rows(m, k, dtype, seed + 1)
        layer = None if layers is None else jnp.int32(layers - 1)
        if options.pop("bias", False):
            options["bias"] = rows(2, n, dtype, seed + 2)[0]
        ready = self.prepared(weight, spec)[1]
        reason = self.obstacle(ready, m, x.dtype, activation)
        if reason is not None:
            with pytest.raises(KernelError, match="cannot multiply"):
                self.run(x, weight, spec, activation=activation, layer=layer, **options)
            return reason
        y = self.run(x, weight, spec, activation=activation, layer=layer, **options)
        self.within(y, x, weight, spec, activation, layer, **options)
        return None

    def within(self, y, x, weight, spec, activation, layer=None, **options):
        """Fails where `y` is further from the definition than the bound."""
        one = reference.pick(weight, layer)
        out = jnp.dtype(options.pop("out_dtype", None) or x.dtype)
        assert y.dtype == out
        exact = reference.matmul_a8(
            x, one, spec, activation=activation, **options, out_dtype="float32"
        )
        bound = reference.bound(
            x, one, spec, activation=activation, out=out, unit=self.unit, **options
        )
        wanted, got = np.asarray(exact), np.asarray(y.astype(jnp.float32))
        assert got.shape == wanted.shape
        assert np.isfinite(got).all()
        excess = np.abs(got - wanted) - np.asarray(bound)
        assert (excess <= 1e-30).all(), (spec, x.shape, excess.max())

    @pytest.mark.parametrize("name", FORMATS)
    def test_formats(self, name):
        self.check(name, 9, 512, 256)

    @pytest.mark.parametrize("index", range(3))
    def test_shapes(self, index):
        for name in self.representative[:3]:
            self.check(name, *self.shapes[index])

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_dtypes(self, dtype):
        self.check(self.representative[0], 6, 256, 128, dtype, bias=True)
        self.check(self.representative[1], 6, 256, 128, dtype, out_dtype="float32")

    def test_layers(self):
        for name in self.representative[1:3]:
            self.check(name, 5, 256, 128, layers=3, bias=True)

    @pytest.mark.parametrize("index", [0, 1])
    def test_static_scales(self, index):
        name = self.representative[index]
        weight, spec = random_weight(name, 256, 128)
        activation, x = FORMATS[name][1], rows(6, 256)
        for scale in (0.02, np.linspace(0.01, 0.05, 6, dtype=np.float32)):
            scale = jnp.asarray(scale, jnp.float32)
            y = self.run(x, weight, spec, activation=activation, x_scale=scale)
            self.within(y, x, weight, spec, activation, x_scale=scale)
            codes, s = reference.quantize_activations(x, activation, scale)
            again = self.run(codes, weight, spec, activation=activation, x_scale=s,
                             out_dtype="float32")  # fmt: skip
            self.within(again, codes, weight, spec, activation, x_scale=s,
                        out_dtype="float32")  # fmt: skip

    @pytest.mark.parametrize("out", [INT, FP8])
    def test_quantized_results(self, out):
        name = self.representative[0]
        weight, spec = random_weight(name, 256, 128)
        activation, x = FORMATS[name][1], rows(6, 256)
        scale = jnp.float32(2.0)
        y = self.run(
            x, weight, spec, activation=activation, out_dtype=out, out_scale=scale
        )
        assert y.dtype == jnp.dtype(out)
        exact = reference.matmul_a8(x, weight, spec, activation=activation) / scale
        top = reference.TOP[out]
        exact = np.clip(np.asarray(exact), -top, top)
        step = 1.0 if out == INT else 2.0**-3 * np.abs(exact) + 2.0**-9
        far = np.abs(np.asarray(y.astype(jnp.float32)) - exact)
        assert (far <= 0.5 * step + 1e-3 * np.abs(exact) + 1e-3).all()
        assert np.unique(far).size > 10

    @settings(
        max_examples=4,  # each takes seconds under an interpreter
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(data=st.data())
    def test_any_shape(self, data):
        m = data.draw(st.integers(1, 40), "m")
        k = data.draw(st.sampled_from([128, 256, 384, 640]), "k")
        n = data.draw(st.integers(1, 300), "n")
        name = data.draw(st.sampled_from(self.representative), "format")
        self.check(name, m, k, n, seed=data.draw(st.integers(0, 99), "seed"))

    def test_one_column(self):
        # Also where columns are shared out to two cores.
        self.check(self.representative[0], 17, 128, 1)

    def test_no_rows(self):
        weight, spec = random_weight("w8", 256, 128)
        y = self.run(jnp.zeros((0, 256)), weight, spec, activation=INT)
        assert y.shape == (0, 128)


def error(backend, **changed):
    """The message of a call with one argument wrong."""
    weight, spec = random_weight("w4-g128", 256, 128)
    arguments = {"x": rows(4, 256), "weight": weight, "spec": spec} | changed
    with pytest.raises(KernelError) as caught:
        jax.eval_shape(lambda: matmul_a8(**arguments, backend=backend))
    return str(caught.value)

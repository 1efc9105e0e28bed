"""What every backend of the weight-only product must do.

Subclass `MatmulSuite`, name the backend, and list in `refused` the formats it does not
do: those must be refused with a reason, everything else must be within the bound of
`reference.exact`. `shapes` may be replaced where a backend needs larger tiles.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.pallas_kernels.matmul import reference
from qjax.pallas_kernels.matmul.api import quantized_matmul
from qjax.pallas_kernels.weights import KernelError, Weight, WeightSpec

NF4 = np.array(
    "-1 -.6961928 -.52507305 -.3949175 -.28444138 -.18477343 -.09105004 0 .0795803 "
    ".1609302 .2461123 .33791524 .44070983 .562617 .72295684 1".split(),
    np.float32,
)

FORMATS = {
    "int8": {"bits": 8, "signed": True},
    "int8-asym": {"bits": 8, "zero": "float32"},
    "int7-g32": {"bits": 7, "group": 32, "offset": 64.0},
    "int6-g64": {"bits": 6, "group": 64, "offset": 32.0},
    "int5-g64-asym": {"bits": 5, "group": 64, "zero": "uint8"},
    "int4": {"bits": 4, "offset": 8.0},
    "int4-g128": {"bits": 4, "group": 128, "offset": 8.0, "scale": "bfloat16"},
    "int4-g64-f16": {"bits": 4, "group": 64, "offset": 8.0, "scale": "float16"},
    "int4-g32-asym": {"bits": 4, "group": 32, "zero": "uint8"},
    "int4-g96-asym": {"bits": 4, "group": 96, "zero": "bfloat16"},
    "int3-g64": {"bits": 3, "group": 64, "offset": 4.0},
    "int3-g32-asym": {"bits": 3, "group": 32, "zero": "float32", "scale": "bfloat16"},
    "int2-g64-asym": {"bits": 2, "group": 64, "zero": "uint8"},
    "int2-g256": {"bits": 2, "group": 256, "offset": 2.0},
    "int1-g128": {"bits": 1, "group": 128, "offset": 0.5},
    "ternary": {"bits": 2, "offset": 1.0, "scale": "bfloat16"},
    "nf4-g64": {"kind": "table", "bits": 4, "group": 64},
    "table3-g32": {"kind": "table", "bits": 3, "group": 32},
    "fp8-e4m3": {"kind": "e4m3", "bits": 8},
    "fp8-e4m3-g128": {"kind": "e4m3", "bits": 8, "group": 128, "scale": "bfloat16"},
    "fp8-e5m2": {"kind": "e5m2", "bits": 8},
    "mxfp8": {"kind": "e4m3", "bits": 8, "group": 32, "scale": "uint8"},
    "mxfp4": {"kind": "e2m1", "bits": 4, "group": 32, "scale": "uint8"},
    "nvfp4": {"kind": "e2m1", "bits": 4, "group": 16, "scale": "float8_e4m3fn"},
}
"""Options of `random_weight` by name; no group means one scale per column."""

REPRESENTATIVE = ("int8", "int4-g128", "int4-g32-asym", "nf4-g64")
"""Formats for the cases that are about something else than formats."""


def random_weight(
    name: str, k: int, n: int, seed: int = 0, layers: int | None = None
) -> tuple[Weight, WeightSpec]:
    """Random arrays of a format of `FORMATS`."""
    options = FORMATS[name]
    rng = np.random.default_rng(seed)
    kind, bits = options.get("kind", "int"), options["bits"]
    group = options.get("group", k)
    spec = WeightSpec(k, n, kind, bits, group, options.get("offset", 0.0))
    lead = () if layers is None else (layers,)
    codes = rng.integers(0, 256, (*lead, spec.packed_k, n), np.uint8)
    if kind in ("e4m3", "e5m2"):  # every finite code, zeros of both signs included
        codes = np.where(codes & 0x7F < 0x7B, codes, 0x80).astype(np.uint8)
        names = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
        codes = codes.view(jnp.dtype(names[kind]))
    elif options.get("signed"):
        codes = codes.view(np.int8)
    shape = (*lead, spec.groups, n)
    stored = options.get("scale", "float32")
    if stored == "uint8":
        scale = rng.integers(120, 131, shape, np.uint8)
    else:
        sign = rng.choice([-1.0, 1.0], shape)  # a scale may be negative
        scale = (sign * rng.uniform(0.01, 1.0, shape)).astype(jnp.dtype(stored))
    zero = options.get("zero")
    if zero is not None:
        zero = rng.uniform(0, 2**bits - 1, shape).astype(jnp.dtype(zero))
    table = None
    if kind == "table":
        table = NF4 if bits == 4 else rng.normal(size=2**bits).astype(np.float32)
        table = np.broadcast_to(table, (*lead, 2**bits))
        if layers:
            table = table * rng.uniform(0.5, 2, (layers, 1)).astype(np.float32)
    arrays = (codes, scale, zero, table)
    return Weight(*(None if a is None else jnp.asarray(a) for a in arrays)), spec


def rows(m: int, k: int, dtype: str, seed: int = 1) -> jax.Array:
    """Random activations."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(m, k)), dtype)


class FormatSuite:
    """Every format once; subclasses are collected, this class is not."""

    backend: ClassVar[str]
    refused: ClassVar[tuple[str, ...]] = ()
    shapes: ClassVar[tuple[tuple[int, int, int], ...]] = (
        (1, 256, 128),
        (16, 512, 256),
        (5, 384, 200),
        (33, 256, 130),
        (70, 512, 128),
    )
    largest: ClassVar[tuple[int, int, int]] = (80, 640, 300)

    def interpret(self):
        """What to pass as `interpret`."""
        return False

    def config(self, m: int, spec: WeightSpec, transpose: bool):
        """What to pass as `config`: small tiles, to see more than one."""
        del m, spec, transpose

    def prepared(self, weight: Weight, spec: WeightSpec) -> tuple[Weight, WeightSpec]:
        """The weight in the layout that the backend wants."""
        return weight, spec

    def run(self, x, weight, spec, *, transpose=False, **options):
        """The backend's result."""
        config = self.config(x.shape[0], spec, transpose)
        weight, spec = self.prepared(weight, spec)
        return quantized_matmul(
            x,
            weight,
            spec,
            transpose=transpose,
            backend=self.backend,
            interpret=self.interpret(),
            config=config,
            **options,
        )

    def check(self, name, m, k, n, dtype="bfloat16", **options):
        """One product within the bound; the checked result."""
        layers = options.pop("layers", None)
        seed, transpose = options.pop("seed", 0), options.get("transpose", False)
        weight, spec = random_weight(name, k, n, seed, layers)
        x = rows(m, n if transpose else k, dtype, seed + 1)
        if options.pop("bias", False):
            options["bias"] = rows(1, k if transpose else n, dtype, seed + 2)[0]
        if layers is not None:
            options["layer"] = jnp.int32(layers - 1)
        y = self.run(x, weight, spec, **options)
        out = options.pop("out_dtype", None) or dtype
        assert y.dtype == jnp.dtype(out)
        wanted, bound = reference.exact(x, weight, spec, **options)
        got = np.asarray(y.astype(jnp.float32), np.float64)
        assert got.shape == wanted.shape
        assert np.isfinite(got).all()
        excess = np.abs(got - wanted) / reference.tolerance(wanted, bound, out)
        assert excess.max() <= 1, (name, m, k, n, dtype, options, excess.max())
        return y

    def check_format(self, name, transpose, m=16):
        """One format, or its refusal."""
        k = {96: 192, 256: 512}.get(FORMATS[name].get("group", 0), 256)
        if name in self.refused:
            with pytest.raises(KernelError, match="cannot multiply"):
                self.check(name, m, k, 128, transpose=transpose)
        else:
            self.check(name, m, k, 128, transpose=transpose)

    @pytest.mark.parametrize("transpose", [False, True], ids=["", "transpose"])
    @pytest.mark.parametrize("name", FORMATS)
    def test_formats(self, name, transpose):
        self.check_format(name, transpose)


class MatmulSuite(FormatSuite):
    """All cases."""

    @pytest.mark.parametrize("name", REPRESENTATIVE)
    def test_shapes(self, name):
        for m, k, n in self.shapes:
            self.check(name, m, k, n)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("name", ["int4-g32-asym", "nf4-g64"])
    def test_dtypes(self, name, dtype):
        self.check(name, 8, 256, 128, dtype)
        self.check(name, 8, 256, 128, dtype, out_dtype="float32")
        self.check(name, 40, 256, 128, dtype, transpose=True)

    @pytest.mark.parametrize("m", [3, 48])
    @pytest.mark.parametrize("name", REPRESENTATIVE)
    def test_bias(self, name, m):
        self.check(name, m, 256, 128, bias=True)
        self.check(name, m, 256, 128, bias=True, transpose=True)

    @pytest.mark.parametrize("m", [4, 40])
    @pytest.mark.parametrize("name", REPRESENTATIVE)
    def test_layers(self, name, m):
        self.check(name, m, 256, 128, layers=3, bias=True)
        self.check(name, m, 256, 128, layers=2, transpose=True)

    def test_layers_in_a_scan(self):
        weight, spec = random_weight("int4-g128", 256, 128, layers=3)
        x = rows(4, 256, "float32")

        def step(_, layer):
            return None, self.run(x, weight, spec, layer=layer)

        _, ys = jax.lax.scan(step, None, jnp.arange(3, dtype=jnp.int32))
        for layer in range(3):
            wanted, bound = reference.exact(x, weight, spec, layer=layer)
            limit = reference.tolerance(wanted, bound, "float32")
            assert (np.abs(np.asarray(ys[layer]) - wanted) <= limit).all()

    def test_under_jit(self):
        weight, spec = random_weight("int4-g128", 256, 128)
        x = rows(8, 256, "float32")
        y = jax.jit(lambda x, w: self.run(x, w, spec))(x, weight)
        wanted, bound = reference.exact(x, weight, spec)
        limit = reference.tolerance(wanted, bound, "float32")
        assert (np.abs(np.asarray(y) - wanted) <= limit).all()

    @pytest.mark.parametrize("name", ["int4-g128", "fp8-e4m3"])
    def test_nonfinite_rows_stay_in_their_rows(self, name):
        weight, spec = random_weight(name, 256, 128)
        x = rows(5, 256, "float32").at[2, 7].set(jnp.nan)
        y = np.asarray(self.run(x, weight, spec))
        assert np.isnan(y[2]).all()
        assert np.isfinite(y[[0, 1, 3, 4]]).all()

    @given(data=st.data())
    @settings(
        max_examples=8,
        deadline=None,
        suppress_health_check=[
            HealthCheck.differing_executors,
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],
    )
    def test_any_shape(self, data):
        m_max, k_max, n_max = self.largest
        name = data.draw(st.sampled_from([f for f in FORMATS if f not in self.refused]))
        m = data.draw(st.integers(1, m_max))
        k = data.draw(st.integers(1, k_max))
        n = data.draw(st.integers(1, n_max))
        transpose = data.draw(st.booleans())
        dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
        seed = data.draw(st.integers(0, 2**16))
        bias = data.draw(st.booleans())
        try:
            self.check(name, m, k, n, dtype, transpose=transpose, seed=seed, bias=bias)
        except KernelError as error:  # a reason, never a wrong result
            assert "cannot multiply" in str(error), error

    def test_nothing_to_multiply(self):
        weight, spec = random_weight("int4-g128", 256, 128)
        y = self.run(jnp.zeros((0, 256), jnp.bfloat16), weight, spec)
        assert y.shape == (0, 128)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": jnp.zeros((4, 250))}, "x has shape"),
            ({"x": jnp.zeros((4, 2, 256))}, "x has shape"),
            ({"x": jnp.zeros((4, 256), jnp.int8)}, "x has dtype"),
            ({"codes": jnp.zeros((100, 128), jnp.uint8)}, "codes has shape"),
            ({"codes": jnp.zeros((128, 128), jnp.int32)}, "codes have dtype"),
            ({"scale": jnp.zeros((3, 128))}, "scale has shape"),
            ({"scale": jnp.zeros((2, 128), jnp.int32)}, "scale has dtype"),
            ({"zero": jnp.zeros((2, 100))}, "zero has shape"),
            ({"zero": jnp.zeros((2, 128), jnp.int32)}, "zero has dtype"),
            ({"bias": jnp.zeros((100,))}, "bias has shape"),
            ({"bias": jnp.zeros((128,), jnp.int32)}, "bias has dtype"),
            ({"layer": jnp.int32(0)}, "layer is given"),
            ({"out_dtype": jnp.int8}, "out_dtype is"),
            ({"transpose": True}, "x has shape"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
    )
    def test_bad_input(self, change, message):
        weight, spec = random_weight("int4-g128", 256, 128)
        x = change.get("x", rows(4, 256, "bfloat16"))
        arrays = {key: change[key] for key in change if key in Weight._fields}
        options = {key: change[key] for key in change if key not in {*arrays, "x"}}
        with pytest.raises(KernelError, match=message) as caught:
            quantized_matmul(
                x, weight._replace(**arrays), spec, backend=self.backend, **options
            )
        assert "\n" not in str(caught.value)

    def test_a_stack_needs_its_layer(self):
        weight, spec = random_weight("int4-g128", 256, 128, layers=2)
        x = rows(4, 256, "bfloat16")
        for layer in (None, jnp.zeros((2,), jnp.int32), 0.5):
            with pytest.raises(KernelError, match="layer is"):
                quantized_matmul(x, weight, spec, layer=layer, backend=self.backend)

"""What every encoder must do.

Subclass `EncodeSuite`, name the backend and the formats it is run with: all, or, where
runs are slow, those that take different paths. Codes and scales must equal those of the
reference bit for bit.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import FP4, NF4
from qjax.pallas_kernels.quantize.api import encode
from qjax.pallas_kernels.weights import KernelError, Weight, WeightSpec

TABLES = {"nf4": NF4().table, "fp4": FP4().table}


def make_spec(kind: str, bits: int, group: int, k: int, n: int) -> WeightSpec:
    """A symmetric spec; group 0 is one scale per column; tables by name."""
    half = 0.5 if bits == 1 else float(2 ** (bits - 1))
    offset = {8: 0.0}.get(bits, half) if kind == "int" else 0.0
    kind = "table" if kind in TABLES else kind
    return WeightSpec(k, n, kind, bits, group or k, offset)


def random_weight(shape, dtype=jnp.float32, seed=0) -> Any:
    """Normal numbers with a column of zeros, ties, and numbers of all sizes."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(np.float32)
    w[..., 0] = 0.0
    if shape[-1] > 2:
        w[..., 1] = np.round(w[..., 1] * 2) / 2
        w[..., 2] *= np.exp(rng.uniform(-20, 20, shape[:-1]))
    return jnp.asarray(w, dtype)


FORMATS = {
    f"{kind}{bits}-g{group}": (kind, bits, group)
    for kind, bits, group in (
        *(("int", bits, 64) for bits in (1, 3, 5, 6, 7)),
        ("int", 2, 32),
        ("int", 4, 128),
        ("int", 4, 0),
        ("int", 8, 32),
        ("int", 8, 0),
        ("nf4", 4, 64),
        ("nf4", 4, 0),
        ("fp4", 4, 32),
        ("e2m1", 4, 32),
        ("e4m3", 8, 128),
        ("e4m3", 8, 0),
        ("e5m2", 8, 64),
    )
}


class EncodeSuite:
    """The cases; `backend` and `interpret` are the subclass's."""

    backend: ClassVar[str]
    interpret: ClassVar[Any] = False
    formats: ClassVar[tuple[str, ...]] = tuple(FORMATS)

    def encode(self, w, spec, **options) -> Weight:
        if self.backend == "xla":
            return jax.jit(lambda w: encode(w, spec, **options))(w)
        return encode(
            w, spec, backend=self.backend, interpret=self.interpret, **options
        )

    def check(self, w, name, spec, **options):
        """Equal to the reference, bit for bit."""
        if name in TABLES:
            options["table"] = TABLES[name]
        got = self.encode(w, spec, **options)

        def reference(w):
            return encode(w, spec, backend="reference", **options)

        want = jax.jit(reference)(w)
        assert got.codes.dtype == want.codes.dtype
        assert got.codes.shape == (*w.shape[:-2], spec.packed_k, spec.n)
        equal_bytes(got, want)

    def test_equals_the_reference(self, name):
        """`name` goes through `formats`: see `pytest_generate_tests`."""
        kind, bits, group = FORMATS[name]
        spec = make_spec(kind, bits, group, 256, 130)
        self.check(random_weight((256, 130)), kind, spec)

    def test_bfloat16_and_stacks(self):
        spec = make_spec("int", 4, 64, 128, 130)
        self.check(random_weight((2, 128, 130), jnp.bfloat16), "int", spec)

    @pytest.mark.parametrize("kind,bits,group", [("int", 4, 64), ("e4m3", 8, 0)])
    def test_given_scales(self, kind, bits, group):
        spec = make_spec(kind, bits, group, 128, 130)
        scale = np.random.default_rng(1).uniform(0.01, 1, (spec.groups, 130))
        scale = jnp.asarray(scale, jnp.float32)
        self.check(random_weight((128, 130)), kind, spec, scale=scale)

    def test_columns_share_scales(self):
        spec = make_spec("e4m3", 8, 64, 128, 130)
        self.check(random_weight((128, 130)), "e4m3", spec, across=40)

    def test_non_finite_weights_are_zeros(self):
        spec = make_spec("int", 4, 64, 128, 130)
        w = random_weight((128, 130)).at[3, 4].set(jnp.nan).at[70, 5].set(-jnp.inf)
        clean = w.at[3, 4].set(0.0).at[70, 5].set(0.0)
        got, want = self.encode(w, spec), self.encode(clean, spec)
        np.testing.assert_array_equal(np.asarray(got.codes), np.asarray(want.codes))
        np.testing.assert_array_equal(np.asarray(got.scale), np.asarray(want.scale))


def equal_bytes(got, want) -> None:
    """Trees of the same arrays, bit for bit."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def refusal(w, spec, **options) -> str:
    """The message of the error that a call raises."""
    with pytest.raises(KernelError) as error:
        encode(w, spec, **options)
    return str(error.value)

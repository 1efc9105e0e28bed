"""What every backend of the grouped product must do.

Subclass `GroupedSuite`, name the backend, and list in `refused` the formats it does not
do: those must be refused with a reason, everything else must be within the bounds of
`reference`.
"""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.pallas_kernels.grouped_matmul import reference
from qjax.pallas_kernels.grouped_matmul.api import grouped_gate_up, grouped_matmul
from qjax.pallas_kernels.matmul.reference import tolerance
from qjax.pallas_kernels.weights import KernelError

from ..matmul.suite import FORMATS, random_weight, rows

EXPERTS = 4
SIZES = (5, 0, 17, 9)


def int32(values):
    return jnp.asarray(values, jnp.int32)


class GroupedSuite:
    """Cases; subclasses are collected, this class is not (its name has no "Test")."""

    backend: ClassVar[str]
    refused: ClassVar[tuple[str, ...]] = ()
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    shape: ClassVar[tuple[int, int]] = (256, 200)

    def interpret(self):
        """What to pass as `interpret`."""
        return False

    def config(self, m, spec, transpose, weights):
        """What to pass as `config`: small tiles, to see more than one."""
        del m, spec, transpose, weights

    def prepared(self, weight, spec):
        """The weight in the layout that the backend wants."""
        return weight, spec

    def run(self, x, sizes, weight, spec, *, transpose=False, **options):
        """The backend's result."""
        config = options.pop("config", None)
        config = config or self.config(x.shape[0], spec, transpose, 1)
        weight, spec = self.prepared(weight, spec)
        return grouped_matmul(
            x,
            int32(sizes),
            weight,
            spec,
            transpose=transpose,
            backend=self.backend,
            interpret=self.interpret(),
            config=config,
            **options,
        )

    def check(self, name, sizes, behind=3, dtype="bfloat16", shape=None, **options):
        """One product within the bound."""
        k, n = shape or self.shape
        seed, transpose = options.pop("seed", 0), options.get("transpose", False)
        experts, m = len(sizes), sum(sizes) + behind
        stack = options.pop("stack", experts)
        weight, spec = random_weight(name, k, n, seed, stack)
        x = rows(m, n if transpose else k, dtype, seed + 1)
        if options.pop("bias", False):
            options["bias"] = rows(experts, k if transpose else n, dtype, seed + 2)
        y = self.run(x, sizes, weight, spec, **options)
        first = options.get("first")
        if first is not None:
            at = slice(int(first), int(first) + experts)
            weight = type(weight)(*(None if a is None else a[at] for a in weight))
        want, bound = reference.exact(
            x, sizes, weight, spec, bias=options.get("bias"), transpose=transpose
        )
        out = options.get("out_dtype") or dtype
        assert y.shape == want.shape and y.dtype == jnp.dtype(out)
        error = np.abs(np.asarray(y.astype(jnp.float32), np.float64) - want)
        excess = error / np.maximum(tolerance(want, bound, out), 1e-30)
        assert np.all(excess <= 1), f"{np.nanmax(excess)} of the bound"
        assert not np.any(np.asarray(y.astype(jnp.float32))[sum(sizes) :])

    @pytest.mark.parametrize("name", FORMATS)
    def test_formats(self, name):
        if name in self.refused:
            with pytest.raises(KernelError, match="cannot multiply"):
                self.check(name, SIZES)
        else:
            self.check(name, SIZES)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("transpose", [False, True])
    def test_dtypes(self, dtype, transpose):
        if dtype in self.dtypes:
            self.check("int4-g128", SIZES, dtype=dtype, transpose=transpose)
        else:
            with pytest.raises(KernelError, match="cannot multiply"):
                self.check("int4-g128", SIZES, dtype=dtype, transpose=transpose)

    @pytest.mark.parametrize(
        "sizes",
        [(0, 0, 0, 0), (40, 0, 0, 0), (0, 0, 0, 33), (16, 16, 0, 16), (1, 1, 1, 1)],
    )
    def test_groups(self, sizes):
        self.check("int4-g128", sizes, behind=21 if sum(sizes) % 16 else 0)

    def test_bias_and_result_dtype(self):
        self.check("int4-g128", SIZES, bias=True, out_dtype="float32")

    def test_experts_of_one_layer(self):
        self.check("nf4-g64", SIZES, stack=3 * EXPERTS, first=int32(EXPERTS))

    def test_sizes_beyond_the_rows_are_cut(self):
        weight, spec = random_weight("int4-g128", *self.shape, 0, 3)
        x = rows(6, spec.k, "bfloat16")
        y = self.run(x, (4, 4, 4), weight, spec).astype(jnp.float32)
        want, bound = reference.exact(x, (4, 2, 0), weight, spec)
        limit = tolerance(want, bound, "bfloat16")
        assert np.all(np.abs(np.asarray(y, np.float64) - want) <= limit)

    @pytest.mark.parametrize("activation", reference.ACTIVATIONS)
    def test_gate_and_up(self, activation):
        self.check_gate_up("int4-g128", SIZES, activation)

    def check_gate_up(self, name, sizes, activation, dtype="bfloat16"):
        (gate, spec), (up, _) = (
            random_weight(name, *self.shape, seed, len(sizes)) for seed in (1, 2)
        )
        x = rows(sum(sizes) + 3, spec.k, dtype, 3)
        # Products of random weights are large; a gate far from 0 tests only a limit.
        gate = gate._replace(scale=(gate.scale * 0.02).astype(gate.scale.dtype))
        want, bound = reference.exact_gate_up(x, sizes, gate, up, spec, activation)
        config = self.config(x.shape[0], spec, False, 2)
        (gate, prepared), (up, _) = (self.prepared(w, spec) for w in (gate, up))
        y = grouped_gate_up(
            x,
            int32(sizes),
            gate,
            up,
            prepared,
            activation=activation,
            backend=self.backend,
            interpret=self.interpret(),
            config=config,
        )
        assert y.dtype == x.dtype
        error = np.abs(np.asarray(y.astype(jnp.float32), np.float64) - want)
        assert np.all(error <= tolerance(want, bound, dtype))

    @settings(
        max_examples=5,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(
        sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
        behind=st.integers(0, 9),
        name=st.sampled_from(("int4-g128", "int4-g64-f16", "int8", "nf4-g64")),
        seed=st.integers(0, 2**30),
    )
    def test_any_groups(self, sizes, behind, name, seed):
        self.check(name, sizes, behind, seed=seed)

    def test_no_rows(self):
        weight, spec = random_weight("int4-g128", *self.shape, 0, 2)
        x = jnp.zeros((0, spec.k), jnp.float32)
        assert self.run(x, (0, 0), weight, spec).shape == (0, spec.n)

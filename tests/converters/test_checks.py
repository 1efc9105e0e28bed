"""Numbers that are none, and patterns that would not end."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.converters.checks import MOST_STEPS, finite, fits, pattern, steps
from qjax.errors import FormatError
from qjax.formats import MXFP4, NF4, Int
from qjax.tensor import QuantizedTensor
from qjax.wrappers import LowRank

NAME = "model.layers.10.self_attn.q_proj"
FLOATS = ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_bad_number_is_named(dtype, value):
    x = np.array([[0.0, -1.0, 2.0**-9], [1.0, 448.0, -448.0]]).astype(jnp.dtype(dtype))
    finite(x, "here")
    with np.errstate(all="ignore"):
        x[1, 1:] = np.asarray(value).astype(x.dtype)
    with pytest.raises(FormatError, match=r"here: 2 of 6 .* at index \[1, 1\]"):
        finite(x, "here")
    finite(np.full(3, 127, np.uint8), "here")


@pytest.mark.parametrize("fmt", [Int(4, 16), NF4(32, double=True), MXFP4()])
def test_every_array_of_a_tensor_is_looked_at(fmt):
    q = qjax.quantize(np.random.default_rng(0).normal(size=(64, 8)), fmt)
    q = LowRank(q, jnp.ones((64, 1)), jnp.ones((1, 8)))
    finite(q, "here")
    with pytest.raises(FormatError, match=r"here.b: 1 of 8 .* at index \[0, 3\]"):
        finite(LowRank(q.base, q.a, q.b.at[0, 3].set(jnp.nan)), "here")
    inner, path = q.base, "here.base.scale"
    if isinstance(inner.scale, QuantizedTensor):
        inner, path = inner.scale, "here.base.scale.scale"
    scale = np.array(inner.scale)
    scale[-1, -1] = 255 if scale.dtype == np.uint8 else np.inf
    object.__setattr__(inner, "scale", scale)
    with pytest.raises(FormatError, match=f"{path}: 1 of {scale.size} numbers"):
        finite(q, "here")


@pytest.mark.parametrize(
    "text, ways",
    [
        ("abc", 1),
        (r"a\*\(\[b[(*|]{1}", 11),  # a bound: the class is repeated
        ("(a|b|c)(d|e)", 6),
        ("a?b?", 4),
        (".*", 11),
        (".*?a.*", 66),
        ("(.*a|.*b|c)", 33),
        ("(?:a)+", 11),
        ("(?P<n>a)(?!b|c)", 2),
    ],
)
def test_ways_of_trying_a_pattern(text, ways):
    assert steps(text, 10, "here") == ways


@pytest.mark.parametrize(
    "text",
    [
        r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj$",
        r".*\.(?:3[1-9]|2[0-9]|1[0-9])\..*q_proj.*",
        r"(.*gate$|.*router|.*lm_head|.*q_proj)",
        r"^(?!.*(visual|lm_head)).*proj$",
        r".*model.*layers.*self_attn.*q_proj.*",
        r"(?:model\.)?layers\.(1|10)\..*",
    ],
)
def test_patterns_that_people_write(text):
    assert steps(text, len(NAME), "here") < MOST_STEPS
    assert fits(pattern(text, "here"), NAME)


NO_PATTERNS = ["(a+)+", "(.|.)*X", "((.+))*X", "(?:a?){9}", 5, "a" * 501]


@pytest.mark.parametrize("text", NO_PATTERNS)
def test_repetitions_inside_repetitions_are_refused(text):
    with pytest.raises(FormatError, match="is not a simple pattern"):
        pattern(text, "here")


@pytest.mark.parametrize("text", [".*" * 9 + "X", "(a|a)" * 50, "a?" * 30, ".*" * 250])
def test_patterns_that_take_long_are_refused(text):
    with pytest.raises(FormatError, match=r"settings: pattern .* may be tried in"):
        fits(pattern(text, "here"), NAME, "settings")


@pytest.mark.parametrize("text", ["(", "a{99999999999}", "*", "(?P<n>a)(?P<n>b)"])
def test_what_is_no_pattern(text):
    with pytest.raises(FormatError, match="here: pattern"):
        pattern(text, "here")

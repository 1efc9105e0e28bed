"""NF4 and FP4 equal bitsandbytes' CPU implementation bit for bit.

Sixty tensors: fifteen combinations of shape, block, data type and nesting, four value
distributions each. Compared are codes, absolute maxima, the nested codes, absolute
maxima and offset of double quantization, and the dequantized weight in the dtype of the
input.

bitsandbytes has three CPU decoders that do not agree with each other. Its PyTorch one
defines the values. The C++ ones equal it except for two things that are theirs:

* with AVX-512 and `in` a multiple of 16 but not of the block, the kernel takes the
  scale of a weight from `row * (in // block) + column // block`: another block;
* the portable loop's FP4 table says -0.0 for code 8.

PyTorch splits a sum of 32768 values or more over its threads, so bitsandbytes' offset
itself depends on their number; qjax equals the result of one thread.

One value is out of reach: XLA's CPU backend flushes subnormals, so the 1e-38 that
bitsandbytes stores for an all-zero partial block is 0 in the mean of the scales. It
shows only when every block of a tensor is zero.
"""

import itertools
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import FP4, NF4
from qjax.methods import quantize

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

# (format, block, double, dtype, shape [out, in])
CASES = [
    ("nf4", 64, False, "float32", (24, 128)),
    ("nf4", 64, True, "float32", (24, 128)),
    ("nf4", 64, True, "bfloat16", (40, 512)),
    ("nf4", 64, True, "float16", (7, 33)),
    ("nf4", 64, False, "bfloat16", (13, 21)),
    ("nf4", 64, True, "float32", (129, 127)),
    ("nf4", 128, False, "float16", (6, 256)),
    ("nf4", 256, True, "float32", (33, 1000)),
    ("nf4", 32, False, "float32", (5, 96)),
    ("nf4", 4096, False, "float32", (3, 4096)),
    ("fp4", 64, False, "float32", (24, 128)),
    ("fp4", 64, True, "float16", (40, 512)),
    ("fp4", 128, True, "bfloat16", (129, 127)),
    ("fp4", 256, False, "float32", (5, 101)),
    ("fp4", 64, True, "float32", (1, 3)),
]
VALUES = ("normal", "heavy", "zeros", "ties")
FORMATS = {"nf4": NF4, "fp4": FP4}


@pytest.fixture(autouse=True)
def _eager():
    """bitsandbytes tries torch.compile on odd sizes, which takes half a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def draw(kind: str, values: str, shape, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape).astype(np.float32)
    if values == "heavy":
        w = (rng.standard_t(1.2, size=shape) * 0.01).astype(np.float32)
        w = np.clip(w, -6e4, 6e4)
    elif values == "zeros":  # scattered zeros, a run of zero blocks, both signs of zero
        w[rng.random(shape) < 0.3] = -0.0
        w.reshape(-1)[: w.size // 2] = 0.0
        w[1:][-1:] = 0.0
    elif values == "ties":  # table values and their midpoints, times a power of two
        table = np.sort(FORMATS[kind]().table)
        grid = np.concatenate([table, (table[:-1] + table[1:]) / np.float32(2.0)])
        w = rng.choice(grid, size=shape).astype(np.float32) * np.float32(0.25)
        w.reshape(-1)[::32] = 0.25
    return w


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def column(x) -> np.ndarray:
    """A stored statistic in bitsandbytes' order: over the row-major transpose."""
    return np.asarray(x).T.reshape(-1)


@jax.jit
def _read(q):
    nested = q.scale.unpacked() if q.format.double else None
    return {
        "codes": q.unpacked(),
        "nested": nested,
        "scales": q.scales(),
        "values": q.dequantize(),
    }


def read(q) -> dict:
    return {k: v if v is None else np.asarray(v) for k, v in _read(q).items()}


def as_numpy(x) -> np.ndarray:
    """A torch tensor as NumPy, bfloat16 by its bits."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy()
    return x.numpy()


def peer(w, kind, block, double):
    """Codes [out, in], quantization state and values of bitsandbytes."""
    packed, state = bnb.quantize_4bit(
        w, blocksize=block, quant_type=kind, compress_statistics=double
    )
    nibbles = torch.stack([packed >> 4, packed & 15], -1).reshape(-1)
    return packed, nibbles[: w.numel()].reshape(w.shape).numpy(), state


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_codes_statistics_and_values_equal(case):
    kind, block, double, dtype, shape = case
    fmt = FORMATS[kind](block=block, double=double)
    for seed, values in enumerate(VALUES):
        w = torch.tensor(draw(kind, values, shape, seed)).to(getattr(torch, dtype))
        kernel = jnp.asarray(w.float().numpy().T).astype(dtype)
        q = quantize(kernel, fmt)
        packed, codes, state = peer(w, kind, block, double)
        ours = read(q)
        np.testing.assert_array_equal(ours["codes"].T, codes)
        if double:
            np.testing.assert_array_equal(column(ours["nested"]), state.absmax.numpy())
            for mine, theirs in (
                (q.scale.scale, state.state2.absmax),
                (q.scale.offset, state.offset.reshape(1)),
                (q.scale.format.table, state.state2.code),
            ):
                np.testing.assert_array_equal(bits(column(mine)), bits(theirs.numpy()))
            absmax = bnb.dequantize_blockwise(state.absmax, state.state2)
            absmax = absmax + state.offset
        else:
            absmax = state.absmax
        np.testing.assert_array_equal(
            bits(column(ours["scales"])), bits(absmax.numpy())
        )
        values = ours["values"].T
        reference = eager_values(packed, absmax, kind, block, shape, w.dtype)
        np.testing.assert_array_equal(bits(values), bits(as_numpy(reference)))
        if shape[1] % 16 or shape[1] % block == 0:
            native = as_numpy(bnb.dequantize_4bit(packed, state))
            native = native.view(values.dtype)
            np.testing.assert_array_equal(values, native)  # by value: -0.0 == 0.0


def eager_values(packed, absmax, kind, block, shape, dtype):
    """bitsandbytes' PyTorch decoder."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    code = bnb.get_4bit_type(kind, device="cpu")
    return _dequantize_4bit_compute(
        packed.reshape(-1), absmax, code, block, shape, dtype
    )


def test_native_decoder_disagrees_with_itself_when_rows_do_not_divide():
    """Why the C++ decoder is not the reference for every shape."""
    w = torch.tensor(draw("nf4", "normal", (8, 48), 0))
    packed, _, state = peer(w, "nf4", 64, False)
    eager = eager_values(packed, state.absmax, "nf4", 64, (8, 48), w.dtype).numpy()
    ours = np.asarray(quantize(w.numpy().T, NF4(64)).dequantize()).T
    np.testing.assert_array_equal(ours, eager)
    native = bnb.dequantize_4bit(packed, state).numpy()
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert np.abs(native - eager).max() > 0.1


def test_many_nested_scales_equal_one_thread_of_pytorch():
    """65536 scales: 4M weights, where more threads give another offset."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        w = torch.tensor(draw("nf4", "normal", (2048, 2048), 1))
        _, codes, state = peer(w, "nf4", 64, True)
    finally:
        torch.set_num_threads(threads)
    q = quantize(w.numpy().T, NF4(64, double=True))
    ours = read(q)
    np.testing.assert_array_equal(ours["codes"].T, codes)
    np.testing.assert_array_equal(column(ours["nested"]), state.absmax.numpy())
    for mine, theirs in (
        (q.scale.scale, state.state2.absmax),
        (q.scale.offset, state.offset.reshape(1)),
    ):
        np.testing.assert_array_equal(bits(column(mine)), bits(theirs.numpy()))


def test_dynamic_maps_equal():
    from qjax.formats.codebook import dynamic_map

    for signed in (True, False):
        theirs = bnb.create_dynamic_map(signed).numpy()
        np.testing.assert_array_equal(bits(dynamic_map(signed)), bits(theirs))


def test_tables_equal():
    for kind, fmt in FORMATS.items():
        theirs = bnb.get_4bit_type(kind, device="cpu").numpy()
        np.testing.assert_array_equal(bits(fmt().table), bits(theirs))


def test_sixty_tensors():
    assert len(list(itertools.product(CASES, VALUES))) == 60
    assert {c[1] for c in CASES} >= {32, 64, 128, 256, 4096}
    assert any(prod(c[4]) % 2 for c in CASES)

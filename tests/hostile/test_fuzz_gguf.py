"""Mutated GGUF files either open or raise an error of qjax, and quickly."""

import time
from pathlib import Path

import gguf_bytes
import hostile_gguf
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.converters.gguf_file import open_gguf
from qjax.errors import QjaxError

fuzz = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _open(path: Path, data: bytes) -> bool:
    """Open bytes and read everything; return whether that went well."""
    path.write_bytes(data)
    started = time.process_time()
    try:
        with open_gguf(path) as file:
            total = sum(file.read(name).nbytes for name in file.tensors)
            assert total <= len(data)
            assert len(repr(file.metadata)) < 100 * len(data)
    except QjaxError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 1500
        return False
    finally:
        assert time.process_time() - started < 1
    return True


_HEAD = st.integers(0, 8 * len(hostile_gguf.GOOD_HEAD) - 1)


@fuzz
@given(bits=st.lists(_HEAD, min_size=1, max_size=3))
def test_bit_flips(bits: list[int], tmp_path: Path) -> None:
    raw = bytearray(hostile_gguf.GOOD)
    for bit in bits:
        raw[bit // 8] ^= 1 << bit % 8
    _open(tmp_path / "x", bytes(raw))


_WORD = st.sampled_from([0, 1, 4, 32, 255, 1 << 31, (1 << 32) - 1])
_LONG = st.one_of(_WORD, st.sampled_from([1 << 61, 1 << 62, 1 << 63, (1 << 64) - 1]))


@fuzz
@given(at=st.integers(4, len(hostile_gguf.GOOD_HEAD) - 8), value=_LONG, wide=...)
def test_numbers_anywhere(at: int, value: int, wide: bool, tmp_path: Path) -> None:
    raw = bytearray(hostile_gguf.GOOD)
    kind = np.uint64 if wide else np.uint32
    number = np.array(value % (1 << 32) if not wide else value, kind).tobytes()
    raw[at : at + len(number)] = number
    _open(tmp_path / "x", bytes(raw))


_TENSORS = st.lists(
    st.builds(
        gguf_bytes.tensor,
        st.sampled_from(["a", "b", "c"]),
        st.lists(st.one_of(st.sampled_from([1, 8, 32, 64, 256]), _LONG), max_size=5),
        st.one_of(st.integers(0, 44), _WORD),
        st.one_of(st.integers(0, 4).map(lambda n: 32 * n), _LONG),
    ),
    max_size=3,
)


@fuzz
@given(tensors=_TENSORS, size=st.integers(0, 300))
def test_tensors(tensors: list[bytes], size: int, tmp_path: Path) -> None:
    _open(tmp_path / "x", gguf_bytes.gguf([], tensors, bytes(size)))


@fuzz
@given(data=st.binary(max_size=100), keys=st.integers(0, 4))
def test_bytes_as_keys(data: bytes, keys: int, tmp_path: Path) -> None:
    _open(tmp_path / "x", gguf_bytes.gguf([data], counts=(0, keys)))


def test_the_seed_opens(tmp_path: Path) -> None:
    assert _open(tmp_path / "x", hostile_gguf.GOOD)

"""Base files of llama-perplexity: one that it wrote, and its formulas in NumPy."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from qjax.cli import main
from qjax.errors import FormatError, SpecError
from qjax.evaluate import LogitsFile
from qjax.evaluate.logits_file import decode_rows, encode_rows, write_logits

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "evaluate" / "llama_cpp.kld"
TOKENS = np.arange(12).reshape(3, 4) % 5


def reference_row(logits):
    """Return one row's bytes, as `log_softmax` of perplexity.cpp computes them."""
    logits = logits.astype(np.float32)
    top = logits.max()
    low = max(logits.min(), top - np.float32(16))
    total = np.float32(np.log(np.exp(logits - top).sum(dtype=np.float64)))
    scale = np.float32((top - low) / np.float32(65535))
    codes = [
        int(np.rint((x - low) / scale)) if scale > 0 and x > low else 0 for x in logits
    ]
    odd = len(codes) % 2
    return struct.pack(
        f"<ff{len(codes) + odd}H", scale, low - top - total, *codes, *[0] * odd
    )


def example_logits(vocab):
    """Return rows that span more and less than 16, one that is flat, one masked."""
    rows = np.random.default_rng(0).normal(size=(3, vocab)).astype(np.float32) * 9
    rows[0] /= 100
    rows[1] = 2.5
    rows[2, 1] = -np.inf
    return rows


def write(path, vocab=5, logits=None):
    """Write a file of three windows of four tokens, so of three rows."""
    with write_logits(path, TOKENS, vocab) as writer:
        writer.add(example_logits(vocab) if logits is None else logits)
    return path


@pytest.mark.parametrize("vocab", [5, 64])
def test_bytes_equal_the_formulas(tmp_path, vocab):
    """Header, tokens, rows and the unused entry of an odd vocabulary."""
    logits = example_logits(vocab)
    found = write(tmp_path / "a.kld", vocab).read_bytes()
    head = b"_logits_" + struct.pack("<15i", 4, vocab, 3, *TOKENS.ravel())
    assert found[: len(head)] == head
    rows = b"".join(map(reference_row, logits))
    assert len(found) == len(head) + len(rows)
    with LogitsFile(tmp_path / "a.kld") as file:
        assert (file.context, file.vocab_size, file.windows) == (4, vocab, 3)
        np.testing.assert_array_equal(file.tokens, TOKENS)
        line, codes = file.read(0, 3)
        table = np.frombuffer(rows, "<u2").reshape(3, -1)
        expected = table[:, :4].copy().view("<f4")
        np.testing.assert_allclose(line, expected, rtol=1e-6, atol=1e-6)
        off = codes.astype(int) - table[:, 4 : 4 + vocab]
        assert abs(off).max() <= 1  # float32 division may fall on the other side
        assert (off != 0).mean() < 0.02
        one = file.read(1, 2)[1]
        np.testing.assert_array_equal(one, codes[1:2])
    exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kept = logits > logits.max(-1, keepdims=True) - 16
    got = np.asarray(decode_rows(line, codes))
    np.testing.assert_allclose(got[kept], exact[kept], atol=16 / 65535)


def test_a_file_of_llama_cpp(model_path, tmp_path, capsys):
    """Its codes come out again; the same model is where llama.cpp had it."""
    with LogitsFile(GOLDEN) as file:
        assert (file.context, file.vocab_size, file.windows) == (8, 4096, 2)
        line, codes = file.read(0, file.rows)
        again, same = encode_rows(decode_rows(line, codes))
    np.testing.assert_array_equal(same, codes)
    np.testing.assert_allclose(again, line, atol=1e-3)
    text = (ROOT / "examples" / "data" / "wikitext-2-test.txt").read_text("utf-8")
    (tmp_path / "text").write_text(text[:400], "utf-8")
    out = tmp_path / "out.kld"
    command = ["evaluate", model_path, "--text", tmp_path / "text"]
    command += ["--protocol", "llama.cpp", "--context", "8"]
    command += ["--baseline", GOLDEN, "--write-logits", out, "--json", "-"]
    assert main([str(word) for word in command]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["windows"], result["tokens"]) == (2, 6)
    printed = 10.3973
    assert result["baseline_perplexity"] == pytest.approx(printed, abs=2e-3)
    assert result["perplexity"] == pytest.approx(printed, rel=1e-3)
    assert abs(result["kl_divergence"]) < 1e-4
    assert result["top1_agreement"] == 1
    with LogitsFile(out) as file, LogitsFile(GOLDEN) as theirs:
        np.testing.assert_array_equal(file.tokens, theirs.tokens)
        ours = decode_rows(*file.read(0, file.rows))
    np.testing.assert_allclose(ours, decode_rows(line, codes), atol=0.01)


def cut(size):
    return lambda data: data[:size]


def put(offset, kind, *values):
    """Return what replaces numbers at an offset."""
    new = struct.pack(f"<{kind}", *values)
    return lambda data: data[:offset] + new + data[offset + len(new) :]


ROWS = 20 + 4 * TOKENS.size
ROW = 2 * (4 + 6)
DAMAGE = {
    "empty": (cut(0), "begins with b'', expected b'_logits_'; it is no file of"),
    "magic": (lambda d: b"GGUF" + d[4:], "begins with b'GGUFits_', expected"),
    "header": (cut(19), "has 19 bytes, shorter than the header of 20"),
    "context": (put(8, "i", -4), "context is -4, its vocabulary 5, its windows 3"),
    "short": (put(8, "i", 2), "its context is 2, .* expected at least 3, 1 and 1"),
    "vocabulary": (put(12, "i", 0), "vocabulary 0, its windows 3; expected at least"),
    "windows": (put(16, "i", 0), "its windows 0; expected at least 3, 1 and 1"),
    "huge": (put(8, "3i", *[2**31 - 1] * 3), r"expected \d{28} for 2147483647 windows"),
    "tokens only": (cut(ROWS - 1), "it holds 0 of them: its run was cut"),
    "cut off": (
        cut(ROWS + 2 * ROW + 7),
        "has 115 bytes, expected 128 for 3 windows of 4 tokens and a vocabulary of 5; "
        "it holds 2 of them: its run was cut off, or it is damaged",
    ),
    "more": (lambda d: d + b"\0", "has 129 bytes, expected 128 .*; it is damaged"),
    "token": (put(20 + 4 * 6, "i", 5), "window 1, token 2 has id 5, outside the voc"),
    "negative": (put(20, "i", -1), "window 0, token 0 has id -1, outside the vocab"),
}
BAD_ROWS = {
    "nan": (put(ROWS + ROW, "f", np.nan), "window 1, row 0 has scale nan and lowest"),
    "infinite": (put(ROWS + 4, "f", -np.inf), "window 0, row 0 .* -inf, which is no d"),
    "negative": (put(ROWS, "f", -1e-4), "scale -0.0001"),
    "wide": (put(ROWS + ROW, "2f", 1e-3, -65.5), "scale 0.001 and lowest log-prob"),
    "above one": (put(ROWS + 4, "f", 3.0), "lowest log-probability 3, which is no"),
    "too low": (put(ROWS + ROW + 4, "f", -1.8), "lowest log-probability -1.8, which"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_refuses_damage(tmp_path, name):
    """Every count is checked against the file's size, every token against them."""
    damage, message = DAMAGE[name]
    path = write(tmp_path / "a.kld")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match=message):
        LogitsFile(path)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_refuses_rows(tmp_path, name):
    """A row that is no distribution is found when it is read."""
    damage, message = BAD_ROWS[name]
    path = write(tmp_path / "a.kld")
    path.write_bytes(damage(path.read_bytes()))
    with LogitsFile(path) as file, pytest.raises(FormatError, match=message):
        file.read(0, 3)


def test_refuses_other_files(tmp_path):
    """No file, a directory, and a file that shrinks while it is open."""
    with pytest.raises(SpecError, match=r"a\.kld: no such file"):
        LogitsFile(tmp_path / "a.kld")
    with pytest.raises(FormatError, match="is a directory, expected a regular file"):
        LogitsFile(tmp_path)
    path = write(tmp_path / "b.kld")
    with LogitsFile(path) as file:
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(FormatError, match="shrank from 128 to 127 bytes"):
            file.read(0, 3)


def test_writes_whole_files_or_none(tmp_path):
    """Rows too few leave nothing; an existing file is replaced only when asked."""
    path = tmp_path / "a.kld"
    with pytest.raises(SpecError, match="2 rows were added, expected 3"):
        write(path, logits=example_logits(5)[:2])
    assert list(tmp_path.iterdir()) == []
    write(path)
    with pytest.raises(SpecError, match="exists; choose another name or overwrite it"):
        write(path)
    with write_logits(path, TOKENS[:1], 5, overwrite=True) as writer:
        writer.add(example_logits(5)[:1])
    with LogitsFile(path) as file:
        assert (file.windows, file.rows) == (1, 1)

"""The windows of each perplexity protocol, against plain loops."""

import numpy as np
import pytest

from qjax.errors import SpecError
from qjax.evaluate.windows import plan_windows

TOKENS = np.arange(100, 123)  # 23 tokens, each its own id


def scored(windows, batch=3):
    """Return (context before, target) of every scored token."""
    seen = []
    for tokens, mask in windows.batches(batch):
        assert tokens.shape == (batch, windows.context)
        for row, keep in zip(tokens, mask, strict=True):
            seen += [(tuple(row[:i]), row[i]) for i in np.flatnonzero(keep)]
    return seen


def test_gptq():
    """Adjacent windows, tail dropped, first token of each not scored."""
    windows = plan_windows(TOKENS, "gptq", 5)
    expected = [
        (tuple(TOKENS[w : w + i]), TOKENS[w + i])
        for w in (0, 5, 10, 15)
        for i in range(1, 5)
    ]
    assert scored(windows) == expected
    assert windows.scored == len(expected) == 16
    assert list(TOKENS[windows.scored_tokens()]) == [target for _, target in expected]


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_stride_scores_every_token_once(stride):
    """The loop of the Hugging Face document, with exact token weights."""
    expected, previous = [], 0
    for begin in range(0, len(TOKENS), stride):
        end = min(begin + 5, len(TOKENS))
        expected += [
            (tuple(TOKENS[begin:i]), TOKENS[i])
            for i in range(max(previous, begin + 1), end)
        ]
        previous = end
        if end == len(TOKENS):
            break
    windows = plan_windows(TOKENS, "stride", 5, stride=stride)
    assert scored(windows) == expected
    if stride < 5:
        assert [target for _, target in expected] == list(TOKENS[1:])


@pytest.mark.parametrize("bos", [None, 7])
def test_llama_cpp(bos):
    """The second half of each window; BOS replaces the first token, not shifts it."""
    windows = plan_windows(TOKENS, "llama.cpp", 6, bos_id=bos)
    expected = []
    for begin in (0, 6, 12):
        row = TOKENS[begin : begin + 6].copy()
        if bos is not None:
            row[0] = bos
        expected += [(tuple(row[:i]), row[i]) for i in (4, 5)]
    assert scored(windows) == expected


def test_limit():
    """A window count keeps the first windows."""
    windows = plan_windows(TOKENS, "gptq", 5)
    assert len(windows.limit(2)) == 2
    assert len(windows.limit(99)) == len(windows.limit(None)) == 4
    with pytest.raises(SpecError, match="windows=0"):
        windows.limit(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gtpq", 5), "unknown protocol 'gtpq'; expected one of gptq, stride, llama"),
        (("gptq", 1), "context=1, expected at least 2"),
        (("gptq", 24), "the text has 23 tokens, shorter than one window of 24"),
        (("llama.cpp", 2), "scores nothing at context=2"),
    ],
)
def test_refuses(arguments, message):
    """Impossible requests name the numbers."""
    with pytest.raises(SpecError, match=message):
        plan_windows(TOKENS, *arguments)


def test_refuses_strides():
    """A stride belongs to its protocol and does not skip tokens."""
    with pytest.raises(SpecError, match="takes no stride"):
        plan_windows(TOKENS, "gptq", 5, stride=2)
    with pytest.raises(SpecError, match="stride=6, expected 1 to the context, 5"):
        plan_windows(TOKENS, "stride", 5, stride=6)

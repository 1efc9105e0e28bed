"""Samples into rows: every token once, nothing across samples, nothing lost unsaid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import FormatError, SpecError
from qjax.train.data_packing import Cuts, Rows, Sample, best_fit, fit, split_off
from qjax.train.data_sources import Place


def make_sample(size, *, start=0, learned=None, record=0, document=False):
    """A sample of `size` places, so one token more."""
    ids = np.arange(start, start + size + 1, dtype=np.int32)
    mask = np.ones(size + 1, bool) if learned is None else np.array(learned, bool)
    return Sample(ids, mask, Place("a.jsonl", record + 1), record, document=document)


def naive_best_fit(sizes, context):
    """Number of rows, looked for one by one."""
    spaces = []
    for size in sorted(sizes, reverse=True):
        fitting = [space for space in spaces if space >= size]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else context) - size)
    return len(spaces)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 30))
def test_best_fit(sizes, context):
    """Every sample is in one row, rows fit, and are as few as best fit finds."""
    rows = best_fit(sizes, context)
    assert sorted(n for row in rows for n in row) == list(range(len(sizes)))
    assert all(sum(sizes[n] for n in row) <= context for row in rows)
    assert len(rows) == naive_best_fit(sizes, context)
    assert rows == sorted(rows)


def test_rows():
    """Inputs, next tokens, weights, positions and segments of a packed row."""
    first = make_sample(3, start=10, learned=[0, 0, 1, 1])
    second = make_sample(2, start=20)
    rows = Rows([first, second], 6, pack=True, pad=7)
    batch = rows.empty(1, 2)
    rows.fill(batch, (0, 1), 0)
    assert len(rows) == 1 and (rows.tokens, rows.learned) == (5, 4)
    assert {name: batch[name][0, 1].tolist() for name in batch} == {
        "tokens": [10, 11, 12, 20, 21, 7],
        "targets": [11, 12, 13, 21, 22, 7],
        "weights": [0, 1, 1, 1, 1, 0],
        "positions": [0, 1, 2, 0, 1, -1],
        "segments": [1, 1, 1, 2, 2, 0],
    }
    assert batch["weights"][0, 0].sum() == 0 and (batch["positions"][0, 0] == -1).all()
    alone = Rows([first, second], 6, pack=False, pad=7)
    assert len(alone) == 2 and alone.sha256 != rows.sha256


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 9))
def test_documents_are_predicted_once(sizes, context):
    """Each token of a document but its first is the target of one place."""
    samples = [
        make_sample(size, start=1000 * n, record=n, document=True)
        for n, size in enumerate(sizes)
    ]
    fitting, cuts = fit(samples, context, "error")
    rows = Rows(fitting, context, pack=True, pad=0)
    batch = rows.empty(len(rows))
    for row in range(len(rows)):
        rows.fill(batch, (row,), row)
    seen = batch["targets"][batch["weights"] == 1].tolist()
    assert sorted(seen) == [i for s in samples for i in s.ids[1:].tolist()]
    inputs = batch["tokens"][batch["weights"] == 1]
    np.testing.assert_array_equal(inputs + 1, batch["targets"][batch["weights"] == 1])
    assert cuts == Cuts()


def test_too_long():
    """Refused, cut, split or dropped, as asked, and counted."""
    late = [0] * 8 + [1] * 3  # everything to learn is beyond the first 5 places
    samples = [
        make_sample(4, record=0),
        make_sample(6, record=1),
        make_sample(10, record=2, learned=late),
    ]

    def lengths(policy):
        fitting, cuts = fit(samples, 5, policy)
        return [len(s.ids) - 1 for s in fitting], cuts

    with pytest.raises(SpecError) as caught:
        lengths("error")
    assert "a.jsonl:3: the sample takes 10 tokens, more than context=5" in str(
        caught.value
    )
    assert "2 sample(s) are too long" in str(caught.value)
    assert lengths("truncate") == ([4, 5], Cuts(truncated=1, dropped=1))
    assert lengths("drop") == ([4], Cuts(dropped=2))
    assert lengths("split") == ([4, 5, 1, 5], Cuts(split=2, dropped=1))


@pytest.mark.parametrize(
    ("size", "learned"), [(3, [0, 0, 0, 0]), (3, [1, 0, 0, 0]), (0, [1])]
)
def test_nothing_to_learn(size, learned):
    """A sample whose labels are all masked is refused by its place."""
    with pytest.raises(FormatError, match=r"a\.jsonl:1: .* has no token to learn"):
        fit([make_sample(size, learned=learned)], 8, "truncate")


def test_split_off():
    """About the fraction is held out, by content: stable, and copies stay together."""
    samples = [make_sample(3, start=n, record=n) for n in range(400)]
    train, held = split_off(samples, 0.25)
    assert len(train) + len(held) == 400 and 70 < len(held) < 130
    some = {s.record for s in split_off(samples[::3], 0.25)[1]}
    assert some == {s.record for s in held} & {s.record for s in samples[::3]}
    copy = make_sample(3, start=held[0].record, record=999)
    assert split_off([*samples, copy], 0.25)[1][-1].record == 999
    pieces = [make_sample(2, start=n, record=n // 2) for n in range(40)]
    sides = [{s.record for s in side} for side in split_off(pieces, 0.5)]
    assert not sides[0] & sides[1]
    assert split_off(samples, 0.0) == (samples, [])
    with pytest.raises(SpecError, match="leaves no sample to evaluate on, of 1"):
        split_off(samples[:1], 0.001)

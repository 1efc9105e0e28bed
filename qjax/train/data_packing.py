"""Samples of tokens, and rows of a batch made of them.

A sample of n tokens takes n - 1 places of a row: each but the last is an input, each
but the first a target, so no target belongs to another sample, and windows of a long
text overlap in one token that is predicted in one and read in the other.

Rows are packed by best fit, longest sample first (Johnson 1974: within 11/9 of the
fewest rows), once and the same each time; rows stand in the order of their first
sample.
"""

import bisect
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.errors import FormatError, SpecError
from qjax.train.data_sources import Place

TOO_LONG = ("error", "truncate", "split", "drop")


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One sample.

    Attributes:
      ids: Token ids, int32.
      learned: Which of them the loss counts; the first never does.
      place: Where its record stands.
      record: Number of its record, all of which an evaluation split keeps together.
      window: Number of the window of a text file, which is split without regard.
      document: Whether it is a text file, which is always split.
    """

    ids: np.ndarray
    learned: np.ndarray
    place: Place
    record: int = 0
    window: int = 0
    document: bool = False


@dataclasses.dataclass
class Cuts:
    """What fitting samples into the context did to them.

    Attributes:
      truncated: Samples cut at the end.
      split: Samples (not text files) that became several.
      dropped: Samples, or windows of split ones, left out.
    """

    truncated: int = 0
    split: int = 0
    dropped: int = 0


def fit(
    samples: Iterable[Sample], context: int, too_long: str
) -> tuple[list[Sample], Cuts]:
    """Returns samples of at most `context` places, and what that took.

    Args:
      samples: Any samples.
      context: Places of a row.
      too_long: What to do with longer ones: "error", "truncate", "split", "drop". With
        "truncate" and "split", what is left without a token to learn is dropped.

    Raises:
      FormatError: A sample has no token to learn from the start.
      SpecError: `too_long` is "error" and samples are.
    """
    fitting: list[Sample] = []
    cuts = Cuts()
    longest, refused = None, 0
    for sample in samples:
        size = len(sample.ids) - 1
        if not sample.learned[1:].any():
            raise FormatError(
                f"{sample.place}: the sample has no token to learn ({len(sample.ids)} "
                "tokens, all of them context); fill in the answer or remove it"
            )
        if size <= context:
            fitting.append(sample)
        elif sample.document or too_long == "split":
            windows = _windows(sample, context)
            kept = [window for window in windows if window.learned[1:].any()]
            fitting += kept
            cuts.split += not sample.document
            cuts.dropped += len(windows) - len(kept)
        elif too_long == "error":
            refused += 1
            if longest is None or size > len(longest.ids) - 1:
                longest = sample
        elif too_long == "truncate" and sample.learned[1 : context + 1].any():
            cuts.truncated += 1
            fitting.append(_part(sample, 0, context))
        else:
            cuts.dropped += 1
    if longest is not None:
        need = len(longest.ids) - 1
        raise SpecError(
            f"{longest.place}: the sample takes {need} tokens, more than context="
            f"{context}; {refused} sample(s) are too long and this is the longest; "
            f"set context to {need}, or too_long to 'truncate', 'split' or 'drop'"
        )
    return fitting, cuts


def _windows(sample: Sample, context: int) -> list[Sample]:
    count = -(-(len(sample.ids) - 1) // context)
    return [_part(sample, number, context) for number in range(count)]


def _part(sample: Sample, number: int, context: int) -> Sample:
    cut = slice(number * context, (number + 1) * context + 1)
    ids, learned = sample.ids[cut], sample.learned[cut]
    window = number if sample.document else 0
    return dataclasses.replace(sample, ids=ids, learned=learned, window=window)


def split_off(
    samples: Sequence[Sample], fraction: float
) -> tuple[list[Sample], list[Sample]]:
    """Returns samples to train on and to evaluate on, told apart by their content.

    A sample stays on its side when others come or go, and copies of it are on the same.

    Raises:
      SpecError: One side is empty.
    """
    if not fraction:
        return list(samples), []
    digests: dict[tuple[int, int], Any] = {}
    for sample in samples:
        key = (sample.record, sample.window)
        digest = digests.setdefault(key, hashlib.sha256())
        digest.update(sample.ids.astype("<i4").tobytes())
    limit = int(fraction * 2**64)
    held = {
        key: int.from_bytes(digest.digest()[:8], "little") < limit
        for key, digest in digests.items()
    }
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        sides[held[sample.record, sample.window]].append(sample)
    if not all(sides):
        side = "train" if not sides[0] else "evaluate"
        raise SpecError(
            f"data: eval_fraction={fraction} leaves no sample to {side} on, of "
            f"{len(digests)}; change it, or name a file with eval_path"
        )
    return sides


def best_fit(sizes: Sequence[int], context: int) -> list[list[int]]:
    """Returns rows of numbers of samples, whose sizes sum to at most `context`.

    Args:
      sizes: Places each sample takes, from 1 to `context`.
      context: Places of a row.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free places: rows that have just these
    spaces: list[int] = []  # the keys of open_rows, sorted
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        size = sizes[number]
        at = bisect.bisect_left(spaces, size)
        if at == len(spaces):
            row, space = len(rows), context
            rows.append([])
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[row].append(number)
        left = space - size
        if left and left not in open_rows:
            bisect.insort(spaces, left)
        if left:
            open_rows.setdefault(left, []).append(row)
    return sorted(map(sorted, rows))


class Rows:
    """Rows of a batch, each a few samples.

    Attributes:
      context: Places of a row.
      tokens: Inputs of all rows; `learned` of them have a target that counts.
      sha256: Digest of everything that batches are made from.
    """

    def __init__(
        self, samples: Sequence[Sample], context: int, *, pack: bool, pad: int
    ):
        """Packs `samples`, or gives each a row; `pad` is the id of padding."""
        self.context, self._pad = context, pad
        sizes = [len(sample.ids) - 1 for sample in samples]
        rows = [[n] for n in range(len(sizes))]
        if pack:
            rows = best_fit(sizes, context)
        order = [samples[n] for row in rows for n in row]
        self._row_ends = np.cumsum([0] + [len(row) for row in rows])
        self._ends = np.cumsum([0] + [len(sample.ids) for sample in order])
        self._ids = np.concatenate([sample.ids for sample in order])
        self._learned = np.concatenate([sample.learned for sample in order])
        self.tokens = sum(sizes)
        self.learned = sum(int(sample.learned[1:].sum()) for sample in order)
        digest = hashlib.sha256()
        for array in (self._row_ends, self._ends, self._ids, self._learned):
            digest.update(array.astype(array.dtype.newbyteorder("<")).data)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._row_ends) - 1

    def first(self, count: int) -> np.ndarray:
        """Returns the ids of the first rows one after the other, `count` at most."""
        return self._ids[:count]

    def empty(self, *shape: int) -> dict[str, np.ndarray]:
        """Returns arrays `[*shape, context]` of a batch of padding."""
        shape = (*shape, self.context)
        return {
            "tokens": np.full(shape, self._pad, np.int32),
            "targets": np.full(shape, self._pad, np.int32),
            "weights": np.zeros(shape, np.float32),
            "positions": np.full(shape, -1, np.int32),
            "segments": np.zeros(shape, np.int32),
        }

    def fill(
        self, batch: Mapping[str, np.ndarray], at: tuple[int, ...], row: int
    ) -> None:
        """Writes a row into the arrays of `empty` at index `at`."""
        start = 0
        first, last = self._row_ends[row : row + 2]
        for segment, number in enumerate(range(first, last), 1):
            begin, end = self._ends[number : number + 2]
            size = int(end - begin) - 1
            place = (*at, slice(start, start + size))
            batch["tokens"][place] = self._ids[begin : end - 1]
            batch["targets"][place] = self._ids[begin + 1 : end]
            batch["weights"][place] = self._learned[begin + 1 : end]
            batch["positions"][place] = np.arange(size)
            batch["segments"][place] = segment
            start += size

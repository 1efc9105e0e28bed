"""Batches of rows, in an order that depends on nothing but a seed.

Grain draws the order and builds batches ahead on threads. A step's rows follow from its
number alone: the state of an iterator is that number with digests of everything the
batches are made from, so resuming is exact, on another number of hosts too, and refused
where data, tokenizer or settings differ. A batch may span the end of an epoch; every
row comes once an epoch.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qjax.errors import FormatError, MissingExtraError, SpecError
from qjax.train.data_config import Data, DataReport, whole
from qjax.train.data_packing import Rows

Batch = dict[str, np.ndarray]
"""`tokens`, `targets`, `weights`, `positions`, `segments`, as `qjax.train.step`
takes."""

_FORMAT = 1
_ENDLESS = 2**62


class Batches:
    """An endless, resumable iterator of batches `[accumulate, rows, time]`.

    Attributes:
      step: Number of the next batch.
      fingerprint: Digest of all that batches depend on.
      tokens_per_epoch: Inputs in an epoch.
      steps_per_epoch: Batches that hold every row at least once.
      report: What was read.
    """

    def __init__(
        self,
        train: Rows,
        config: Data,
        settings: Mapping[str, Any],
        report: DataReport,
        *,
        rows: int,
        accumulate: int = 1,
        process: tuple[int, int] = (0, 1),
    ):
        """Starts before the first step; see `qjax.train.data.make_batches`.

        Raises:
          SpecError: `rows`, `accumulate` or `process` is not allowed.
          MissingExtraError: Grain is not installed.
        """
        share = _share(rows, process)
        whole("accumulate", accumulate, 1)
        self._settings = {**settings, "rows": rows, "accumulate": accumulate}
        self.fingerprint = digest(self._settings)
        self.report, self.tokens_per_epoch = report, train.tokens
        self.steps_per_epoch = -(-len(train) // (rows * accumulate))
        self.step = 0
        grain = _import_grain()
        order = grain.MapDataset.range(len(train))
        if config.shuffle:
            order = order.seed(config.seed).shuffle()
        order = order.repeat()

        def build(step: int) -> Batch:
            batch = train.empty(accumulate, len(share))
            first = step * accumulate * rows
            for micro in range(accumulate):
                for slot, row in enumerate(share):
                    number = order[first + micro * rows + row]
                    train.fill(batch, (micro, slot), int(number))
            return batch

        options = grain.ReadOptions(
            num_threads=config.workers, prefetch_buffer_size=2 * config.workers
        )
        dataset = grain.MapDataset.range(_ENDLESS).map(build)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns where the iterator stands, as small JSON."""
        return {
            "format": _FORMAT,
            "step": self.step,
            "fingerprint": self.fingerprint,
            "settings": dict(self._settings),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `get_state` was called.

        Raises:
          FormatError: It is no such state.
          SpecError: Batches would differ from those of that run; the message says why.
        """
        step, settings = _checked(state)
        differ = [
            f"{name}: got {self._settings.get(name)!r}, the run has "
            f"{settings.get(name)!r}{_HINTS.get(name, '')}"
            for name in dict.fromkeys([*self._settings, *settings])
            if self._settings.get(name) != settings.get(name)
        ]
        if len(differ) > 1:  # then other tokens are a consequence
            differ = [reason for reason in differ if not reason.startswith("tokens:")]
        if differ:
            raise SpecError(
                "cannot resume, the batches would differ from those of the run: "
                f"{'; '.join(differ)}; use what the run had, or start a new one"
            )
        self._iterator.set_state({"next_index": step})
        self.step = step

    def close(self) -> None:
        """Stops the threads."""
        self._iterator.close()


class EvalBatches:
    """Batches `[1, rows, time]` of every row once; iterate as often as you like.

    The last one is filled up with padding of zero weight. Every host has as many.
    """

    def __init__(self, data: Rows, *, rows: int, process: tuple[int, int] = (0, 1)):
        """Raises SpecError where `rows` or `process` is not allowed."""
        self._share = _share(rows, process)
        self._data, self._rows = data, rows
        self.tokens, self.learned = data.tokens, data.learned

    def __len__(self) -> int:
        return -(-len(self._data) // self._rows)

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            batch = self._data.empty(1, len(self._share))
            for slot, row in enumerate(self._share):
                number = step * self._rows + row
                if number < len(self._data):
                    self._data.fill(batch, (0, slot), number)
            yield batch


_HINTS = {
    "data": " (digests of the files: they have changed, or are others)",
    "tokenizer": " (digests of the tokenizer: it is another)",
    "template": " (digests of the chat template: it is another)",
    "tokens": (
        " (digests of the token ids: files, tokenizer and settings are the same, so "
        "another version of a package made them)"
    ),
    "rows": " (rows of a batch)",
}


def _share(rows: int, process: tuple[int, int]) -> range:
    """Returns which rows of a batch this host builds."""
    whole("rows", rows, 1)
    index, count = process
    whole("process count", count, 1)
    whole("process index", index, 0)
    if index >= count:
        raise SpecError(f"data: process index is {index} of {count} processes")
    if rows % count:
        raise SpecError(
            f"data: {rows} rows do not divide among {count} processes; use a multiple"
        )
    each = rows // count
    return range(index * each, (index + 1) * each)


def _checked(state: Any) -> tuple[int, dict[str, Any]]:
    """Returns step and settings of a state."""
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
        raise FormatError(
            f"data state: got {state!r:.100}, expected what get_state returned"
        )
    step, settings = state.get("step"), state.get("settings")
    if type(step) is not int or not 0 <= step < _ENDLESS:
        raise FormatError(f"data state: step is {step!r:.80}, expected a whole number")
    if not isinstance(settings, dict) or digest(settings) != state.get("fingerprint"):
        raise FormatError(
            "data state: its fingerprint is not that of its settings; it is damaged"
        )
    return step, settings


def digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _import_grain() -> Any:
    try:
        import grain
    except ImportError:
        raise MissingExtraError(
            'training data need grain; run: pip install "qjax-llm[train]"'
        ) from None
    return grain

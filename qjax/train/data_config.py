"""What to train on, and what was found there."""

import dataclasses
from typing import Any, NoReturn

from qjax.errors import SpecError
from qjax.train.data_packing import TOO_LONG
from qjax.train.data_sources import KINDS


@dataclasses.dataclass(frozen=True)
class Data:
    """What to train on.

    Attributes:
      path: Path or pattern of files, or several: JSONL, parquet or text.
      kind: Kind of all files: "jsonl", "parquet", "text"; "auto" goes by the ending.
      context: Tokens of a row.
      pack: Whether several samples share a row.
      completion_only: Whether only answers are learned, not what asks for them.
      template: Chat template: its source, a file, or "chatml"; None is the tokenizer's.
      eval_path: Files to evaluate on, as `path`.
      eval_fraction: Share of the samples of `path` to evaluate on instead.
      shuffle: Whether each epoch has an order of its own.
      seed: Of that order.
      field: Name of the field with the text, where records hold one text.
      too_long: What becomes of records longer than `context`: "error", "truncate",
        "split" or "drop". Text files are always split.
      workers: Threads that build batches ahead; 0 builds each when it is asked for.

    Raises:
      SpecError: A value is not allowed.
    """

    path: str | tuple[str, ...]
    kind: str = "auto"
    context: int = 512
    pack: bool = True
    completion_only: bool = True
    template: str | None = None
    eval_path: str | tuple[str, ...] | None = None
    eval_fraction: float = 0.0
    shuffle: bool = True
    seed: int = 0
    field: str = "text"
    too_long: str = "error"
    workers: int = 1

    def __post_init__(self):
        for name in ("path", "eval_path"):
            if isinstance(getattr(self, name), list):  # as JSON has them
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _paths("path", self.path)
        if self.eval_path is not None:
            _paths("eval_path", self.eval_path)
        _one_of("kind", self.kind, ("auto", *KINDS))
        _one_of("too_long", self.too_long, TOO_LONG)
        for name in ("pack", "completion_only", "shuffle"):
            _one_of(name, getattr(self, name), (True, False))
        whole("context", self.context, 1)
        whole("seed", self.seed, 0)
        whole("workers", self.workers, 0)
        if self.seed >= 2**32:
            _refuse("seed", self.seed, "a number below 2**32")
        if not self.field or not isinstance(self.field, str):
            _refuse("field", self.field, "the name of a field")
        if not isinstance(self.template, str | None):
            _refuse("template", self.template, "a source, a path or 'chatml'")
        fraction = self.eval_fraction
        if not isinstance(fraction, int | float) or not 0 <= fraction < 1:
            _refuse("eval_fraction", fraction, "a number from 0 to below 1")
        if fraction and self.eval_path is not None:
            raise SpecError("data: give eval_path or eval_fraction, not both")


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What was read; `to_dict()` is JSON.

    Attributes:
      files: Of every file: path, kind, layout, records.
      samples: Samples trained on.
      eval_samples: Samples evaluated on.
      rows: Rows they fill in an epoch.
      tokens: Inputs in an epoch.
      learned: Tokens in an epoch that the loss counts.
      fill: Share of the rows that is not padding.
      truncated: Samples cut at the end.
      split: Samples that became several.
      dropped: Samples, or parts of them, left out.
      notes: What deserves a look, in words.
    """

    files: tuple[dict[str, Any], ...]
    samples: int
    eval_samples: int
    rows: int
    tokens: int
    learned: int
    fill: float
    truncated: int
    split: int
    dropped: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dataclasses.asdict(self)


def whole(name: str, value: Any, least: int) -> None:
    """Raises SpecError unless `value` is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        _refuse(name, value, f"a whole number of at least {least}")


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        _refuse(name, value, f"one of {choices}")


def _paths(name: str, value: Any) -> None:
    items = value if isinstance(value, tuple) else (value,)
    if not items or not all(isinstance(item, str) and item for item in items):
        _refuse(name, value, "a path or several, as strings")


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    raise SpecError(f"data: {name} is {value!r:.80}, expected {expected}")

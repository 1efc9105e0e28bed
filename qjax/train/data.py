"""Training data: files of text to batches, the same ones every time.

Files are read and tokenized at the start (`data_sources`, `data_text`, `data_chat`),
fitted into the context and packed into rows (`data_packing`), then drawn from in an
order of their own every epoch (`data_batches`).

Costs: every host holds all tokens, 5 bytes each, and twice that while they are packed.

Refuses: what those modules do, and sets with nothing in them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from qjax.errors import SpecError
from qjax.text import Tokenizer
from qjax.train.data_batches import Batches, EvalBatches, digest
from qjax.train.data_chat import find_template
from qjax.train.data_config import Data, DataReport
from qjax.train.data_packing import Cuts, Rows, Sample, fit, split_off
from qjax.train.data_sources import Record, Source, find_sources, read_records
from qjax.train.data_text import make_samples

Progress = Callable[[int], None]
"""Called with the number of records read so far."""


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedData:
    """Data read, tokenized and packed.

    Attributes:
      config: What was asked for.
      train: Rows to train on.
      evaluation: Rows to evaluate on, or None.
      settings: What the rows depend on, by name.
      report: What was read.
    """

    config: Data
    train: Rows
    evaluation: Rows | None
    settings: dict[str, Any]
    report: DataReport

    def batches(
        self, *, rows: int, accumulate: int = 1, process: tuple[int, int] = (0, 1)
    ) -> Batches:
        """Returns an iterator of batches to train on; see `make_batches`."""
        return Batches(
            self.train,
            self.config,
            self.settings,
            self.report,
            rows=rows,
            accumulate=accumulate,
            process=process,
        )

    def eval_batches(
        self, *, rows: int, process: tuple[int, int] = (0, 1)
    ) -> EvalBatches | None:
        """Returns batches to evaluate on; see `make_eval_batches`."""
        if self.evaluation is None:
            return None
        return EvalBatches(self.evaluation, rows=rows, process=process)


def make_batches(
    config: Data,
    tokenizer: Tokenizer,
    *,
    rows: int,
    accumulate: int = 1,
    process: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> Batches:
    """Returns an endless, resumable iterator of batches.

    To evaluate on a part of the same data, call `load_data` once and use its methods.

    Args:
      config: What to read.
      tokenizer: The model's.
      rows: Rows of a micro-batch, of all hosts together.
      accumulate: Micro-batches of a step.
      process: Number of this host and how many there are; each builds `rows / count`
        rows, which joined along the rows are the batch of one host alone.
      progress: Called while records are read.

    Raises:
      SpecError: Nothing to read, samples too long, no chat template.
      FormatError: A file or record is broken; the message names its line.
      MissingExtraError: A package for reading is not installed.
    """
    loaded = load_data(config, tokenizer, progress)
    return loaded.batches(rows=rows, accumulate=accumulate, process=process)


def make_eval_batches(
    config: Data,
    tokenizer: Tokenizer,
    *,
    rows: int,
    process: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> EvalBatches | None:
    """Returns the batches to evaluate on, each row once, always in the same order.

    None where the configuration names none. Arguments and errors are those of
    `make_batches`.
    """
    return load_data(config, tokenizer, progress).eval_batches(
        rows=rows, process=process
    )


def load_data(
    config: Data, tokenizer: Tokenizer, progress: Progress | None = None
) -> LoadedData:
    """Reads, tokenizes and packs the files of a configuration.

    Args:
      config: What to read.
      tokenizer: The model's.
      progress: Called while records are read.

    Raises:
      SpecError: Nothing to read, samples too long, no chat template.
      FormatError: A file or record is broken; the message names its line.
      MissingExtraError: Parquet, and pyarrow is not installed.
    """
    template = find_template(config.template, tokenizer)
    files: list[dict[str, Any]] = []

    def read(sources: Sequence[Source]) -> tuple[list[Sample], Cuts]:
        samples = make_samples(
            _all_records(sources, config.field, files, progress),
            tokenizer,
            field=config.field,
            template=template,
            completion_only=config.completion_only,
        )
        fitting, cuts = fit(samples, config.context, config.too_long)
        if not fitting:
            raise SpecError(
                f"data: all {cuts.dropped} samples are longer than context="
                f"{config.context} and were dropped; raise it or change too_long"
            )
        return fitting, cuts

    def pack(samples: Sequence[Sample]) -> Rows:
        return Rows(samples, config.context, pack=config.pack, pad=tokenizer.pad_id)

    sources = find_sources(config.path, config.kind)
    samples, cuts = read(sources)
    samples, held = split_off(samples, config.eval_fraction)
    if config.eval_path is not None:
        held, _ = read(find_sources(config.eval_path, config.kind))
    train = pack(samples)
    settings = {
        "data": digest([[source.kind, source.sha256] for source in sources]),
        "tokenizer": _tokenizer_digest(tokenizer),
        "template": digest(template),
        "context": config.context,
        "pack": config.pack,
        "completion_only": config.completion_only,
        "field": config.field,
        "too_long": config.too_long,
        "eval_fraction": config.eval_fraction,
        "shuffle": config.shuffle,
        "seed": config.seed,
        "tokens": train.sha256,
    }
    report = DataReport(
        files=tuple(files),
        samples=len(samples),
        eval_samples=len(held),
        rows=len(train),
        tokens=train.tokens,
        learned=train.learned,
        fill=train.tokens / (len(train) * config.context),
        notes=tuple(_notes(samples, tokenizer)),
        **dataclasses.asdict(cuts),
    )
    return LoadedData(config, train, pack(held) if held else None, settings, report)


def _all_records(
    sources: Sequence[Source],
    field: str,
    files: list[dict[str, Any]],
    progress: Progress | None,
) -> Iterator[Record]:
    """Yields the records of all files, and adds to `files` what each holds."""
    count = 0
    for source in sources:
        entry = {"path": source.path, "kind": source.kind, "layout": "", "records": 0}
        files.append(entry)
        for record in read_records(source, field):
            entry["layout"] = record.layout
            entry["records"] += 1
            count += 1
            yield record
            if progress is not None and count % 1000 == 0:
                progress(count)
    if progress is not None:
        progress(count)


def _notes(samples: Sequence[Sample], tokenizer: Tokenizer) -> Iterator[str]:
    ends = np.array(tokenizer.eos_ids, np.int32)
    if not any(np.isin(sample.ids[sample.learned], ends).any() for sample in samples):
        yield (
            "no sample teaches an end token of the tokenizer "
            f"{list(tokenizer.eos_ids)}, so the model will not learn to stop"
        )


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    special = [tokenizer.special_tokens, tokenizer.eos_ids, tokenizer.encode("")]
    return digest([tokenizer.backend.to_str(), special, tokenizer.pad_id])

"""Fine-tuning from a model and settings to an adapter on disk.

Decides the order of things: take the directory, put in place what is trained, restore
the newest checkpoint that is whole, train, write what came of it.
"""

import os
from contextlib import closing
from typing import Any

from qjax.train.checkpoints import Checkpoints
from qjax.train.config import Finetune
from qjax.train.metrics import writers_of
from qjax.train.result import FinetuneResult
from qjax.train.run_files import RunFiles
from qjax.train.stops import Stops
from qjax.train.trainer import Progress, Trainer


def finetune(
    model: Any,
    tokenizer: Any,
    config: Finetune,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    base_model: str | None = None,
    original: Any = None,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Fine-tunes a model and writes an adapter, metrics, checkpoints and a report.

    The first SIGINT or SIGTERM ends the run after a step, with a checkpoint.

    Args:
      model: A `Decoder`; its adapters hold the trained values afterwards.
      tokenizer: The model's.
      config: What to train, on what and how.
      output: Directory of the run; see `qjax.train.run_files`.
      resume: Continue the run in `output` from its newest checkpoint that is whole;
        where there is none, start.
      overwrite: Replace the run in `output`.
      base_model: Name or directory of the base model, for the adapter's file.
      original: The model before it was quantized, its `params()` or where it lies, for
        adapters with `init="loftq"` or `"pissa"`; by default `lora.original`.
      progress: Called after every step.

    Returns:
      What it came to.

    Raises:
      SpecError: A setting does not fit the model, or the run that is continued; the
        output holds something else.
      NonFiniteError: Loss or gradient is NaN or infinite; the last checkpoint is kept.
      IntegrityError: `resume`, and every checkpoint is damaged.

    Example:
      >>> model, tokenizer = qjax.load("model-nf4")
      >>> config = Finetune(Data("instructions.jsonl"), steps=100)
      >>> result = finetune(model, tokenizer, config, "tuned")
      >>> model, tokenizer = qjax.load("model-nf4", adapter="tuned/adapter")
    """
    with (
        RunFiles(output, resume=resume, overwrite=overwrite) as files,
        closing(Trainer(model, tokenizer, config, original)) as trainer,
    ):
        with Checkpoints(files.checkpoints, keep=config.keep) as checkpoints:
            if resume:
                trainer.restore(checkpoints)
            files.start(config.to_dict())
            writers = writers_of(config, files, trainer.done)
            try:
                with Stops() as stops:
                    trainer.train(checkpoints, writers, stops, progress)
            finally:
                for writer in writers:
                    writer.close()
        return trainer.finish(files, stops.received, base_model)

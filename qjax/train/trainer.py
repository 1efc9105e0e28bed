"""The loop of a run: step, measure, evaluate, save.

It goes on until the end, a signal, or a loss that is not finite. A run that was killed
at any instant and continued gives the same bits as one that was not: parameters,
optimizer, PRNG key, place in the data and the sums of the metrics are one checkpoint,
and what would change them is compared before it is loaded.

Costs: the host prepares the next batch while the devices work on this one, and reads
one step's loss before it starts the next.
"""

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from qjax.errors import NonFiniteError, SpecError
from qjax.io.files import shown
from qjax.reports import peak_memory_bytes
from qjax.train.checkpoints import Checkpoints
from qjax.train.config import Finetune
from qjax.train.data import load_data
from qjax.train.from_json import plain
from qjax.train.identity import check_same, identity_of
from qjax.train.mesh import Mesh, make_mesh, process_share
from qjax.train.metrics import (
    Meter,
    Writer,
    flops_per_token,
    real_tokens,
    shown_line,
    write_all,
)
from qjax.train.optimizers import learning_rate
from qjax.train.prepared import make_step
from qjax.train.result import FinetuneResult
from qjax.train.run_files import RunFiles
from qjax.train.stops import Stops
from qjax.train.trained import calibration_of, export, prepare_model

_log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called after every step with its number, that of all, and what to show."""


class Trainer:
    """A run in memory; see `qjax.train.run.finetune`.

    Args:
      model: A `Decoder`, changed in place.
      tokenizer: The model's.
      config: The run.
      original: See `finetune`.

    Attributes:
      state: The state after `done` steps.
      done: Number of steps done.
      steps: Number of steps in all.

    Raises:
      SpecError: A setting does not fit the model.
    """

    def __init__(
        self, model: Any, tokenizer: Any, config: Finetune, original: Any = None
    ):
        self.model, self.config = model, config
        if config.data.context > model.config.max_context:
            raise SpecError(
                f"finetune: data.context is {config.data.context}; the model's is "
                f"{model.config.max_context}"
            )
        alone = config.mesh == Mesh() and jax.process_count() == 1
        self.mesh = None if alone else make_mesh(config.mesh)
        process = process_share(self.mesh)
        data = load_data(config.data, tokenizer)
        self.batches = data.batches(
            rows=config.batch, accumulate=config.accumulate, process=process
        )
        self.evaluation = data.eval_batches(rows=config.batch, process=process)
        epochs = config.epochs or 1
        whole = math.ceil(epochs * self.batches.steps_per_epoch)
        self.steps = config.steps or whole
        seed = jax.random.key(config.seed)
        first = jax.random.fold_in(seed, 0)
        calibration = calibration_of(config, data, tokenizer)
        self.trained = prepare_model(model, config, first, original, calibration)
        self.notes = list(data.report.notes)
        wrt = self.trained.wrt
        self.step = make_step(model, config, self.steps, wrt, self.mesh, self.notes)
        self.state = self.step.init(jax.random.fold_in(seed, 1))
        self.identity = identity_of(config, self.steps, self.step.frozen)
        self.flops = flops_per_token(
            model.config, config.data.context, frozen=config.qat is None
        )
        self.done, self.meter = 0, Meter()
        self.resumed_from: int | None = None
        self._saved: int | None = None
        self._evaluated: dict[str, Any] = {}
        self.before: dict[str, Any] = {}
        self._position = self.batches.get_state()

    def close(self) -> None:
        """Stops the threads that build batches."""
        self.batches.close()

    def restore(self, checkpoints: Checkpoints) -> None:
        """Continues from the newest checkpoint that is whole, if there is one.

        Raises:
          SpecError: It belongs to another run; the message says in what it differs.
        """
        saved = checkpoints.newest()
        if saved is None:
            self.notes.append(f"{shown(checkpoints.directory)}: no checkpoint; starts")
            return
        for reason in saved.skipped:
            _log.warning("%s; the checkpoint before it is used", reason)
            self.notes.append(f"{reason}; the checkpoint before it is used")
        check_same(self.identity, saved.run["identity"])
        self.batches.set_state(saved.run["data"])
        self.state = checkpoints.load(saved, self.state)
        self.meter = Meter(**saved.run["meter"])
        self.before, self._evaluated = saved.run["before"], saved.run["evaluated"]
        self._position = saved.run["data"]
        self.done = self.resumed_from = self._saved = saved.step

    def train(
        self,
        checkpoints: Checkpoints,
        writers: list[Writer],
        stops: Stops,
        progress: Progress | None = None,
    ) -> None:
        """Steps to the end, or until it is to stop.

        Raises:
          NonFiniteError: Loss or gradient is NaN or infinite.
        """
        config, text = self.config, ""
        if self.done == 0:
            self._evaluate(writers)
            self.before = self._evaluated
        batch: Any = next(self.batches) if self.done < self.steps else None
        while batch is not None and not stops.wanted():
            start = time.perf_counter()
            placed = self.step.placed(batch)
            self.state, metrics = self.step(self.state, self.step.frozen, placed)
            self._position = self.batches.get_state()
            tokens = real_tokens(placed)
            last = self.done + 1 == self.steps
            batch = None if last else next(self.batches)  # while the devices work
            self._check(metrics, checkpoints)
            self.done += 1
            spent = time.perf_counter() - start
            counted = float(metrics.tokens)
            self.meter.add(float(metrics.loss), counted, int(tokens), spent)
            if last or self.done % config.log.every == 0:
                line = self._line(metrics)
                write_all(writers, line)
                text = shown_line(line)
            if config.eval_every and self.done % config.eval_every == 0:
                self._evaluate(writers)
            if last:
                self._evaluate(writers)
            if last or (config.save_every and self.done % config.save_every == 0):
                self._save(checkpoints)
            if progress is not None:
                progress(self.done, self.steps, text)
        self._save(checkpoints)

    def finish(
        self, files: RunFiles, stopped: str | None, base_model: str | None
    ) -> FinetuneResult:
        """Puts the trained values into the model and writes them, at the end."""
        self.step.install(self.state)
        whole = self.done == self.steps
        paths: Mapping[str, str | None] = {"adapter": None, "model": None}
        if whole:
            paths = export(self.model, self.trained, files, base_model)
        meter = self.meter
        result = FinetuneResult(
            steps=self.done,
            final_loss=meter.mean_loss,
            seconds=meter.total_seconds,
            peak_memory_bytes=peak_memory_bytes(),
            adapter=paths["adapter"],
            model=paths["model"],
            output=os.fspath(files.root),
            interrupted=None if whole else stopped,
            resumed_from=self.resumed_from,
            tokens=meter.total_tokens,
            loss_tokens=int(meter.total_counted),
            tokens_per_second=meter.total_tokens / max(meter.total_seconds, 1e-9),
            eval_loss=self._evaluated.get("eval_loss"),
            eval_perplexity=self._evaluated.get("eval_perplexity"),
            eval_perplexity_before=self.before.get("eval_perplexity"),
            trained_parameters=sum(
                x.size for x in jax.tree.leaves(self.state.trainable)
            ),
            notes=tuple(self.notes),
        )
        files.write(
            files.report,
            {
                **result.to_dict(),
                "data": plain(self.batches.report),
                "modules": self.trained.modules,
                "kept": self.trained.kept,
                "config": self.config.to_dict(),
            },
        )
        return result

    def _check(self, metrics: Any, checkpoints: Checkpoints) -> None:
        if bool(metrics.finite):
            return
        checkpoints.wait()
        steps = checkpoints.steps()
        kept = (
            f"the checkpoint of step {steps[-1]} in {shown(checkpoints.directory)} is "
            "kept"
            if steps
            else "there is no checkpoint yet"
        )
        raise NonFiniteError(
            f"finetune: step {self.done + 1}: the loss is {float(metrics.loss)}, the "
            f"gradient's norm {float(metrics.grad_norm)}; the step changed nothing and "
            f"{kept}; lower optimizer.learning_rate, clip gradients, or look at the "
            "data of this step"
        )

    def _line(self, metrics: Any) -> dict[str, Any]:
        rate = learning_rate(self.config.optimizer, self.steps)(self.done - 1)
        more = {"grad_norm": float(metrics.grad_norm)}
        more["learning_rate"] = float(np.asarray(rate))
        return self.meter.line(self.done, self.flops, **more)

    def _evaluate(self, writers: list[Writer]) -> None:
        """Measures loss and perplexity on the rows held out, once a step."""
        if self.evaluation is None or self._evaluated.get("step") == self.done:
            return
        start, total, tokens = time.perf_counter(), 0.0, 0.0
        rows: Any
        for rows in self.evaluation:
            placed = self.step.placed(rows)
            parts = self.step.evaluate(self.state.trainable, self.step.frozen, placed)
            total, tokens = total + float(parts[0]), tokens + float(parts[1])
        loss = total / max(tokens, 1.0)
        self._evaluated = {
            "step": self.done,
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, 700.0)),
            "eval_tokens": int(tokens),
            "eval_seconds": time.perf_counter() - start,
        }
        write_all(writers, self._evaluated)

    def _save(self, checkpoints: Checkpoints) -> None:
        if self._saved == self.done:
            return
        run = {
            "identity": self.identity,
            "data": self._position,
            "meter": dataclasses.asdict(self.meter),
            "before": self.before,
            "evaluated": self._evaluated,
        }
        checkpoints.save(self.done, self.state, run)
        self._saved = self.done

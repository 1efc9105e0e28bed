"""What a training run measures, and where it is written.

A line of `metrics.jsonl` per interval: `step`, `loss` (mean over the interval's tokens
that count), `tokens` (how many those are), `tokens_per_second` (of all that are no
padding), `grad_norm` and `learning_rate` of the last step, `mfu`,
`peak_memory_bytes`, `seconds` since the start, of earlier parts of the run too.
TensorBoard and Weights & Biases get the same numbers where they are asked for.

Model FLOPs utilization counts what the step needs and no recomputation: two operations
per weight and token forward, as many for the gradient of the inputs, as many again for
that of trained weights; attention over rows of one sample. It is null where the
device's peak is not known.

Reference: Chowdhery et al., "PaLM" (arXiv 2204.02311), appendix B.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from qjax.errors import MissingExtraError
from qjax.io.atomic import write_bytes
from qjax.models import ModelConfig
from qjax.reports import peak_memory_bytes

PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 operations per second by `device_kind`, from vendors' data sheets."""


def flops_per_token(config: ModelConfig, context: int, *, frozen: bool) -> float:
    """Returns what a training step computes for each token of a row.

    Args:
      config: The model's.
      context: Tokens of a row.
      frozen: Whether weights have no gradient, as under adapters.
    """
    heads = config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    mlp = config.mlp_dim * (3 if config.gated else 2)
    weights = config.dim * (config.layers * (heads + mlp) + config.vocab_size)
    attention = config.layers * config.heads * config.head_dim * context
    return 2.0 * weights * (2 if frozen else 3) + 2.0 * attention * 3


@dataclasses.dataclass
class Meter:
    """Adds up steps between two lines; its fields are part of a checkpoint.

    Attributes:
      loss: Sum of losses since the last line.
      counted: Tokens that they are of.
      tokens: Tokens since the last line that are no padding.
      seconds: Wall time since the last line.
      total_seconds: The same since the start.
      total_tokens: Tokens since the start that are no padding.
      total_counted: Tokens since the start that the loss counts.
      last_loss: Mean loss of the last line.
    """

    loss: float = 0.0
    counted: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    total_tokens: int = 0
    total_counted: float = 0.0
    last_loss: float | None = None

    def add(self, loss: float, counted: float, tokens: int, seconds: float) -> None:
        """Adds a step: its mean loss, over how many tokens, of how many, how long."""
        self.loss += loss * counted
        self.counted += counted
        self.total_counted += counted
        self.tokens += tokens
        self.total_tokens += tokens
        self.seconds += seconds
        self.total_seconds += seconds

    @property
    def mean_loss(self) -> float | None:
        """Of the last line, or until the first one of what there is."""
        if self.last_loss is None and self.counted:
            return self.loss / self.counted
        return self.last_loss

    def line(self, step: int, flops: float | None, **more: Any) -> dict[str, Any]:
        """Returns the line of an interval that ends here, and starts the next.

        Args:
          step: Number of steps done.
          flops: Operations per token, or None where they are not known.
          **more: What else the line has.
        """
        self.last_loss = self.loss / max(self.counted, 1.0)
        speed = self.tokens / max(self.seconds, 1e-9)
        line = {
            "step": step,
            "loss": self.last_loss,
            "tokens": int(self.counted),
            "tokens_per_second": speed,
            **more,
            "mfu": utilization(speed, flops),
            "peak_memory_bytes": peak_memory_bytes(),
            "seconds": self.total_seconds,
        }
        self.loss, self.counted, self.tokens, self.seconds = 0.0, 0.0, 0, 0.0
        return line


def utilization(tokens_per_second: float, flops: float | None) -> float | None:
    """Returns the share of the devices' peak that is used, or None if not known."""
    peak = PEAKS.get(jax.devices()[0].device_kind)
    if peak is None or flops is None:
        return None
    return tokens_per_second * flops / (peak * jax.device_count())


class Writer(Protocol):
    """Takes lines."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Stores a line with its step."""

    def close(self) -> None:
        """Ends."""


class JsonLines:
    """A file of one JSON object a line, continued where a resumed run stands.

    Args:
      path: The file.
      step: Lines of later steps, which an interrupted run left, are dropped.
    """

    def __init__(self, path: Path, step: int = 0):
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        text = b"".join(line + b"\n" for line in kept)
        write_bytes(path, text, overwrite=True)
        self._file = open(path, "ab")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line."""
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step(line: bytes) -> float:
    """The step of a line; infinite if a kill cut the line short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class TensorBoard:
    """Event files for TensorBoard.

    Raises:
      MissingExtraError: tensorboardX is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "log.tensorboard needs tensorboardX: pip install tensorboardX"
            ) from error
        self._writer = SummaryWriter(os.fspath(directory))

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes a line's numbers as scalars."""
        for name, value in line.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases.

    Args:
      project: Where it belongs.
      directory: Where it keeps its files.
      config: What the run is, as JSON.
      resumed: Whether a run of this directory is continued.

    Raises:
      MissingExtraError: wandb is not installed.
    """

    def __init__(
        self, project: str, directory: Path, config: dict[str, Any], resumed: bool
    ):
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError(
                "log.wandb needs wandb: pip install wandb"
            ) from error
        note = directory / "wandb-run"
        known = note.read_text("utf-8") if resumed and note.exists() else None
        self._run = wandb.init(
            project=project,
            dir=os.fspath(directory),
            config=config,
            id=known,
            resume="allow" if known else None,
        )
        write_bytes(note, str(self._run.id).encode(), overwrite=True)

    def write(self, line: Mapping[str, Any]) -> None:
        """Logs a line's numbers."""
        values = {k: v for k, v in line.items() if k != "step" and v is not None}
        self._run.log(values, step=line["step"])

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def writers_of(config: Any, files: Any, step: int) -> list[Writer]:
    """Returns what a run's lines go to; nothing in processes but the first.

    Args:
      config: The run.
      files: Where it is kept.
      step: The step that it continues from, or 0 if it starts.
    """
    if jax.process_index():
        return []
    made: list[Writer] = []
    if config.log.tensorboard:
        made.append(TensorBoard(files.root / "tensorboard"))
    if config.log.wandb is not None:
        spec = config.to_dict()
        made.append(WeightsAndBiases(config.log.wandb, files.root, spec, step > 0))
    return [*made, JsonLines(files.metrics, step or -1)]


@jax.jit
def _count(positions: jax.Array) -> jax.Array:
    return jnp.sum(positions >= 0)


def real_tokens(batch: Mapping[str, Any]) -> jax.Array:
    """Returns the number of tokens of a batch that are no padding, over all hosts."""
    return _count(batch["positions"])


def write_all(writers: list[Writer], line: Mapping[str, Any]) -> None:
    """Gives a line to every writer."""
    for writer in writers:
        writer.write(line)


def shown_line(line: Mapping[str, Any]) -> str:
    """Returns a line of the metrics as people read it beside a progress bar."""
    mfu = "" if line["mfu"] is None else f", MFU {line['mfu']:.0%}"
    return (
        f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s{mfu}, "
        f"{line['peak_memory_bytes'] / 2**30:.1f} GiB"
    )

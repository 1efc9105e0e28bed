"""What a run came to."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What a run came to; `to_dict()` has the keys of `qjax finetune --json`.

    Attributes:
      steps: Updates done, over all parts of the run.
      final_loss: Mean training loss of the last line of the metrics.
      seconds: Wall time of the steps, over all parts of the run.
      peak_memory_bytes: High-water mark of the process and its devices.
      adapter: Directory of the PEFT adapter, or None where it was not written.
      model: Directory of the converted model, or None; after quantization-aware
        training.
      output: Directory of the run.
      interrupted: Signal that ended the run before its last step, or None.
      resumed_from: Step of the checkpoint that it was continued from, or None.
      tokens: Tokens trained on that are no padding.
      loss_tokens: Those that the loss counts.
      tokens_per_second: `tokens` by `seconds`.
      eval_loss: Of the last evaluation, or None.
      eval_perplexity: Of the last evaluation, or None.
      eval_perplexity_before: Of the model before it was trained, or None.
      trained_parameters: Numbers that were trained.
      notes: What deserves a look, in words.
    """

    steps: int
    final_loss: float | None
    seconds: float
    peak_memory_bytes: int
    adapter: str | None
    model: str | None
    output: str
    interrupted: str | None
    resumed_from: int | None
    tokens: int
    loss_tokens: int
    tokens_per_second: float
    eval_loss: float | None
    eval_perplexity: float | None
    eval_perplexity_before: float | None
    trained_parameters: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**dataclasses.asdict(self), "notes": list(self.notes)}

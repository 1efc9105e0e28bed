"""`qjax evaluate MODEL --text FILE`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qjax.checkpoint import load
from qjax.cli.output import Output
from qjax.errors import SpecError
from qjax.evaluate import evaluate, report_evaluation, require_matplotlib
from qjax.evaluate.logits_file import is_logits_file
from qjax.inspection import inspect
from qjax.io.files import read_small
from qjax.ops import prepack

_MAX_TEXT = 1 << 30


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure perplexity, and the distance from a baseline model."""

    model: tyro.conf.Positional[str]
    """qjax artifact, Hugging Face directory or Hub id."""
    text: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Plain text file, UTF-8."""
    protocol: Literal["gptq", "stride", "llama.cpp"] = "gptq"
    """How the text is cut into windows and which tokens count."""
    context: int = 512
    """Window length in tokens."""
    stride: int | None = None
    """For protocol stride: step between windows; half the context by default."""
    windows: int | None = None
    """Read only this many windows."""
    baseline: Annotated[str | None, tyro.conf.arg(metavar="MODEL|FILE")] = None
    """Original model, or a base file of --write-logits or `llama-perplexity
    --kl-divergence-base`: adds its perplexity, KL divergence and top-1 agreement."""
    write_logits: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """With protocol llama.cpp: store the model's log-probabilities in a base file."""
    force: bool = False
    """Replace an existing file of --write-logits."""
    report: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Write report.json, tables and plots into a directory."""
    tensor: str | None = None
    """For the report: tensor to look into; by default the one with the most error."""
    tensor: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """For the report, with a baseline: the tensor whose error and values are drawn."""
    dtype: str | None = None
    """Compute dtype; float32 on CPU and bfloat16 elsewhere by default."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    adapter: str | None = None
    """PEFT adapter to put over the weights: directory or Hub id."""
    output: tyro.conf.OmitArgPrefixes[Output] = dataclasses.field(
        default_factory=Output
    )

    def run(self) -> None:
        """Evaluates, then prints one line per figure."""
        if self.report is not None:
            require_matplotlib()
        data = read_small(Path(self.text), _MAX_TEXT)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SpecError(f"{self.text}: is not UTF-8 text: {error}") from None
        model, tokenizer = load(
            self.model, revision=self.revision, dtype=self.dtype, adapter=self.adapter
        )
        model = prepack(model)
        original = None
        stored = self.baseline is not None and is_logits_file(self.baseline)
        if self.baseline is not None and not stored:
            original = prepack(load(self.baseline, dtype=self.dtype)[0])
        with self.output.progress("evaluating") as update:
            result = evaluate(
                model,
                tokenizer,
                text,
                protocol=self.protocol,
                context=self.context,
                stride=self.stride,
                windows=self.windows,
                baseline=self.baseline if stored else original,
                write_logits=self.write_logits,
                overwrite=self.force,
                progress=update,
            )
        console = self.output.console
        for key, value in result.items():
            if isinstance(value, int | float | str):
                shown = f"{value:.6g}" if isinstance(value, float) else value
                console.print(f"{key:28} {shown}")
        if self.report is not None:
            sizes = {"stored": inspect(self.model, revision=self.revision)}
            if self.baseline is not None and not stored:
                sizes["baseline_stored"] = inspect(self.baseline)
            report_evaluation(
                self.report,
                result,
                model,
                name=Path(self.model).name,
                baseline=original,
                tensor=self.tensor,
                **sizes,
            )
            console.print(f"report: {self.report}")
        self.output.results(result)

"""`qjax finetune MODEL --data FILE --to OUT`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import rich.table
import tyro

from qjax.artifact import is_artifact
from qjax.checkpoint import load, open_packed, tokenizer_of
from qjax.cli.output import Output
from qjax.converters.huggingface import open_checkpoint
from qjax.errors import SpecError
from qjax.quantize import quantize_model
from qjax.tensor import format_bytes
from qjax.train.config import Finetune as Run
from qjax.train.config import load_finetune
from qjax.train.data_config import Data
from qjax.train.lora_config import FROM_WEIGHTS
from qjax.train.qat import QAT
from qjax.train.result import FinetuneResult
from qjax.train.run import finetune
from qjax.train.run_files import RunFiles

_SIGNALS = {"SIGINT": 130, "SIGTERM": 143}
_NO_DATA = "(none)"


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Train adapters over a quantized model (QLoRA) and write them for PEFT.

    With any --qat option, the weights themselves are trained for a format, and the
    quantized model is written; add --qat.recipe to --help to see those options.
    """

    model: tyro.conf.Positional[str]
    """qjax artifact, Hugging Face directory, GGUF file or Hub id."""
    to: Annotated[str, tyro.conf.arg(metavar="OUT")]
    """Directory of the run: checkpoints, metrics, the adapter and a report."""
    data: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """What to train on: JSONL, parquet or text; stands for --data.path."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON with any of the settings below; the command line has precedence."""
    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None
    """How a dense model is quantized first: a preset or a JSON recipe; none to train
    over 16-bit weights. By default nf4, and none with --qat."""
    resume: bool = False
    """Continue from the newest checkpoint in OUT; start where there is none."""
    force: bool = False
    """Replace the run in OUT."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    dtype: str | None = None
    """Compute dtype; float32 on CPU and bfloat16 elsewhere by default."""
    run_config: Annotated[Run, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: Run(Data(_NO_DATA))
    )
    output: tyro.conf.OmitArgPrefixes[Output] = dataclasses.field(
        default_factory=Output
    )

    def run(self) -> None:
        """Trains, then prints what it came to and how to load it."""
        config = self.run_config
        if self.data is not None:
            data = dataclasses.replace(config.data, path=self.data)
            config = dataclasses.replace(config, data=data)
        if config.data.path == _NO_DATA:
            raise SpecError("--data: give a file to train on")
        RunFiles(self.to, resume=self.resume, overwrite=self.force).check()
        model, tokenizer, original = self._load(config)
        with self.output.progress("training") as update:
            result = finetune(
                model,
                tokenizer,
                config,
                self.to,
                resume=self.resume,
                overwrite=self.force,
                base_model=self.model,
                original=original,
                progress=update,
            )
        self._show(result)
        self.output.results(result.to_dict())
        if result.interrupted is not None:
            raise SystemExit(_SIGNALS[result.interrupted])

    def _load(self, config: Run) -> tuple[Any, Any, Any]:
        """The model, quantized where it is not and should be, and its tokenizer.

        And where the original of what is quantized here lies, for LoftQ and PiSSA.
        """
        recipe = self.recipe
        if is_artifact(self.model):
            packed = True
        else:
            with open_checkpoint(self.model, self.revision) as source:
                packed = open_packed(source).kind is not None
        if packed and recipe not in (None, "none"):
            raise SpecError(
                f"--recipe {recipe}: {self.model} is quantized already; leave it out"
            )
        if recipe is None:
            recipe = "none" if packed or config.qat is not None else "nf4"
        options: dict[str, Any] = {"revision": self.revision, "dtype": self.dtype}
        if recipe == "none":
            return *load(self.model, **options), None
        model = quantize_model(self.model, recipe, **options)
        tokenizer = tokenizer_of(model.assets.directory)
        tokenizer.check_vocab(model.config.vocab_size)
        lora = config.lora if config.qat is None else config.qat.lora
        if lora is None or lora.init not in FROM_WEIGHTS or lora.original is not None:
            return model, tokenizer, None
        return model, tokenizer, model.assets.directory

    def _show(self, result: FinetuneResult) -> None:
        console = self.output.console
        for note in result.notes:
            console.print(f"note: {note}")
        table = rich.table.Table(show_header=False)
        loss, ppl = result.final_loss, result.eval_perplexity
        table.add_row("steps", str(result.steps))
        table.add_row("training loss", "-" if loss is None else f"{loss:.4f}")
        if ppl is not None:
            before = result.eval_perplexity_before
            table.add_row("held-out perplexity", f"{ppl:.3f}, before {before:.3f}")
        table.add_row("trained parameters", f"{result.trained_parameters:,}")
        table.add_row("tokens/s", f"{result.tokens_per_second:,.0f}")
        table.add_row("peak memory", format_bytes(result.peak_memory_bytes))
        table.add_row("time", f"{result.seconds:.1f} s")
        console.print(table)
        if result.interrupted is not None:
            console.print(
                f"stopped by {result.interrupted} at step {result.steps}; the same "
                "command with --resume continues"
            )
        elif result.adapter is not None:
            console.print(f"adapter: {result.adapter}\nTo use it:")
            base = result.model or self.model
            console.print(f"  qjax generate {base} --adapter {result.adapter} ...")
        else:
            console.print(f"model: {result.model}\nTo use it:")
            console.print(f"  qjax generate {result.model} ...")


def defaults(arguments: Sequence[str]) -> Finetune:
    """Returns what options have where the command line does not give them.

    Args:
      arguments: The command line, of which `--config` and whether there is any `--qat`
        option are looked at.

    Raises:
      SpecError, FormatError: The file of `--config` is no run.
    """
    run = Run(Data(_NO_DATA))
    words = list(arguments)
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or number + 1 < len(words)):
            run = load_finetune(value if equals else words[number + 1])
    if wants_qat(words) and run.qat is None:
        run = dataclasses.replace(run, lora=None, qat=QAT())
    return Finetune(model=tyro.MISSING, to=tyro.MISSING, run_config=run)


def wants_qat(arguments: Sequence[str]) -> bool:
    """Whether a command line has options of quantization-aware training."""
    return any(word.startswith("--qat.") for word in arguments)

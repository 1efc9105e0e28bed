"""`qjax convert MODEL --to OUT --format qjax|safetensors|gptq|gguf:Q4_K_M|peft|...`."""

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from qjax.cli.output import Output
from qjax.convert import Converted, convert
from qjax.errors import SpecError
from qjax.inspection import inspect
from qjax.tensor import format_bytes


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a model in another container, or with an adapter merged into it."""

    model: tyro.conf.Positional[str]
    """qjax artifact, Hugging Face directory or Hub id; for peft an adapter's."""
    to: Annotated[str, tyro.conf.arg(metavar="OUT")]
    """Directory to write, or a .gguf file."""
    format: str | None = None
    """qjax artifact (qjax), dense safetensors (the default), the format of another
    library (gptq, gptq_v2, awq, bnb, hqq, compressed-tensors, quanto, mlx), a GGUF
    file: gguf for the source's blocks or floats, gguf:Q4_K_M and its like to quantize,
    or an adapter of PEFT (peft)."""
    calibration: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text for presets of gguf, which becomes their importance matrix."""
    requantize: bool = False
    """Round weights again that the format cannot hold exactly, rather than refuse."""
    adapter: str | None = None
    """PEFT adapter to merge into the weights: directory or Hub id."""
    merge: Literal["original", "dequantized", "requantized"] | None = None
    """Merge the adapter into the model before it was quantized (needs --original), into
    the dequantized one, or into it and quantize again (qjax is the format then)."""
    original: str | None = None
    """The model before it was quantized, for --merge original."""
    form: Literal["plain", "uniform", "pooled"] = "plain"
    """Of an adapter to write: plain LoRA, with one rank and scale for all layers, or
    with the pooled inputs of QA-LoRA."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    force: bool = False
    """Replace an existing model directory."""
    output: tyro.conf.OmitArgPrefixes[Output] = dataclasses.field(
        default_factory=Output
    )

    def run(self) -> None:
        """Converts, then prints what was written."""
        console = self.output.console
        done, measured = self._write()
        fields: dict[str, Any] = {"to": self.to, **dataclasses.asdict(done), **measured}
        if self.format == "peft":
            console.print(f"{self.to}: adapter of {len(done.exact)} layers")
            self.output.results(fields)
            return
        found = inspect(self.to)
        shown = self.format or found["format"]
        console.print(
            f"{self.to}: {shown}, {found['parameters']:,} parameters, "
            f"{format_bytes(found['size_bytes'])}"
        )
        for layer, why in done.rounded.items():
            console.print(f"rounded again: {layer}: {why}")
        for layer in done.dense:
            console.print(f"written dense: {layer}")
        self.output.results({**found, **fields})

    def _write(self) -> tuple[Converted, dict[str, Any]]:
        """Converts or merges; returns what became of the weights, and of an adapter."""
        if self.adapter is None and (self.merge or self.original):
            raise SpecError("--merge and --original are for an --adapter; give one")
        if self.adapter is None:
            done = convert(
                self.model,
                self.to,
                self.format or "safetensors",
                revision=self.revision,
                overwrite=self.force,
                requantize=self.requantize,
                calibration=self.calibration,
                form=self.form,
            )
            return done, {}
        if self.merge is None:
            raise SpecError(
                "--adapter is merged into the weights here: say how with --merge "
                "original, dequantized or requantized"
            )
        if self.calibration is not None or self.form != "plain":
            raise SpecError("--calibration and --form do not apply to a merge")
        from qjax.train.merge import merge_checkpoint

        report, done = merge_checkpoint(
            self.model,
            self.adapter,
            self.to,
            self.merge,
            fmt=self.format,
            original=self.original,
            revision=self.revision,
            overwrite=self.force,
            requantize=self.requantize,
        )
        shown = "none" if report.relative is None else f"{report.relative:.3g}"
        self.output.console.print(
            f"merged into {len(report.tensors)} weights ({self.merge}): error {shown} "
            "of what the adapter changes"
        )
        return done, {"merge": report.to_dict()}

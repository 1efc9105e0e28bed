"""`qjax quantize MODEL --to OUT --recipe NAME|FILE`."""

import dataclasses
from typing import Annotated, Literal

import rich.table
import tyro

from qjax.allocate import allocate_checkpoint
from qjax.cli.output import Output
from qjax.errors import SpecError
from qjax.quantize import Progress, quantize_checkpoint
from qjax.tensor import format_bytes


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Quantize a model from disk or the Hub, layer by layer."""

    model: tyro.conf.Positional[str]
    """Hugging Face directory or Hub id."""
    to: Annotated[str, tyro.conf.arg(metavar="OUT")]
    """Directory to write. An interrupted run is continued by the same command."""
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = "int4-g128"
    """Preset name (int8, int4-g128, nf4, hqq-int3-g64, ...) or JSON recipe."""
    calibration: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text for recipes that calibrate (gptq-*, awq-*, best-*, ...); its first 128
    windows of 512 tokens are used."""
    target_bits: float | None = None
    """Average bits per quantized weight: the recipe's format gets a width of its own in
    every layer. Needs --calibration and the dense model in memory."""
    report: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """With --target-bits: directory for the chosen map, as JSON and as a plot."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    nonfinite: Literal["raise", "zero", "clip"] = "raise"
    """What to do with NaN and infinite weights."""
    force: bool = False
    """Replace an existing model directory."""
    output: tyro.conf.OmitArgPrefixes[Output] = dataclasses.field(
        default_factory=Output
    )

    def run(self) -> None:
        """Quantizes, then prints sizes and errors."""
        recipe, allocation = self.recipe, None
        if self.target_bits is not None:
            with self.output.progress("allocating") as update:
                allocation = allocate_checkpoint(
                    self.model,
                    self.recipe,
                    self.target_bits,
                    calibration=self.calibration,
                    revision=self.revision,
                    report=self.report,
                    progress=update,
                )
            recipe = allocation.recipe
        elif self.report is not None:
            raise SpecError("--report: describes an allocation; give --target-bits too")
        with self.output.progress("quantizing") as update:

            def show(step: Progress) -> None:
                update(step.done, step.total, step.part)

            report = quantize_checkpoint(
                self.model,
                self.to,
                recipe,
                calibration=self.calibration,
                revision=self.revision,
                overwrite=self.force,
                nonfinite=self.nonfinite,
                progress=show,
            )
        console = self.output.console
        table = rich.table.Table("format", "method", "tensors", "bits/weight", "error")
        for fmt, method in sorted({(t["format"], t["method"]) for t in report.tensors}):
            rows = [
                t for t in report.tensors if (t["format"], t["method"]) == (fmt, method)
            ]
            worst = max(rows, key=lambda t: t["error"])
            bits = (
                8 * sum(t["nbytes"] for t in rows) / sum(t["parameters"] for t in rows)
            )
            table.add_row(
                fmt,
                method,
                str(len(rows)),
                f"{bits:.3f}",
                f"up to {worst['error']:.2%} ({worst['name']})",
            )
        console.print(table)
        kept = sum(t["nbytes"] for t in report.kept)
        console.print(
            f"{self.to}: {format_bytes(report.size_bytes)} "
            f"({report.bits_per_weight:.3f} bits/weight, "
            f"{report.size_bytes / max(report.source_bytes, 1):.0%} of the source); "
            f"{len(report.kept)} tensors kept in float, {format_bytes(kept)}; "
            f"{report.seconds:.1f} s, peak {format_bytes(report.peak_memory_bytes)}"
        )
        for entry in (*report.tensors, *report.kept):
            if "nonfinite" in entry:
                done = "kept" if "reason" in entry else "replaced"
                console.print(
                    f"{entry['name']}: {entry['nonfinite']} NaN or Inf {done}"
                )
        result = report.to_dict()
        if allocation is not None:
            result["allocation"] = allocation.to_dict()
        self.output.results(result)

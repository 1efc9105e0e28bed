"""`qjax convert MODEL --to OUT --format qjax|safetensors|gptq|gguf:Q4_K_M|...`."""

import dataclasses
from typing import Annotated

import tyro

from qjax.cli.output import Output
from qjax.convert import convert
from qjax.inspection import inspect
from qjax.tensor import format_bytes


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a model in another container."""

    model: tyro.conf.Positional[str]
    """qjax artifact, Hugging Face directory or Hub id."""
    to: Annotated[str, tyro.conf.arg(metavar="OUT")]
    """Directory to write, or a .gguf file."""
    format: str = "safetensors"
    """qjax artifact (qjax), dense safetensors, the format of another library (gptq,
    gptq_v2, awq, bnb, hqq, compressed-tensors, quanto, mlx), or a GGUF file: gguf for
    the source's blocks or floats, gguf:Q4_K_M and its like to quantize."""
    calibration: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text for presets of gguf, which becomes their importance matrix."""
    requantize: bool = False
    """Round weights again that the format cannot hold exactly, rather than refuse."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    force: bool = False
    """Replace an existing model directory."""
    output: tyro.conf.OmitArgPrefixes[Output] = dataclasses.field(
        default_factory=Output
    )

    def run(self) -> None:
        """Converts, then prints what was written."""
        done = convert(
            self.model,
            self.to,
            self.format,
            revision=self.revision,
            overwrite=self.force,
            requantize=self.requantize,
            calibration=self.calibration,
        )
        found = inspect(self.to)
        self.output.console.print(
            f"{self.to}: {self.format}, {found['parameters']:,} parameters, "
            f"{format_bytes(found['size_bytes'])}"
        )
        for layer, why in done.rounded.items():
            self.output.console.print(f"rounded again: {layer}: {why}")
        for layer in done.dense:
            self.output.console.print(f"written dense: {layer}")
        self.output.results({"to": self.to, **found, **dataclasses.asdict(done)})

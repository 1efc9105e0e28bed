"""`qjax inspect MODEL`."""

import dataclasses

import rich.table
import tyro

from qjax.cli.output import Output
from qjax.inspection import inspect
from qjax.tensor import format_bytes


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what a model holds: every tensor, its format and true size."""

    model: tyro.conf.Positional[str]
    """qjax artifact, Hugging Face directory or Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    output: tyro.conf.OmitArgPrefixes[Output] = dataclasses.field(
        default_factory=Output
    )

    def run(self) -> None:
        """Prints a table of tensors and the totals."""
        found = inspect(self.model, revision=self.revision)
        table = rich.table.Table("tensor", "shape", "format", "bits/weight", "bytes")
        for t in found["tensors"]:
            shape = " x ".join(map(str, t["shape"]))
            bits = f"{t['bits_per_weight']:.3f}"
            table.add_row(t["name"], shape, t["format"], bits, f"{t['nbytes']:,}")
        console = self.output.console
        console.print(table)
        recipe = f", recipe {found['recipe']}" if found["recipe"] else ""
        console.print(
            f"{found['format']}, {found['architecture']}{recipe}: "
            f"{found['parameters']:,} parameters, "
            f"{found['bits_per_weight']:.3f} bits/weight, "
            f"{format_bytes(found['size_bytes'])}"
        )
        for line in found["found"]:
            console.print(line)
        for fmt, how in found["matmul"].items():
            console.print(f"{fmt}: {how}")
        self.output.results(found)

"""`qjax plan MODEL|CONFIG --device v5e-8|h100|... [--mode serve|finetune]`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import rich.table
import tyro

from qjax.cli.finetune import wants_qat
from qjax.cli.output import Output
from qjax.plan import Plan as Planned
from qjax.plan import Work, plan
from qjax.train.qat import QAT

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Say whether a model fits a device, before there is one; no weights are read.

    For TPUs the real program is compiled (a minute or more); for GPUs the memory of
    arrays is counted and the rest estimated.
    """

    model: tyro.conf.Positional[str]
    """llama-3-8b (or -70b, llama-2-7b, -13b, -70b), a config.json, a model directory
    or artifact, or a Hub id, of which only the configuration is fetched."""
    device: Annotated[str, tyro.conf.arg(metavar="NAME[-N]")]
    """v5e, v5p, v6e (N chips), a100, a100-40g, h100, h200, l4, rtx4090."""
    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE|none")] = None
    """How weights are packed; by default as the artifact is, or nf4, or not with
    --qat."""
    mode: Literal["serve", "finetune"] = "serve"
    """Generation, or training: of adapters (QLoRA), or with any --qat option of the
    weights themselves for a format."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    work: Annotated[Work, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=Work
    )
    output: tyro.conf.OmitArgPrefixes[Output] = dataclasses.field(
        default_factory=Output
    )

    def run(self) -> None:
        """Plans, then prints what needs how much."""
        made = plan(
            self.model,
            self.device,
            recipe=self.recipe,
            mode=self.mode,
            work=self.work,
            revision=self.revision,
        )
        self._show(made)
        self.output.results(made.to_dict())

    def _show(self, made: Planned) -> None:
        console = self.output.console
        table = rich.table.Table("each device", "GiB")
        rows: list[tuple[str, Any]] = [*made.breakdown.items()]
        rows += [("peak", made.peak_bytes_per_device)]
        rows += [("there is", made.memory_bytes_per_device)]
        for name, size in rows:
            table.add_row(name, f"{size / GIB:.2f}")
        if made.host_bytes:
            table.add_row("in the host's memory", f"{made.host_bytes / GIB:.2f}")
        console.print(table)
        verdict = "fits" if made.fits else "does not fit"
        source = "compiled" if made.compiled else "estimated"
        console.print(
            f"{made.mode} on {made.device}: {verdict} ({source}); at most "
            f"{made.tokens_per_second_bound:,.0f} tokens/s"
        )
        for note in made.notes:
            console.print(f"note: {note}")


def defaults(arguments: Sequence[str]) -> Plan:
    """Returns what options have where the command line does not give them.

    Args:
      arguments: The command line, of which any `--qat` option is looked at.
    """
    work = Work(qat=QAT() if wants_qat(arguments) else None)
    return Plan(model=tyro.MISSING, device=tyro.MISSING, work=work)

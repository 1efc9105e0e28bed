"""What every verb prints with: a console, a progress bar, a JSON file."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import rich.console
import rich.progress
import tyro

from qjax.io.atomic import write_bytes


@dataclasses.dataclass(frozen=True)
class Output:
    """Options that all verbs share."""

    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Write machine-readable results to a file, or to standard output."""
    quiet: bool = False
    """Print nothing but errors."""

    @property
    def console(self) -> rich.console.Console:
        """For people; silent when standard output carries JSON."""
        return rich.console.Console(
            quiet=self.quiet or self.json == "-", soft_wrap=True, highlight=False
        )

    @contextmanager
    def progress(self, label: str) -> Iterator[Any]:
        """Gives `update(done, total, note)`; a bar on standard error if a terminal."""
        columns = (
            rich.progress.TextColumn(label),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
        )
        console = rich.console.Console(stderr=True)
        hidden = self.quiet or not console.is_terminal
        with rich.progress.Progress(
            *columns, console=console, disable=hidden, transient=True
        ) as bar:
            task = bar.add_task(label, total=None, note="")

            def update(done: int, total: int, note: str = "") -> None:
                bar.update(task, completed=done, total=total, note=note)

            yield update

    def results(self, value: dict[str, Any]) -> None:
        """Writes the JSON, where it was asked for."""
        if self.json is None:
            return
        text = json.dumps(value, indent=1, sort_keys=False) + "\n"
        if self.json == "-":
            sys.stdout.write(text)
        else:
            write_bytes(Path(self.json), text.encode(), overwrite=True)

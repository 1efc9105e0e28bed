"""The `qjax` command: one file per verb; parses, calls the library, prints."""

from qjax.cli.main import main as main

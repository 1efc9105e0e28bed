"""Entry point of the `qjax` command."""

import sys
from collections.abc import Sequence

import tyro

from qjax.cli.convert import Convert
from qjax.cli.evaluate import Evaluate
from qjax.cli.generate import Generate
from qjax.cli.inspect import Inspect
from qjax.cli.quantize import Quantize
from qjax.errors import QjaxError

VERBS = {
    "quantize": Quantize,
    "convert": Convert,
    "evaluate": Evaluate,
    "generate": Generate,
    "inspect": Inspect,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
      argv: arguments after the program name; default `sys.argv[1:]`.

    Returns:
      Exit status: 0, 2 for bad input (with one line on standard error), 130 when
      interrupted.
    """
    verb = tyro.extras.subcommand_cli_from_dict(
        {name: verb for name, verb in VERBS.items()},
        prog="qjax",
        description="Quantized large language models in JAX.",
        args=None if argv is None else list(argv),
    )
    try:
        verb.run()
    except QjaxError as error:
        text = " ".join(str(error).split())
        print(f"qjax: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qjax: interrupted", file=sys.stderr)
        return 130
    return 0

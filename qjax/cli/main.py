"""Entry point of the `qjax` command."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

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
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        _parse(arguments).run()
    except QjaxError as error:
        text = " ".join(str(error).split())
        print(f"qjax: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qjax: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str]) -> Any:
    """The verb that a command line names, with its options."""
    verbs: list[Any] = [
        Annotated[verb, tyro.conf.subcommand(name)] for name, verb in VERBS.items()
    ]
    if arguments[:1] not in [[name] for name in VERBS]:
        # Only where it may be meant: what it imports takes as long as all the rest.
        from qjax.cli import finetune, plan

        start: Any = finetune.defaults(arguments)
        verb: Any = tyro.conf.subcommand("finetune", default=start)
        verbs.append(Annotated[finetune.Finetune, verb])
        verb = tyro.conf.subcommand("plan", default=plan.defaults(arguments))
        verbs.append(Annotated[plan.Plan, verb])
    union: Any = Union[tuple(verbs)]  # noqa: UP007
    return tyro.cli(
        union,
        prog="qjax",
        description="Quantized large language models in JAX.",
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )
